"""Finds stop strings in a text that comes in pieces, and holds back what may yet become one."""

from collections.abc import Sequence


class StopScanner:
    """Text in, text that may be shown out; owned by one choice.

    A stop string may begin in one piece and end in another. The end of the text that is the beginning of a stop string
    is therefore held back until it is clear what it becomes. The first piece that completes a stop string ends the
    text; of several in it the one that begins first counts.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.found = False

    def push(self, piece: str) -> str:
        """What may be shown by now; "" for ever once a stop string was found."""
        if self.found:
            return ""
        text = self._held + piece
        starts = [start for stop in self._stops if (start := text.find(stop)) >= 0]
        if starts:
            self.found, self._held = True, ""
            return text[: min(starts)]
        shown = len(text) - self._num_open(text)
        self._held = text[shown:]
        return text[:shown]

    def finish(self) -> str:
        """What was held back for nothing."""
        rest, self._held = self._held, ""
        return rest

    @property
    def num_held(self) -> int:
        return len(self._held)

    def _num_open(self, text: str) -> int:
        """Length of the longest end of ``text`` with which a stop string begins."""
        longest = 0
        for stop in self._stops:
            for size in range(min(len(stop) - 1, len(text)), longest, -1):
                if text.endswith(stop[:size]):
                    longest = size
                    break
        return longest
