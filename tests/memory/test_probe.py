"""The probe's pattern catches every way in which a page can be the wrong one."""

import torch

from pdkv.memory.arena import Arena
from pdkv.memory.probe import ProbePages, pattern
from pdkv.memory.row import RowLayout
from pdkv.schema import Incarnation, RegionKey
from tests.layouts import make_layout

P = Incarnation(7)


def make_arena() -> Arena:
    return Arena.allocate(RowLayout.of(make_layout(num_layers=3, num_dense=1, head_dim=16)), 5)


def copy_pages(source: Arena, target: Arena, pages: dict[int, int]) -> None:
    pitch = source.layout.pitch
    for src, dst in pages.items():
        target._storage[dst * pitch : (dst + 1) * pitch] = source._storage[src * pitch : (src + 1) * pitch]


def test_a_true_copy_passes() -> None:
    p, d = make_arena(), make_arena()
    source, target = ProbePages(p), ProbePages(d)
    source.fill(P)
    target.poison()
    copy_pages(p, d, {0: 4, 4: 0})
    assert target.mismatches(P, 0, 4) == []
    assert target.mismatches(P, 4, 0) == []


def test_another_life_another_page_and_nothing_at_all_fail() -> None:
    p, d = make_arena(), make_arena()
    ProbePages(p).fill(P)
    target = ProbePages(d)
    target.poison()
    assert len(target.mismatches(P, 0, 4)) == len(list(d.regions()))
    copy_pages(p, d, {0: 4})
    assert len(target.mismatches(Incarnation(8), 0, 4)) == len(list(d.regions()))
    assert len(target.mismatches(P, 4, 4)) == len(list(d.regions()))


def test_one_wrong_byte_names_its_region() -> None:
    p, d = make_arena(), make_arena()
    ProbePages(p).fill(P)
    copy_pages(p, d, {0: 4})
    d.page_bytes("index_k", 2, 0, 4)[-1] ^= 1
    assert ProbePages(d).mismatches(P, 0, 4) == [RegionKey("index_k", 2, 0)]


def test_swapped_regions_are_seen() -> None:
    p, d = make_arena(), make_arena()
    ProbePages(p).fill(P)
    copy_pages(p, d, {0: 4})
    one, two = d.page_bytes("k", 1, 0, 4), d.page_bytes("k", 2, 0, 4)
    saved = one.clone()
    one.copy_(two)
    two.copy_(saved)
    assert ProbePages(d).mismatches(P, 0, 4) == [RegionKey("k", 1, 0), RegionKey("k", 2, 0)]


def test_pattern_is_a_fixed_function() -> None:
    key = RegionKey("k", 3, 1)
    assert torch.equal(torch.from_numpy(pattern(P, 0, key, 24)), torch.from_numpy(pattern(P, 0, key, 32))[:24])
    assert bytes(pattern(P, 0, key, 8)).hex() == "7d47a22771e25c37"  # peers of other versions must agree
