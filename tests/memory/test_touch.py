"""Memory of the host that is touched before a transfer needs it."""

import os

import pytest

from pdkv.memory.arena import Arena
from pdkv.memory.row import RowLayout
from pdkv.memory.touch import touch_ahead
from tests.layouts import make_layout


def held_bytes(arena: Arena) -> int:
    """What the kernel has really given to the arena's memfd."""
    return os.fstat(arena.memory.memfd).st_blocks * 512


@pytest.fixture
def arena() -> Arena:
    layout = RowLayout.of(make_layout(num_layers=4, num_dense=1, num_kv_heads=2))
    return Arena.allocate(layout, -(-(9 << 20) // layout.pitch))


def test_touches_all_and_changes_nothing(arena: Arena) -> None:
    assert held_bytes(arena) == 0
    arena.rows()[0] = 7
    touch_ahead(arena).join()
    assert held_bytes(arena) >= arena.memory.length
    assert (arena.rows()[0] == 7).all()
    assert not arena.rows()[1:].any()


def test_takes_no_more_than_it_may(arena: Arena) -> None:
    touch_ahead(arena, most_bytes=1 << 20).join()
    assert held_bytes(arena) == 1 << 20
