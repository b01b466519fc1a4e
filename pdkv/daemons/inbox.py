"""Messages of other threads for one thread, which sleeps until there is one, or for so long."""

import contextlib
import threading
from collections import deque
from typing import Generic, TypeVar

Message = TypeVar("Message")


class Inbox(Generic[Message]):
    """``put`` may be called from any thread, ``take`` from the owner's.

    Not ``queue.SimpleQueue``: where its ``get`` is kept from the processor until its timeout has passed, before it has
    begun to wait, it waits for ever (CPython 3.11: what is left is below zero, which its locks take for no limit). On a
    busy machine that happens to a wait of a millisecond once in thousands.
    """

    def __init__(self) -> None:
        self._messages: deque[Message] = deque()
        self._bell = threading.Lock()
        """Held until something has come."""
        self._bell.acquire()

    def put(self, message: Message) -> None:
        self._messages.append(message)
        with contextlib.suppress(RuntimeError):  # it has rung already
            self._bell.release()

    def take(self, longest_wait_s: float) -> list[Message]:
        """All that has come, in order. Waits while that is nothing, and may come back early with nothing."""
        if not self._messages and longest_wait_s > 0:
            self._bell.acquire(timeout=longest_wait_s)
        taken = []
        while self._messages:
            taken.append(self._messages.popleft())
        return taken
