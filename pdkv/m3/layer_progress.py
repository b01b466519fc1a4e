"""Tells that the first layers of a prompt are in its pages while a step still computes the later ones.

Only of steps that end a prompt: what is told of an earlier chunk is read while the next one computes, and whole rows
are fewer spans than layers of them.
"""

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from pdkv.m3.requests import RequestId
from pdkv.m3.run import Run

_LOG = logging.getLogger("pdkv.engine")

_WORTH_GROUPS = 256
"""Tokens in the step from which a prompt's layers are told of in groups: of fewer the state is on its way in no time,
and each word costs both sides more than it hides."""

OnStored = Callable[[int], None]
"""Called by a model with the number of leading layers whose state every rank has written, or queued on its stream."""

TellGroups = Callable[[RequestId, int, int], None]
"""Request, prompt tokens, layer groups: the pages hold that many tokens of the first so many groups. Called from any
thread; it must only queue."""


def group_starts(num_layers: int, num_groups: int) -> tuple[int, ...]:
    """The first layer of each group. The last groups are smaller, for what they hold is exposed at the end: each is
    smaller than the one before by the same number of layers, as nearly as whole layers allow."""
    count = max(1, min(num_groups, num_layers))
    total = count * (count + 1) // 2
    starts = [0]
    for group in range(1, count):
        before = sum(range(count - group + 1, count + 1))
        wish = round(num_layers * before / total)
        starts.append(max(starts[-1] + 1, min(wish, num_layers - (count - group))))
    return tuple(starts)


class LayerProgress:
    """Follows the steps of rank 0 on one device. Used from the engine thread; ``tell`` is called from there on a CPU,
    and on a GPU from a thread of its own that sleeps until the kernels before have ended: nothing waits for it."""

    def __init__(self, starts: Sequence[int], num_layers: int, device: torch.device, tell: TellGroups) -> None:
        """``starts``: the first layer of each group."""
        self._groups_at = {stop: group + 1 for group, stop in enumerate([*starts[1:], num_layers])}
        self._device = device
        self._tell = tell
        self._waiter = ThreadPoolExecutor(1, "pdkv-layers") if device.type == "cuda" else None

    def of(self, runs: Sequence[Run]) -> OnStored | None:
        """What a model is to call in the step of ``runs``; None where nobody waits for its layers."""
        ending = [run for run in runs if run.num_choices]
        if not ending:
            return None
        all_ends = [(run.id, run.end) for run in ending]
        long_ends = [(run.id, run.end) for run in ending if len(run.tokens) >= _WORTH_GROUPS]

        def stored(num_layers: int) -> None:
            groups = self._groups_at.get(num_layers)
            if groups is not None:
                self._when_written(all_ends if groups == len(self._groups_at) else long_ends, groups)

        return stored

    def _when_written(self, ends: Sequence[tuple[RequestId, int]], groups: int) -> None:
        if not ends:
            return
        if self._waiter is None:
            self._tell_all(ends, groups)
            return
        # A wait that sleeps: the core is the engine's.
        event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        self._waiter.submit(self._tell_after, event, ends, groups)

    def _tell_after(self, event: torch.cuda.Event, ends: Sequence[tuple[RequestId, int]], groups: int) -> None:
        try:
            event.synchronize()
        except RuntimeError:  # the step fails of the same cause, in the thread that can say so
            _LOG.exception("layers of a step are not told of")
            return
        self._tell_all(ends, groups)

    def _tell_all(self, ends: Sequence[tuple[RequestId, int]], groups: int) -> None:
        for request, tokens in ends:
            self._tell(request, tokens, groups)
