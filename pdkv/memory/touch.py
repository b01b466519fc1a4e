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

_STEP = 256 << 10
"""Some 0.1 ms: whoever wants to map or unmap memory meanwhile waits for it, at whatever priority this runs."""

MOST_BYTES = 2 << 30
"""Most that is touched ahead. What lies beyond is taken from the machine only when requests need it."""


class TouchAhead:
    """Touches an arena's first bytes on a thread of low priority. Bytes do not change, so anybody may use the arena
    meanwhile. Only for memory of the host. Whoever made it stops it before the process ends: the last thread of a
    process gives its memory back, and at this priority that takes seconds where cores are busy.
    """

    def __init__(self, arena: Arena, most_bytes: int = MOST_BYTES) -> None:
        self._arena = arena  # and so its memory, which stays as long as the thread runs
        self._most_bytes = most_bytes
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._touch, name="pdkv-touch", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Until all is touched that may be."""
        self._thread.join()

    def stop(self) -> None:
        """Touch no more; returns when the thread has ended. Idempotent."""
        self._stopping.set()
        self._thread.join()

    def _touch(self) -> None:
        madvise = ctypes.CDLL(None, use_errno=True).madvise  # does not hold the GIL
        madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
        memory = self._arena.memory
        end = min(memory.length, self._most_bytes)
        for start in range(0, end, _STEP):
            if self._stopping.is_set():
                return
            if madvise(memory.address + start, min(_STEP, end - start), _POPULATE_WRITE) != 0:
                told = errno.errorcode.get(ctypes.get_errno(), "an error")
                log.info(f"touched {start:,} bytes of the arena ahead, and no more: {told}")
                return
