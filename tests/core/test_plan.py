"""Plans against memory: every wanted byte arrives once and nothing else is touched, for any layouts and rank pairs."""

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdkv.core.manifest import region_keys
from pdkv.core.plan import TransferPlan, spans_without_merging
from pdkv.memory.row import heads_of_rank
from pdkv.schema import ALL_LAYERS, LayerRange, Manifest, ReadBatch, RegionKey
from tests.layouts import make_layout, make_manifest, memory_length

UNTOUCHED = 0xEE


def content(key: RegionKey, page: int, length: int) -> np.ndarray:
    """Bytes that no other region, head or page has."""
    seed = hash((key.name, key.layer, key.head, page)) & 0xFFFFFFFF
    return np.random.default_rng(seed).integers(0, 256, length, dtype=np.uint8)


def slices(manifest: Manifest, page: int) -> list[tuple[RegionKey, slice]]:
    found = []
    for region in manifest.regions:
        per_head = region.bytes_per_page // region.num_heads
        for i, key in enumerate(region_keys(region)):
            start = region.offset + i * per_head + page * region.page_stride
            found.append((key, slice(start, start + per_head)))
    return found


def filled(manifest: Manifest) -> np.ndarray:
    memory = np.full(manifest.num_pages * 0 + memory_length(manifest) + manifest.row_padding, 0x11, dtype=np.uint8)
    for page in range(manifest.num_pages):
        for key, where in slices(manifest, page):
            memory[where] = content(key, page, where.stop - where.start)
    return memory


def carry_out(batch: ReadBatch, source: np.ndarray, local: np.ndarray, times: np.ndarray) -> None:
    for remote, to, length in zip(batch.remote, batch.local, batch.length, strict=True):
        assert 0 <= remote <= remote + length <= source.size
        assert 0 <= to <= to + length <= local.size
        local[to : to + length] = source[remote : remote + length]
        times[to : to + length] += 1


@given(
    st.sampled_from([(1, 1), (1, 4), (4, 1), (2, 4), (4, 2), (8, 1), (1, 8), (8, 4), (4, 8)]),
    st.booleans(),
    st.booleans(),
    st.sampled_from(["bfloat16", "float8_e4m3fn"]),
    st.integers(1, 3),
    st.data(),
)
@settings(max_examples=80)
def test_every_wanted_byte_arrives_once(ranks, rows_p, rows_d, kv_dtype, num_layers, data) -> None:
    kv = make_layout(num_layers, 1, 4, kv_dtype, kv_dtype, block_size=4, head_dim=8)
    prefill = [make_manifest(kv, r, ranks[0], 9, rows=rows_p) for r in range(ranks[0])]
    source_pages = data.draw(st.lists(st.integers(0, 8), unique=True, max_size=9))
    local_pages = data.draw(st.permutations(range(11)))[: len(source_pages)]
    cuts = sorted(data.draw(st.sets(st.integers(1, num_layers), max_size=3)))
    layers = [LayerRange(a, b) for a, b in zip([0, *cuts], [*cuts, None], strict=True)]
    sources = [filled(manifest) for manifest in prefill]
    rank = data.draw(st.integers(0, ranks[1] - 1))
    decode = make_manifest(kv, rank, ranks[1], 11, rows=rows_d)
    local = np.full(memory_length(decode) + decode.row_padding, UNTOUCHED, dtype=np.uint8)
    times = np.zeros(local.size, dtype=np.int64)
    plan = TransferPlan.between(prefill, decode)
    for group in layers:
        for source_rank, batch in plan.of_layers(group).reads(source_pages, local_pages, [0]).items():
            carry_out(batch, sources[source_rank], local, times)
    wanted = np.zeros(local.size, dtype=bool)
    for theirs, ours in zip(source_pages, local_pages, strict=True):
        for key, where in slices(decode, ours):
            assert np.array_equal(local[where], content(key, theirs, where.stop - where.start)), key
            assert (times[where] == 1).all()
            wanted[where] = True
    regions = np.zeros(local.size, dtype=bool)
    for page in range(decode.num_pages):
        for _, where in slices(decode, page):
            regions[where] = True
    assert not times[regions & ~wanted].any(), "a page that nobody asked for was written"
    if not (rows_p and rows_d) or (cuts and cuts[0] < num_layers):  # else a row goes whole, with its padding
        assert not times[~wanted].any(), "bytes between regions were written"


def test_a_page_of_rows_is_one_span_and_runs_merge() -> None:
    kv = make_layout(kv_dtype="float8_e4m3fn", index_dtype="float8_e4m3fn")
    manifest = make_manifest(kv, 0, 4, num_pages=100)
    plan = TransferPlan.between([manifest], manifest)
    assert (len(plan.pieces), plan.num_regions, plan.bytes_per_page) == (1, 297, 2_961_408)
    whole = plan.reads(range(10, 57), range(20, 67), [0])[0]
    assert whole.num_spans == 1
    scattered = plan.reads(range(0, 94, 2), range(1, 95, 2), [0])[0]
    assert scattered.num_spans == 47
    two_runs = plan.reads([1, 2, 3, 7, 8], [11, 12, 13, 14, 15], [0])[0]
    assert two_runs.num_spans == 2
    assert spans_without_merging(plan, 47) == 47 * 297


@pytest.mark.parametrize(("p", "d", "spans"), [(1, 1, 1), (1, 4, 2), (4, 1, 5), (2, 4, 2), (4, 2, 3)])
def test_other_rank_counts_cost_one_span_a_head_run_and_one_for_the_index(p: int, d: int, spans: int) -> None:
    kv = make_layout(kv_dtype="bfloat16")
    prefill = [make_manifest(kv, r, p) for r in range(p)]
    plan = TransferPlan.between(prefill, make_manifest(kv, d - 1, d))
    assert 1 <= len(plan.pieces) <= spans


def test_tensors_of_layers_merge_page_runs_of_each_tensor() -> None:
    kv = make_layout(num_layers=4, num_dense=1)
    manifest = make_manifest(kv, num_pages=50, rows=False)
    plan = TransferPlan.between([manifest], manifest)
    assert plan.reads(range(5, 15), range(5, 15), [0])[0].num_spans == 11
    assert plan.reads([5, 7], [5, 7], [0])[0].num_spans == 22


def test_replicated_keys_are_spread_over_the_ranks_of_prefill() -> None:
    kv = make_layout(num_layers=4, num_dense=1)
    prefill = [make_manifest(kv, r, 4) for r in range(4)]
    index_bytes = 3 * 128 * 128 * 2
    for rank in range(4):
        plan = TransferPlan.between(prefill, make_manifest(kv, rank, 4))
        assert {p.source_rank for p in plan.pieces} == {rank}
        assert plan.bytes_by_region["index_k"] == index_bytes


@pytest.mark.parametrize(("source", "local"), [([16], [0]), ([-1], [0]), ([0], [16]), ([0, 1], [0])])
def test_pages_outside_the_arenas_are_refused(source: list[int], local: list[int]) -> None:
    manifest = make_manifest(make_layout(num_layers=2))
    with pytest.raises(ValueError, match="page"):
        TransferPlan.between([manifest], manifest).reads(source, local, [0])


def test_nothing_wanted_is_nothing_read() -> None:
    manifest = make_manifest(make_layout(num_layers=2))
    assert TransferPlan.between([manifest], manifest).reads([], [], [0])[0].num_spans == 0


@pytest.mark.parametrize("kv_dtype", ["bfloat16", "float8_e4m3fn"])
@pytest.mark.parametrize(("p", "d"), list(itertools.product((1, 2, 4, 8), repeat=2)))
def test_a_page_takes_one_span_a_source_rank_and_one_for_the_index(p: int, d: int, kv_dtype: str) -> None:
    kv = make_layout(num_layers=4, num_dense=1, kv_dtype=kv_dtype)
    prefill = [make_manifest(kv, r, p) for r in range(p)]
    index_end = 3 * 128 * 128 * 2
    index_readers: dict[int, int] = {}
    for rank in range(d):
        decode = make_manifest(kv, rank, d)
        plan = TransferPlan.between(prefill, decode)
        heads = heads_of_rank(4, rank, d)
        needed = -(-len(heads) // len(heads_of_rank(4, 0, p)))
        assert len(plan.source_ranks) in (needed, needed + 1)  # one more where another rank serves the index
        assert len(plan.pieces) <= 1 + needed
        by_rank = Counter(piece.source_rank for piece in plan.pieces)
        assert max(by_rank.values()) <= 2, "one run of heads and one of index keys from a rank"
        index = [piece for piece in plan.pieces if piece.source_offset < index_end]
        assert len(index) == 1, "all index keys of a page come in one run"
        index_readers[index[0].source_rank] = index_readers.get(index[0].source_rank, 0) + 1
        spans = sum(b.num_spans for b in plan.reads([3, 1, 8], [5, 9, 2], [0]).values())
        assert spans <= 3 * (1 + needed)
    assert len(index_readers) == min(p, d), "the replicated index is spread over the ranks of prefill"
    assert max(index_readers.values()) - min(index_readers.values()) == 0


@pytest.mark.parametrize(("p", "d"), [(1, 1), (1, 4), (4, 1), (2, 4)])
def test_a_layer_group_of_a_row_is_one_span_a_head_and_one_for_the_index(p: int, d: int) -> None:
    kv = make_layout(num_layers=8, num_dense=1)
    prefill = [make_manifest(kv, r, p) for r in range(p)]
    plan = TransferPlan.between(prefill, make_manifest(kv, 0, d))
    assert plan.of_layers(ALL_LAYERS) is plan
    groups = [plan.of_layers(layers) for layers in (LayerRange(0, 3), LayerRange(3, 6), LayerRange(6))]
    assert {len(group.pieces) for group in groups} == {1 + 4 // d}
    assert sum(group.bytes_per_page for group in groups) == plan.bytes_per_page
    assert sum(group.num_regions for group in groups) == plan.num_regions
    assert plan.of_layers(LayerRange(8)).reads([1], [1], [0]) == {}
