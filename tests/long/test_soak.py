"""64 requests at once, of 1 to 20,000 tokens, through pools that hold the longest and little else."""

import random
import time
from pathlib import Path

import pytest

from pdkv.m3.model import M3Model, load_model
from tests.soak import Pair, assert_all_right, make_jobs, write_tiny_checkpoint

LENGTHS = [1, 2, 127, 128, 129, 255, 256, 257, 20_000, 11_000, 6_000, 4_000, 3_000, 2_500]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("checkpoint")
    write_tiny_checkpoint(directory)
    return directory


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> M3Model:
    return load_model(checkpoint)


@pytest.mark.parametrize("speculative_tokens", [0, 4])
def test_64_requests_of_any_length(checkpoint: Path, model: M3Model, speculative_tokens: int) -> None:
    rng = random.Random(speculative_tokens)
    jobs = make_jobs(rng, [*LENGTHS, *(rng.randrange(1, 900) for _ in range(50))], 0.2, 150)
    began = time.monotonic()
    with Pair(checkpoint, (162, 166), 20_100, speculative_tokens=speculative_tokens) as pair:
        outcomes = pair.run(jobs)
        divided_s = time.monotonic() - began
        num_near_ties = assert_all_right(model, jobs, outcomes)
        ended = [outcome for outcome in outcomes if outcome.report is not None]
        accepted = pair.counted("pdkv_draft_tokens_total", "accepted")
        print(  # noqa: T201 - what the long test measured belongs into its output
            f"{len(ended)} of 64 ended, the others were cancelled; {divided_s:.1f} s divided, "
            f"{sum(o.report.cached_tokens for o in ended if o.report)} prompt tokens from P's cache, "
            f"{sum(o.report.resident_pages for o in ended if o.report)} pages from D's, "
            f"{accepted:.0f} drafts accepted, {num_near_ties} near ties"
        )
        assert len(ended) >= 40
        assert (accepted > 0) == (speculative_tokens > 0)
        for pool in pair.pools():
            assert pool.statistics().num_evictions > 0
            pool.keep_nothing()
            assert pool.statistics().largest_run == pool.num_usable
