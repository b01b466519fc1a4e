"""The divided model against transformers' undivided one and ours: logits, tokens, scores, and what ranks keep."""

import multiprocessing
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from pdkv.errors import ConfigError, ModelError, RankLostError
from pdkv.m3.config import load_config
from pdkv.m3.model import load_model
from pdkv.m3.parallel import SOLO, Group, join_group, open_store, run_ranks
from pdkv.m3.sharding import model_share, working_sizes
from pdkv.m3.step import StepOutput
from pdkv.m3.weights import MoeWeights, load_weights, weight_bytes
from pdkv.memory.arena import Arena
from pdkv.verify.equality import compare_logits
from tests.checkpoints import Oracle, OracleCase, write_random_checkpoint, write_released_form
from tests.m3.paged_run import PagedRun
from tests.m3.rank_work import Asked, answer, second_rank, step
from tests.m3.weight_tensors import tensors

LENGTH = 700
"""Six blocks, of which a query sees two."""


@dataclass(frozen=True)
class Checkpoint:
    directory: Path
    case: OracleCase

    @property
    def asked(self) -> Asked:
        return Asked(self.case.prompt, self.case.tokens)


def made(directory: Path, seed: int, **overrides: object) -> Checkpoint:
    write_random_checkpoint(directory, seed, **overrides)
    return Checkpoint(directory, Oracle(directory).case(LENGTH, 4, seed))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Three of its vocabulary of 323 are left over by 2, 4 and 8 ranks."""
    return made(tmp_path_factory.mktemp("small"), 21, vocab_size=323)


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Seven experts, two kv heads, embeddings that are the head too, and released names."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("tied")
    odd = {"num_local_experts": 7, "num_key_value_heads": 2, "index_n_heads": 2, "tie_word_embeddings": True}
    case = made(source, 22, vocab_size=321, **odd).case
    write_released_form(source, target)
    return Checkpoint(target, case)


def check(checkpoint: Checkpoint, size: int, expert_parallel: bool = False) -> None:
    first, *others = run_ranks(
        size, lambda group: answer(checkpoint.directory, checkpoint.asked, group, expert_parallel)
    )
    assert others == [None] * (size - 1)
    verdict = compare_logits(first.numpy(), checkpoint.case.logits)
    print(verdict)  # noqa: T201  shown with -rP, or when it fails
    assert verdict.equal, verdict


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_answers_equal_the_oracles(small: Checkpoint, size: int):
    """Eight ranks share four kv heads: each head is on two, and each of them has half of its q heads."""
    check(small, size)


@pytest.mark.parametrize(("size", "expert_parallel"), [(2, False), (2, True), (4, True), (8, True)])
def test_tied_embeddings_and_experts_held_whole(tied: Checkpoint, size: int, expert_parallel: bool):
    """Eight ranks and seven experts: one rank has none."""
    check(tied, size, expert_parallel)


def keys_kept(directory: Path, prompt: list[int], group: Group) -> Arena:
    run = PagedRun(load_model(directory, group=group), LENGTH)
    run.feed(prompt, [])
    return run.arena


@pytest.mark.parametrize("size", [2, 8])
def test_ranks_keep_their_heads_and_the_same_index_keys(small: Checkpoint, size: int):
    """Index keys are replicated: ranks of one worker hold the same bytes, so that anyone's may be read."""
    whole = keys_kept(small.directory, small.case.prompt, SOLO)
    arenas = run_ranks(size, lambda group: keys_kept(small.directory, small.case.prompt, group))
    for arena in arenas:
        for region in arena.regions():
            mine = arena.view(region.name, region.layer)
            if region.name == "index_k":
                same = arenas[0].view(region.name, region.layer)
                assert torch.equal(mine.nan_to_num(7.0), same.nan_to_num(7.0))
                theirs = whole.view(region.name, region.layer)
            else:
                heads = arena.layout.heads
                theirs = whole.view(region.name, region.layer)[:, heads.start : heads.stop]
            torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=0, equal_nan=True)


def test_tokens_and_scores_come_from_rank_0_alone(small: Checkpoint):
    alone = step(small.directory, SOLO)
    first, other = run_ranks(2, lambda group: step(small.directory, group))
    assert other == StepOutput([], {})
    assert [s.token for s in first.samples] == [s.token for s in alone.samples]
    for number in (1, 2):
        mine, theirs = first.scored[number].logprobs, alone.scored[number].logprobs
        assert mine.num_tokens == theirs.num_tokens > 64
        assert mine.unpack()[0] == pytest.approx(theirs.unpack()[0], abs=1e-4)


def test_scores_that_are_not_finite_leave_no_rank_waiting(small: Checkpoint):
    first, other = run_ranks(2, lambda group: step(small.directory, group, damage=True), timeout_s=30)
    assert other == StepOutput([], {})
    assert first.samples == [None]
    assert first.scored.keys() == {1, 2}


def test_a_rank_that_dies_in_a_step_ends_the_others(small: Checkpoint):
    def work(group: Group) -> None:
        model = load_model(small.directory, group=group)
        run = PagedRun(model, 200)
        if group.rank == 1:
            raise OSError("rank 1 is gone")
        with pytest.raises(RankLostError):
            run.feed(list(range(3, 203)))

    with pytest.raises(OSError, match="rank 1 is gone"):
        run_ranks(2, work)


def test_two_processes_over_gloo(small: Checkpoint):
    store = open_store()
    child = multiprocessing.get_context("spawn").Process(
        target=second_rank, args=(small.directory, small.asked, store.port)
    )
    child.start()
    try:
        group = join_group(store, 0, 2, timeout_s=60)
        logits = answer(small.directory, small.asked, group)
        assert logits is not None
        verdict = compare_logits(logits.numpy(), small.case.logits)
        assert verdict.equal, verdict
        stepped, alone = step(small.directory, group), step(small.directory, SOLO)
        assert [s.token for s in stepped.samples] == [s.token for s in alone.samples]
        child.join(60)
        assert child.exitcode == 0
        group.close()
    finally:
        child.kill()
        child.join()


def test_numbers_of_ranks_that_do_not_divide_the_model_are_named(small: Checkpoint):
    config = load_config(small.directory)
    assert working_sizes(config) == [1, 2, 4, 8]
    assert working_sizes(config, expert_parallel=True) == [1, 2, 4, 8]
    with pytest.raises(ModelError) as caught:
        model_share(config, 0, 3)
    assert str(caught.value) == (
        "this model cannot be divided among 3 ranks: 4 kv heads and 3 ranks do not divide one another; "
        "shared expert size 40 is no multiple of 3. TP sizes that work: 1, 2, 4, 8"
    )
    with pytest.raises(ModelError, match="each kv head would be on 4 ranks, which cannot share its 2 q heads evenly"):
        model_share(config, 0, 16)
    with pytest.raises(ModelError, match="cannot be divided among 0 ranks: a group has at least one rank"):
        model_share(config, 0, 0)
    with pytest.raises(ConfigError, match="rank 2 is not below the TP size 2"):
        model_share(config, 2, 2)


def test_shares_add_up_to_the_model(small: Checkpoint):
    config = load_config(small.directory)
    whole = load_weights(small.directory, config, "cpu", torch.float32)
    ranks = [
        load_weights(small.directory, config, "cpu", torch.float32, model_share(config, r, 2, True)) for r in (0, 1)
    ]
    assert torch.equal(torch.cat([w.embed for w in ranks])[:323], whole.embed)
    assert not ranks[1].embed[161:].any()
    mlp, mine = whole.layers[1].mlp, [w.layers[1].mlp for w in ranks]
    assert isinstance(mlp, MoeWeights)
    assert [m.experts for m in mine] == [range(2), range(2, 4)]
    assert torch.equal(torch.cat([m.gate_up for m in mine]), mlp.gate_up)
    assert torch.equal(torch.cat([m.shared.down for m in mine], dim=1), mlp.shared.down)
    sizes = [sum(t.nbytes for t in tensors(w)) for w in ranks]
    assert sizes == [weight_bytes(config, model_share(config, r, 2, True), 4) for r in (0, 1)]
