"""Which part of each weight a tensor-parallel rank holds: pure numbers, from the config and the number of ranks."""

from dataclasses import dataclass

from pdkv.errors import ConfigError, ModelError
from pdkv.m3.model_config import M3Config
from pdkv.memory.row import heads_of_rank

_LARGEST_GROUP = 64
"""How far to look for sizes that would work."""


@dataclass(frozen=True)
class ModelShare:
    """One rank's part of the model. Heads, experts, columns and tokens by their global numbers, each a run.

    Norms, the router and the index key's projection are on every rank, whole.
    """

    rank: int
    size: int
    q_heads: range
    kv_heads: range
    """Index heads too: there is one for each kv head. Several ranks hold the same head when there are more ranks."""
    dense_columns: range
    """Of a dense MLP's intermediate size."""
    shared_columns: range
    """Of the shared expert's."""
    expert_columns: range
    """Of each routed expert's; all of them when experts are held whole."""
    experts: range
    """Routed experts that this rank has; all of them unless experts are held whole."""
    vocab: range
    vocab_rows: int
    """Rows that embedding and head have on every rank: the last ranks' are filled up with zeros."""


def model_share(config: M3Config, rank: int = 0, size: int = 1, expert_parallel: bool = False) -> ModelShare:
    """The share of one rank; the whole model without a rank.

    q, k, v and index_q go by kv head, MLPs by columns, the vocabulary in equal runs of which the last may be shorter.
    Experts are cut like other MLPs, or with ``expert_parallel`` held whole, as evenly as their number allows.
    Raises ``ModelError`` naming every number that the ranks do not divide, and the sizes that would work.
    """
    problems = _problems(config, size, expert_parallel)
    if problems:
        works = ", ".join(map(str, working_sizes(config, expert_parallel)))
        raise ModelError(
            f"this model cannot be divided among {size} ranks: {'; '.join(problems)}. TP sizes that work: {works}"
        )
    if not 0 <= rank < size:
        raise ConfigError(f"rank {rank} is not below the TP size {size}")
    vocab_rows = -(-config.vocab_size // size)
    experts, per_rank = config.num_experts, config.expert_intermediate_size
    return ModelShare(
        rank=rank,
        size=size,
        q_heads=_run(config.num_heads, rank, size),
        kv_heads=heads_of_rank(config.num_kv_heads, rank, size),
        dense_columns=_run(config.dense_intermediate_size, rank, size),
        shared_columns=_run(config.shared_intermediate_size, rank, size),
        expert_columns=range(per_rank) if expert_parallel else _run(per_rank, rank, size),
        experts=_run(experts, rank, size) if expert_parallel else range(experts),
        vocab=range(min(rank * vocab_rows, config.vocab_size), min((rank + 1) * vocab_rows, config.vocab_size)),
        vocab_rows=vocab_rows,
    )


def working_sizes(config: M3Config, expert_parallel: bool = False) -> list[int]:
    """Numbers of ranks that this model can be divided among, up to 64."""
    return [size for size in range(1, _LARGEST_GROUP + 1) if not _problems(config, size, expert_parallel)]


def _problems(config: M3Config, size: int, expert_parallel: bool) -> list[str]:
    if size < 1:
        return ["a group has at least one rank"]
    kv_heads, group = config.num_kv_heads, config.num_heads // config.num_kv_heads
    problems = []
    if kv_heads % size != 0 and size % kv_heads != 0:
        problems.append(f"{kv_heads} kv heads and {size} ranks do not divide one another")
    elif size > kv_heads and group % (size // kv_heads) != 0:
        problems.append(
            f"each kv head would be on {size // kv_heads} ranks, which cannot share its {group} q heads evenly"
        )
    sizes = {"dense MLP size": config.dense_intermediate_size if not all(config.moe_layers) else 0}
    if any(config.moe_layers):
        sizes["shared expert size"] = config.shared_intermediate_size
        sizes["expert size"] = 0 if expert_parallel else config.expert_intermediate_size
    problems += [f"{what} {number} is no multiple of {size}" for what, number in sizes.items() if number % size]
    return problems


def _run(count: int, rank: int, size: int) -> range:
    """Share ``rank`` of ``count`` things, as even as it can be."""
    return range(rank * count // size, (rank + 1) * count // size)
