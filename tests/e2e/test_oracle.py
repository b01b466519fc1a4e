"""A random checkpoint of transformers, served by ``pdkv up``: greedy tokens through P -> D are transformers' own."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from pdkv.verify.equality import combine, compare_tokens
from tests.checkpoints import Oracle, write_random_checkpoint
from tests.e2e.deployment import Process, ask, running, token_ids, up

NUM_TOKENS = 12
THREE_LAYERS = {
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "index_n_heads": 2,
    "layer_types": ["full_attention", "minimax_m3_sparse", "minimax_m3_sparse"],
    "mlp_layer_types": ["dense", "sparse", "sparse"],
}
"""As little as keeps 6,000 tokens cheap for the oracle; two blocks a query, as in ``SMALL``."""


@pytest.fixture(scope="module")
def unseen_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models") / "random-m3"
    write_random_checkpoint(directory, 1, **THREE_LAYERS)
    return directory


@pytest.fixture(scope="module")
def served(unseen_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    """Chunks are no multiple of the block, so that watermarks fall inside blocks."""
    flags = ("--max-model-len", "6144", "--prefill-chunk", "333")
    with running(up(unseen_model, tmp_path_factory.mktemp("oracle"), *flags)) as process:
        yield process


@pytest.fixture(scope="module")
def oracle(unseen_model: Path) -> Oracle:
    return Oracle(unseen_model)


@pytest.mark.parametrize("length", [1, 127, 128, 129, 511, 2048, 2049, 3000, 6000])
def test_tokens_through_prefill_and_decode_are_the_oracles(length: int, served: Process, oracle: Oracle) -> None:
    case = oracle.case(length, NUM_TOKENS, seed=2)
    tokens = token_ids(ask(served.url, case.prompt, NUM_TOKENS))
    verdict = combine([compare_tokens(tokens, case.tokens, case.logits)])
    print(f"{length} tokens: {verdict}")  # noqa: T201  what the equality rule excuses must be reported
    assert verdict.equal, verdict.problems
