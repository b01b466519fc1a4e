"""Prompt lookup: what followed the last tokens when they stood in the sequence before is proposed to follow again."""

from collections.abc import Sequence

_SHORTEST = 2
"""Tokens that must agree before anything is proposed."""
_LONGEST = 32
"""Longer agreements count as equally long: the latest of them wins."""
_PLACES = 16
"""Latest places that are compared, so that a text of one repeated token costs no more than another."""


class PromptLookup:
    """Where each pair of tokens stood in one sequence. Owned by its sequence."""

    def __init__(self) -> None:
        self._ends: dict[tuple[int, ...], list[int]] = {}
        """By the last ``_SHORTEST`` tokens: indices of what followed them, ascending."""
        self._num_known = _SHORTEST

    def propose(self, tokens: Sequence[int], count: int) -> tuple[int, ...]:
        """Up to ``count`` tokens that may follow ``tokens``, which may have grown at their end since the last call.

        They are what followed the longest suffix that has stood there before, the latest of equals; where the sequence
        ends before ``count`` of them, it is taken to repeat itself.
        """
        self._learn(tokens)
        if count < 1 or len(tokens) <= _SHORTEST:
            return ()
        places = self._ends.get(tuple(tokens[-_SHORTEST:]), [])[-_PLACES:]
        best = max(places, key=lambda end: (_agreement(tokens, end), end), default=None)
        if best is None:
            return ()
        period = len(tokens) - best
        return tuple(tokens[best + i % period] for i in range(count))

    def _learn(self, tokens: Sequence[int]) -> None:
        for end in range(self._num_known, len(tokens)):
            self._ends.setdefault(tuple(tokens[end - _SHORTEST : end]), []).append(end)
        self._num_known = max(self._num_known, len(tokens))


def _agreement(tokens: Sequence[int], end: int) -> int:
    """How many tokens before ``end`` are also the last of all."""
    length = _SHORTEST
    while length < min(end, _LONGEST) and tokens[end - 1 - length] == tokens[-1 - length]:
        length += 1
    return length
