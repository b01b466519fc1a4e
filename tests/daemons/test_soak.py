"""Short histories of many requests at once; tests/long has the long ones."""

import random
from pathlib import Path

import pytest

from pdkv.m3.model import M3Model, load_model
from pdkv.transport.inproc import Faults
from tests.soak import BLOCK, Job, Pair, Sampling, assert_all_right, make_jobs, write_tiny_checkpoint

_LOST = frozenset({"read_failed", "peer_lost", "probe", "lease_expired"})


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("checkpoint")
    write_tiny_checkpoint(directory)
    return directory


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> M3Model:
    return load_model(checkpoint)


def assert_reuse(pair: Pair, model: M3Model, like: Job) -> None:
    """A prompt that has just been asked is taken from both caches."""
    job = Job((*like.prompt[:40], *range(3, 303)), 4, like.sampling)
    pair.run([job])
    (outcome,) = pair.run([job])
    assert_all_right(model, [job], [outcome])
    assert outcome.report is not None
    assert outcome.report.cached_tokens == outcome.report.resident_pages * BLOCK == len(job.prompt) // BLOCK * BLOCK


@pytest.mark.parametrize("speculative_tokens", [0, 3])
def test_many_requests_with_few_pages(checkpoint: Path, model: M3Model, speculative_tokens: int) -> None:
    rng = random.Random(speculative_tokens)
    jobs = make_jobs(rng, [1, 127, 128, 129, *(rng.randrange(1, 700) for _ in range(14))], 0.25, 60)
    with Pair(checkpoint, (12, 16), 800, speculative_tokens=speculative_tokens, prefill_chunk=200) as pair:
        outcomes = pair.run(jobs)
        assert_all_right(model, jobs, outcomes)
        assert_reuse(pair, model, jobs[0])
        accepted = pair.counted("pdkv_draft_tokens_total", "accepted")
        assert (accepted > 0) == (speculative_tokens > 0)
        assert max(outcome.largest_piece for outcome in outcomes) <= 1 + speculative_tokens
        assert pair.most_jobs_told > 1, "tokens of a step were told one by one"
        for pool in pair.pools():
            assert pool.statistics().num_evictions > 0, "the pool was never too small"
            pool.keep_nothing()
            assert pool.statistics().largest_run == pool.num_usable


@pytest.mark.parametrize(("prefill_chunk", "max_pull_gbps"), [(130, 0.0), (512, 0.05)])
def test_what_reads_that_fail_have_left_behind_is_never_used(
    checkpoint: Path, model: M3Model, prefill_chunk: int, max_pull_gbps: float
) -> None:
    """Reads that tear, fail and overtake one another; what failed is tried again under a new id, as the router does.

    Once as whole rows, once in layer groups and slices.
    """
    jobs = make_jobs(random.Random(9), [random.Random(9).randrange(200, 700) for _ in range(6)], 0.0, 1)
    faults = Faults(seed=4, max_delay_polls=4, reorder=0.3, fail=0.04, truncate=0.04)
    num_failed = 0
    settings = {"prefill_chunk": prefill_chunk, "max_pull_gbps": max_pull_gbps, "lease_ttl_s": 1.0}
    with Pair(checkpoint, (20, 20), 800, faults=faults, **settings) as pair:
        for _ in range(60):
            outcomes = pair.run(jobs)
            assert_all_right(model, jobs, outcomes, _LOST)
            jobs = [job for job, outcome in zip(jobs, outcomes, strict=True) if outcome.error is not None]
            num_failed += len(jobs)
            if not jobs:
                break
        assert not jobs
        assert num_failed > 0


def test_ranks_reuse_and_verify_together(checkpoint: Path, model: M3Model) -> None:
    rng = random.Random(7)
    jobs = make_jobs(rng, [rng.randrange(1, 500) for _ in range(12)], 0.2, 60)
    with Pair(checkpoint, (10, 12), 600, tp=(1, 2), speculative_tokens=3, prefill_chunk=200) as pair:
        assert_all_right(model, jobs, pair.run(jobs))
        assert_reuse(pair, model, jobs[0])
        assert pair.counted("pdkv_draft_tokens_total", "accepted") > 0


@pytest.mark.parametrize(
    ("num_first", "num_common", "num_second", "cached", "resident"),
    [
        (300, 300, 300, 256, 2),  # all of it
        (256, 256, 256, 128, 1),  # the last token is always computed
        (300, 200, 310, 128, 1),  # a part, neither end on a block's
        (300, 300, 700, 256, 2),  # it goes on
        (300, 100, 300, 0, 0),  # less than a block in common
        (100, 100, 120, 0, 0),  # shorter than a block
    ],
)
def test_what_is_there_is_neither_computed_nor_moved(
    checkpoint: Path, model: M3Model, num_first: int, num_common: int, num_second: int, cached: int, resident: int
) -> None:
    rng = random.Random(num_common)
    one, two = ([rng.randrange(3, 320) for _ in range(count)] for count in (num_first, num_second))
    prompts = tuple(one), (*one[:num_common], *two[num_common:])
    first, second = (Job(prompt, 6, Sampling()) for prompt in prompts)
    with Pair(checkpoint, (12, 12), 800) as pair:
        assert_all_right(model, [first], pair.run([first]))
        (outcome,) = pair.run([second])
        assert_all_right(model, [second], [outcome])
        assert outcome.report is not None
        assert (outcome.report.cached_tokens, outcome.report.resident_pages) == (cached, resident)
        assert outcome.report.num_pages == -(-num_second // BLOCK) - resident
        assert outcome.report.num_bytes == sum(outcome.report.bytes_by_region.values())


@pytest.mark.parametrize("side", [0, 1])
def test_only_one_side_may_have_it(checkpoint: Path, model: M3Model, side: int) -> None:
    job = Job(tuple(random.Random(1).choices(range(3, 320), k=400)), 6, Sampling())
    with Pair(checkpoint, (12, 12), 800) as pair:
        pair.run([job])
        pair.pools()[side].keep_nothing()
        (outcome,) = pair.run([job])
        assert_all_right(model, [job], [outcome])
        assert outcome.report is not None
        assert (outcome.report.cached_tokens, outcome.report.resident_pages) == ((0, 3) if side == 0 else (384, 0))


def test_without_a_prefix_cache_everything_is_computed_and_moved(checkpoint: Path) -> None:
    job = Job(tuple(random.Random(1).choices(range(3, 320), k=400)), 6, Sampling())
    with Pair(checkpoint, (12, 12), 800, prefix_cache=False) as pair:
        pair.run([job])
        (outcome,) = pair.run([job])
        assert outcome.report is not None
        assert (outcome.report.cached_tokens, outcome.report.resident_pages) == (0, 0)
        assert pair.counted("pdkv_prefix_cache_blocks_total", "hit") == 0


def test_what_was_generated_is_there_when_the_conversation_goes_on(checkpoint: Path, model: M3Model) -> None:
    prompt = tuple(random.Random(1).choices(range(3, 320), k=250))
    job = Job(prompt, 20, Sampling())
    with Pair(checkpoint, (12, 12), 800, speculative_tokens=2) as pair:
        (outcome,) = pair.run([job])
        again = Job((*prompt, *outcome.tokens, 5, 6), 6, Sampling())
        (outcome,) = pair.run([again])
        assert_all_right(model, [again], [outcome])
        assert outcome.report is not None
        assert (outcome.report.cached_tokens, outcome.report.resident_pages) == (128, 2)
