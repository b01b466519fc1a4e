"""A draft model's cache is more regions of the same kinds, under layer ids behind the model's own."""

import msgspec
import pytest
import torch

from pdkv.core.manifest import differences, pairing_digest
from pdkv.core.plan import TransferPlan
from pdkv.errors import ConfigError
from pdkv.memory.arena import Arena
from pdkv.memory.manifest import build_manifest
from pdkv.memory.probe import ProbePages
from pdkv.memory.row import RowLayout
from pdkv.schema import Incarnation, KvLayout, RegionKey, RegionSpec, Shard
from tests.layouts import make_layout

TARGET = make_layout(num_layers=3, num_dense=1, num_kv_heads=2, kv_dtype="float32", index_dtype="float32", head_dim=16)
DRAFT_LAYER = 3


def with_draft(layout: KvLayout) -> KvLayout:
    """One dense draft layer, with as many kv heads as the model but a smaller head."""
    own = tuple(RegionSpec(name, DRAFT_LAYER, Shard.BY_HEAD, 2, 8, "float32", 4) for name in ("k", "v"))
    return msgspec.structs.replace(layout, specs=layout.specs + own)


def copy(source: Arena, target: Arena, pages: list[int], into: list[int], plan: TransferPlan) -> None:
    """What the reads of a plan do, byte by byte."""
    for batch in plan.reads(pages, into, (0,)).values():
        ours, theirs = target.rows().view(-1), source.rows().view(-1)
        for span in range(batch.num_spans):
            remote, local, length = int(batch.remote[span]), int(batch.local[span]), int(batch.length[span])
            ours[local : local + length] = theirs[remote : remote + length]


@pytest.mark.parametrize(("prefill_tp", "decode_tp"), [(1, 1), (1, 2), (2, 1)])
def test_a_draft_layer_is_announced_planned_moved_and_probed(prefill_tp: int, decode_tp: int) -> None:
    layout = with_draft(TARGET)
    sources = [Arena.allocate(RowLayout.of(layout, rank, prefill_tp), 6) for rank in range(prefill_tp)]
    targets = [Arena.allocate(RowLayout.of(layout, rank, decode_tp), 9) for rank in range(decode_tp)]
    theirs = [build_manifest(arena, layout, "model") for arena in sources]
    ours = [build_manifest(arena, layout, "model") for arena in targets]
    assert differences(theirs, ours) == ()
    incarnation = Incarnation(1 << 60)
    for arena in sources:
        ProbePages(arena).fill(incarnation)
        arena.rows()[2].random_(0, 256)
    for arena, manifest in zip(targets, ours, strict=True):
        probe = ProbePages(arena)
        probe.poison()
        plan = TransferPlan.between(theirs, manifest)
        for rank, source in enumerate(sources):
            copy(source, arena, [0, 5, 2], [8, 0, 4], _only(plan, rank))
        assert probe.mismatches(incarnation, 0, 8) == probe.mismatches(incarnation, 5, 0) == []
        arena.page_bytes("v", DRAFT_LAYER, arena.layout.heads[0], 8)[-1] ^= 1
        assert probe.mismatches(incarnation, 0, 8) == [RegionKey("v", DRAFT_LAYER, arena.layout.heads[0])]
        for head in arena.layout.heads:
            holder = next(source for source in sources if head in source.layout.heads)
            for name in ("k", "v"):
                found = arena.page_bytes(name, DRAFT_LAYER, head, 4)
                assert torch.equal(found, holder.page_bytes(name, DRAFT_LAYER, head, 2))
        assert arena.view("k", DRAFT_LAYER).shape == (9, len(arena.layout.heads), 128, 8)


def test_workers_of_which_one_has_no_draft_layer_are_not_paired() -> None:
    plain, drafting = ([build_manifest(_arena(kv), kv, "model")] for kv in (TARGET, with_draft(TARGET)))
    assert pairing_digest(plain) != pairing_digest(drafting)
    messages = [difference.message for difference in differences(plain, drafting)]
    assert messages == [f"decode needs {name} for layer 3; prefill offers none" for name in ("k", "v")]
    with pytest.raises(ConfigError, match="k of layer 3, v of layer 3"):
        build_manifest(_arena(TARGET), with_draft(TARGET), "model")


def _arena(layout: KvLayout) -> Arena:
    return Arena.allocate(RowLayout.of(layout), 4)


def _only(plan: TransferPlan, rank: int) -> TransferPlan:
    """Those pieces that one rank of the source serves."""
    pieces = tuple(piece for piece in plan.pieces if piece.source_rank == rank)
    return msgspec.structs.replace(plan, pieces=pieces)
