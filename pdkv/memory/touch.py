"""Touching pages of host memory before a transfer needs them: the kernel zeroes each page at its first touch.

A read into memory that nobody has touched waits for the kernel at every 4 KiB, which takes several times as long as the
copy itself.
"""

import ctypes
import errno
import logging
import os
import threading

from pdkv.memory.arena import Arena

log = logging.getLogger("pdkv.memory.touch")

_POPULATE_WRITE = 23
"""MADV_POPULATE_WRITE: what a write would do, without one. Linux 5.14."""

_STEP = 4 << 20

MOST_BYTES = 2 << 30
"""Most that is touched ahead. What lies beyond is taken from the machine only when requests need it."""


def touch_ahead(arena: Arena, most_bytes: int = MOST_BYTES) -> threading.Thread:
    """Touch the arena's first bytes on a thread of low priority, whose end is the end of that. Bytes do not change, so
    anybody may use the arena meanwhile. Only for memory of the host."""
    thread = threading.Thread(target=_touch, args=(arena, most_bytes), name="pdkv-touch", daemon=True)
    thread.start()
    return thread


def _touch(arena: Arena, most_bytes: int) -> None:
    madvise = ctypes.CDLL(None, use_errno=True).madvise  # does not hold the GIL
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
    memory = arena.memory  # the arena, and so its memory, stays as long as this runs
    end = min(memory.length, most_bytes)
    for start in range(0, end, _STEP):
        if madvise(memory.address + start, min(_STEP, end - start), _POPULATE_WRITE) != 0:
            told = errno.errorcode.get(ctypes.get_errno(), "an error")
            log.info(f"touched {start:,} bytes of the arena ahead, and no more: {told}")
            return
