"""How many spans a prompt's state takes: one a run of pages where nothing is fragmented, never more than one a page.

``pytest tests/e2e/test_spans.py -s`` prints them against what a mover would need that knows neither rows nor runs.
"""

from collections.abc import Sequence
from pathlib import Path

import httpx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdkv.core.plan import TransferPlan, spans_without_merging
from pdkv.m3.config import kv_layout, load_config
from pdkv.memory.arena import Arena
from pdkv.memory.manifest import build_manifest
from pdkv.memory.pages import PagePool
from pdkv.memory.row import RowLayout
from pdkv.schema import ReadBatch
from pdkv.verify.link_chasing import make_prompt
from tests.e2e.deployment import LONG, Trio, another_prefill, ask, token_ids, transfer_facts, wait_until

NUM_PAGES = 200


def show(case: str, pages: int, regions: int, spans: int) -> None:
    unmerged = f"{pages} x {regions} = {pages * regions:>6,}"
    print(f"{case:<52} pages x regions {unmerged}   spans {spans:>3}")  # noqa: T201  the acceptance asks to see it


def spans_of(answer: httpx.Response, case: str) -> int:
    facts = transfer_facts(answer)
    show(case, facts["num_pages"], facts["num_regions"], facts["num_spans"])
    return int(facts["num_spans"])


def test_a_prompt_read_at_once_is_one_span(three: Trio, link_chasing_model: Path, tmp_path: Path) -> None:
    flags = ("--max-model-len", "8192", "--prefill-chunk", "1536", "--layer-groups", "1")
    prompt = make_prompt(7, 1500)
    with another_prefill(three.decode, link_chasing_model, tmp_path, *flags) as deployment:
        wait_until(three.decode.holds_nothing, "an unfragmented pool")
        answer = ask(deployment.router.url, prompt.token_ids, 2)
    assert token_ids(answer) == list(prompt.expected(2))
    assert spans_of(answer, "1,500 tokens, computed in one chunk") == 1


def test_a_streamed_prompt_is_one_span_a_read_and_a_run_of_heads_in_layer_groups(long_answer: httpx.Response) -> None:
    """Chunks of 512 end with whole blocks: a read each, fewer when D finds several complete at a time. The last chunk,
    of three pages, is read in up to four layer groups: of a page's row a span for each head and one for the index."""
    assert 1 <= spans_of(long_answer, "3,400 tokens, streamed in chunks of 512") <= LONG // 512 + 3 * 4 * (4 + 1)


class PlannedPair:
    """The plan between two workers of the link-chasing model, and the pools of both."""

    def __init__(self, model: Path) -> None:
        needed = kv_layout(load_config(model), "float32", "float32")
        layout = RowLayout.of(needed)
        self.arena = Arena.allocate(layout, NUM_PAGES)
        manifest = build_manifest(self.arena, needed, "the same model")
        self.plan = TransferPlan.between([manifest], manifest)

    def read(self, source: Sequence[int], local: Sequence[int]) -> ReadBatch:
        (batch,) = self.plan.reads(source, local, (self.arena.memory.address,)).values()
        return batch


@pytest.fixture(scope="module")
def pair(link_chasing_model: Path) -> PlannedPair:
    return PlannedPair(link_chasing_model)


def pool_with_holes(hole: int) -> PagePool:
    """Free pages in holes of ``hole`` pages, each behind a page in use."""
    pool = PagePool(NUM_PAGES, reserved=(0, NUM_PAGES - 1))
    pages = pool.reserve(pool.num_usable)
    pool.free([page for i, page in enumerate(pages) if i % (hole + 1)])
    return pool


@pytest.mark.parametrize(
    ("source_hole", "local_hole", "spans"), [(NUM_PAGES, NUM_PAGES, 1), (1, NUM_PAGES, 47), (1, 1, 47), (4, 6, 16)]
)
def test_fragmented_pools_plan_one_span_a_run(source_hole: int, local_hole: int, spans: int, pair: PlannedPair) -> None:
    source = pool_with_holes(source_hole).reserve(47)
    local = pool_with_holes(local_hole).reserve(47)
    batch = pair.read(source, local)
    case = f"47 pages out of holes of {source_hole}, into holes of {local_hole}"
    show(case, 47, pair.plan.num_regions, batch.num_spans)
    assert batch.num_spans == spans
    assert batch.num_spans <= 47 < spans_without_merging(pair.plan, 47)


@given(
    source=st.permutations(range(1, 48)),
    local=st.permutations(range(100, 147)),
    length=st.integers(min_value=1, max_value=47),
)
@settings(max_examples=50)
def test_any_pages_plan_at_most_one_span_a_page(
    source: list[int], local: list[int], length: int, pair: PlannedPair
) -> None:
    batch = pair.read(source[:length], local[:length])
    assert batch.num_spans <= length
    covered = np.concatenate([np.arange(a, a + n, 512) for a, n in zip(batch.remote, batch.length, strict=True)])
    wanted = {page * pair.arena.layout.pitch for page in source[:length]}
    assert wanted <= set(covered.tolist()), "every page's row is in some span"
    assert len(set(covered.tolist())) == covered.size, "no byte is read twice"
