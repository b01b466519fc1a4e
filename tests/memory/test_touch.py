"""Memory of the host that is touched before a transfer needs it."""

import os
import threading

import pytest

from pdkv.memory.arena import Arena
from pdkv.memory.row import RowLayout
from pdkv.memory.touch import TouchAhead
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
    TouchAhead(arena).wait()
    assert held_bytes(arena) >= arena.memory.length
    assert (arena.rows()[0] == 7).all()
    assert not arena.rows()[1:].any()


def test_takes_no_more_than_it_may(arena: Arena) -> None:
    TouchAhead(arena, most_bytes=1 << 20).wait()
    assert held_bytes(arena) == 1 << 20


def test_stops_when_told_to(arena: Arena) -> None:
    touching = TouchAhead(arena)
    touching.stop()
    held = held_bytes(arena)
    touching.stop()
    assert held_bytes(arena) == held, "nobody touches on behind the end"
    assert "pdkv-touch" not in {thread.name for thread in threading.enumerate()}
