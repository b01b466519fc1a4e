"""Choosing tokens where the logits are: by kernels on a GPU, by their references elsewhere, and no wait in between."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from pdkv_kernels.decode_rows_ref import RowBuffers, RowInputs, begin_rows_ref, end_rows_ref, retell_rows_ref
from pdkv_kernels.draw_ref import draw_ref
from pdkv_kernels.greedy_ref import greedy_ref
from torch import Tensor

from pdkv.m3.logprobs import MAX_TOP, Tops
from pdkv.m3.sampling import Choices, SamplingParams


class Choice(NamedTuple):
    """A token to choose."""

    sampling: SamplingParams
    position: int
    """Where it will stand."""
    num_top: int


class ChoosingKernels(Protocol):
    """What begins and ends a step: of ``decode_rows``, ``greedy`` and ``draw``, or their references."""

    def begin(self, buffers: RowBuffers, batch: int, query_len: int, /) -> RowInputs: ...

    def choose(self, out: Tensor, logits: Tensor, /) -> None: ...

    def end(self, buffers: RowBuffers, chosen: Tensor, batch: int, query_len: int, /) -> None: ...

    def draw(self, chosen: Tensor, tops: Tensor, logits: Tensor, asked: Tensor, positions: Tensor, /) -> None: ...

    def retell(self, buffers: RowBuffers, chosen: Tensor, tops: Tensor, asked: Tensor, /) -> None: ...


class _References:
    begin, choose, end = staticmethod(begin_rows_ref), staticmethod(greedy_ref), staticmethod(end_rows_ref)
    draw, retell = staticmethod(draw_ref), staticmethod(retell_rows_ref)


def kernels_for(device: torch.device) -> ChoosingKernels:
    """The kernels on a GPU, else the references."""
    if device.type != "cuda":
        return _References()
    # They need Triton, which a CPU goes without.
    from pdkv_kernels.decode_rows import begin_rows, end_rows, retell_rows  # noqa: PLC0415
    from pdkv_kernels.draw import draw as draw_tokens  # noqa: PLC0415
    from pdkv_kernels.greedy import greedy  # noqa: PLC0415

    class Kernels:
        begin, choose, end = staticmethod(begin_rows), staticmethod(greedy), staticmethod(end_rows)
        draw, retell = staticmethod(draw_tokens), staticmethod(retell_rows)

    return Kernels()


class Chooser:
    """Tokens behind rows of logits that come some at a time, read all at once. Owned by one step."""

    def __init__(self, choices: Sequence[Choice], device: torch.device) -> None:
        self._kernels = kernels_for(device)
        self._counts = [min(choice.num_top, MAX_TOP) for choice in choices]
        self._asked = torch.tensor([choice.sampling.words(choice.num_top) for choice in choices]).to(device)
        self._positions = torch.tensor([choice.position - 1 for choice in choices]).to(device)
        self._chosen = torch.empty(3, len(choices), dtype=torch.int64, device=device)
        self._tops = torch.zeros(len(choices), 2, MAX_TOP, dtype=torch.int64, device=device)
        self._num_done = 0

    def choose(self, logits: Tensor) -> None:
        """Behind the next rows: [num_rows, vocab]."""
        few = slice(self._num_done, self._num_done + logits.shape[0])
        self._num_done = few.stop
        self._counts[few] = [min(count, logits.shape[1]) for count in self._counts[few]]
        chosen = self._chosen[:, few]
        self._kernels.choose(chosen, logits)
        self._kernels.draw(chosen, self._tops[few], logits, self._asked[few], self._positions[few])

    def wait(self) -> Choices:
        """All that has been chosen. The one wait for the device."""
        counts = np.array(self._counts, dtype=np.int64)
        _, tokens, logprobs = self._chosen.cpu().numpy()
        tops = Tops(counts, self._tops.cpu().numpy()) if counts.any() else None
        return Choices(tokens, logprobs.view(np.float64), tops)
