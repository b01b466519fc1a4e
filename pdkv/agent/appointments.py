"""When whom to wake: the next time of many, without looking at all of them."""

from collections.abc import Hashable
from heapq import heappop, heappush
from itertools import count
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)


class Appointments(Generic[Key]):
    """At most one time for each key. Owned by one thread.

    What costs is what is due: sessions that have ended stay for minutes, and there may be thousands of them.
    """

    def __init__(self) -> None:
        self._when: dict[Key, float] = {}
        self._heap: list[tuple[float, int, Key]] = []
        """Holds every time that counts, and some that do not any more."""
        self._order = count()

    def set(self, key: Key, when: float | None) -> None:
        """Instead of any earlier one; None = never."""
        if when is None:
            self._when.pop(key, None)
        elif self._when.get(key) != when:
            self._when[key] = when
            heappush(self._heap, (when, next(self._order), key))

    def take_due(self, now: float) -> list[Key]:
        """Whose time has come, earliest first, each once: their appointments are over."""
        due = []
        while self._heap and self._heap[0][0] <= now:
            when, _, key = heappop(self._heap)
            if self._when.get(key) == when:
                del self._when[key]
                due.append(key)
        return due

    def next_time(self) -> float | None:
        while self._heap and self._when.get(self._heap[0][2]) != self._heap[0][0]:
            heappop(self._heap)
        return self._heap[0][0] if self._heap else None
