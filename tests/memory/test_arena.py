"""Rows: views never overlap, cover the row, lie where the design says, and shards of a row are contiguous."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pdkv.errors import ConfigError
from pdkv.memory.arena import Arena
from pdkv.memory.manifest import build_manifest
from pdkv.memory.row import RowLayout, heads_of_rank
from pdkv.schema import Shard
from tests.layouts import make_layout

layouts = st.builds(
    make_layout,
    num_layers=st.integers(1, 6),
    num_dense=st.integers(0, 7),
    num_kv_heads=st.sampled_from([1, 2, 4]),
    kv_dtype=st.sampled_from(["float32", "bfloat16", "float8_e4m3fn"]),
    index_dtype=st.sampled_from(["float32", "bfloat16", "float8_e4m3fn"]),
    head_dim=st.sampled_from([16, 128]),
)


@pytest.mark.parametrize(
    ("tp_size", "kv_dtype", "index_dtype", "num_bytes"),
    [
        (1, "bfloat16", "bfloat16", 137_472 * 128),
        (4, "bfloat16", "bfloat16", 5_799_936),
        (4, "float8_e4m3fn", "float8_e4m3fn", 2_961_408),
        (1, "float8_e4m3fn", "float8_e4m3fn", 9_043_968),
        (8, "float8_e4m3fn", "float8_e4m3fn", 2_961_408),
        (4, "float8_e4m3fn", "bfloat16", 30_432 * 128),
    ],
)
def test_row_of_the_released_model_has_the_published_size(
    tp_size: int, kv_dtype: str, index_dtype: str, num_bytes: int
) -> None:
    layout = RowLayout.of(make_layout(kv_dtype=kv_dtype, index_dtype=index_dtype), tp_size - 1, tp_size)
    assert layout.num_bytes == num_bytes
    assert layout.pitch % 512 == 0
    assert 0 <= layout.pitch - num_bytes < 512


def test_index_keys_come_first_and_dense_layers_first_inside_each_head() -> None:
    layout = RowLayout.of(make_layout(kv_dtype="float8_e4m3fn", index_dtype="float8_e4m3fn"), 0, 4)
    assert [s.spec.layer for s in layout.slots[:57]] == list(range(3, 60))
    assert layout.slots[57].offset == 933_888
    assert [(s.spec.name, s.spec.layer) for s in layout.slots[57:62]] == [
        ("k", 0),
        ("v", 0),
        ("k_scale", 0),
        ("v_scale", 0),
        ("k", 1),
    ]


@given(layouts, st.sampled_from([1, 2, 4, 8]), st.integers(0, 7))
@settings(max_examples=40)
def test_views_cover_every_byte_of_every_row_once(kv, tp_size: int, rank: int) -> None:
    layout = RowLayout.of(kv, rank % tp_size, tp_size)
    arena = Arena(layout, torch.zeros(3 * layout.pitch, dtype=torch.uint8))
    for slot in layout.slots:
        for page in range(arena.num_pages):
            arena.page_bytes(slot.spec.name, slot.spec.layer, slot.head, page).add_(1)
    rows = arena.rows()
    assert bool((rows[:, : layout.num_bytes] == 1).all())
    assert bool((rows[:, layout.num_bytes :] == 0).all())


@given(layouts, st.sampled_from([1, 2, 4, 8]), st.data())
@settings(max_examples=30)
def test_a_view_writes_exactly_its_regions_bytes(kv, tp_size: int, data: st.DataObject) -> None:
    layout = RowLayout.of(kv, 0, tp_size)
    arena = Arena(layout, torch.zeros(2 * layout.pitch, dtype=torch.uint8))
    slot = data.draw(st.sampled_from(layout.slots))
    view = arena.view(slot.spec.name, slot.spec.layer)
    target = view[1, slot.head - layout.heads.start] if slot.spec.shard is Shard.BY_HEAD else view[1]
    target.copy_(torch.full(target.shape, 3.0).to(target.dtype))
    changed = arena._storage.nonzero().flatten()
    start = layout.pitch + slot.offset
    assert start <= int(changed.min())
    assert int(changed.max()) < start + slot.num_bytes
    region = next(
        r for r in arena.regions() if (r.name, r.layer, r.head_start) == (slot.spec.name, slot.spec.layer, slot.head)
    )
    assert region.offset == target.data_ptr() - arena.memory.address - layout.pitch
    assert region.bytes_per_page == target.numel() * target.element_size()


@given(layouts, st.sampled_from([1, 2, 4]))
@settings(max_examples=40)
def test_a_shard_is_a_contiguous_piece_of_the_whole_row(kv, tp_size: int) -> None:
    if kv.num_kv_heads % tp_size:
        return
    whole = RowLayout.of(kv)
    for rank in range(tp_size):
        mine = [s for s in RowLayout.of(kv, rank, tp_size).slots if s.spec.shard is Shard.BY_HEAD]
        theirs = [
            s
            for s in whole.slots
            if s.spec.shard is Shard.BY_HEAD and s.head in heads_of_rank(kv.num_kv_heads, rank, tp_size)
        ]
        assert [s.offset - mine[0].offset for s in mine] == [s.offset - theirs[0].offset for s in theirs]
        ends = [s.offset + s.num_bytes for s in theirs]
        assert [s.offset for s in theirs[1:]] == ends[:-1]


def test_ranks_beyond_the_heads_share_them() -> None:
    assert [heads_of_rank(4, r, 8).start for r in range(8)] == [0, 0, 1, 1, 2, 2, 3, 3]


@pytest.mark.parametrize(("rank", "size"), [(0, 3), (4, 4), (0, 6)])
def test_ranks_that_do_not_divide_are_refused(rank: int, size: int) -> None:
    with pytest.raises(ConfigError):
        heads_of_rank(4, rank, size)


def test_a_worker_without_one_index_region_does_not_start() -> None:
    kv = make_layout(num_layers=3, num_dense=1)
    held = type(kv)(
        **{f: getattr(kv, f) for f in kv.__struct_fields__}
        | {"specs": tuple(s for s in kv.specs if (s.name, s.layer) != ("index_k", 2))}
    )
    layout = RowLayout.of(held)
    arena = Arena(layout, torch.zeros(layout.pitch, dtype=torch.uint8))
    with pytest.raises(ConfigError, match="index_k of layer 2"):
        build_manifest(arena, kv, "f")


def test_allocated_arenas_are_zeroed_and_shared() -> None:
    layout = RowLayout.of(make_layout(num_layers=2, num_dense=1))
    arena = Arena.allocate(layout, 3)
    assert arena.memory.length == 3 * layout.pitch
    assert arena.view("k", 0).shape == (3, 4, 128, 128)
    assert not bool(arena.view("index_k", 1).any())
    with pytest.raises(KeyError):
        arena.view("index_k", 0)
