"""Decode steps in fixed shapes on a GPU: captured once as CUDA graphs, replayed with whatever the buffers hold.

A step takes one copy to the device (numbers of sequences, their new tokens), one for each sequence that joins (its page
table), one replay, and one copy back (tokens, log-probabilities). Everything else a step needs is computed on the
device, in the graph. The next step may be launched before anybody has read this one's tokens: it takes them from the
device.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pdkv.m3.attention import KvViews, StepBatch
from pdkv.m3.decode_rows import BEHIND, END, START, TOKENS, DecodeRows, Numbers, Rows
from pdkv.m3.model import M3Model
from pdkv.m3.requests import EngineSettings
from pdkv.m3.run import Onward, Run
from pdkv.m3.sampling import GreedyChoices

MAX_QUERY_LEN = 8
_ROWS_AT_ONCE = 64
"""Rows of logits held at once inside a step."""

_EMPTY = [0, 0, -1] + [0] * MAX_QUERY_LEN
"""What the row of no sequence says: nothing before it, nothing of it stored."""

MaybeDecodes = Sequence[Run] | Onward


@dataclass(frozen=True)
class DecodeShapes:
    """The shapes in which decode steps run; a batch takes the next larger one, filled up with empty sequences."""

    batch_sizes: tuple[int, ...]
    """Ascending."""
    query_lens: tuple[int, ...]
    """Rows of each sequence, ascending: 1, and 1 + the proposals of speculation."""
    max_blocks: int
    """Columns of the page table."""

    @classmethod
    def of(cls, settings: EngineSettings, block_size: int, num_pages: int) -> "DecodeShapes":
        """Powers of two up to 8, then every eighth, so that little more than an eighth is ever padding."""
        most = settings.max_batch
        sizes = {n for n in (1, 2, 4, *range(8, most, 8)) if n < most} | {most}
        query_lens = {1, min(1 + settings.speculative_tokens, MAX_QUERY_LEN)}
        blocks = min(-(-settings.max_model_len // block_size), num_pages)
        return cls(tuple(sorted(sizes)), tuple(sorted(query_lens)), blocks)


class _Step(NamedTuple):
    told: Tensor  # float64 [batch * query_len, 3]: token, log-probability, 1 where all logits are finite
    hidden: Tensor  # [batch * query_len, hidden], as lm_head takes it


class _Side:
    """What the host writes for a step and reads of it. There are two: one is written while the other is copied."""

    def __init__(self, shapes: "DecodeShapes", device: torch.device) -> None:
        most, longest = shapes.batch_sizes[-1], shapes.query_lens[-1]
        # Pinned, or a copy would wait for the device and be no part of the stream's order.
        on_gpu = device.type == "cuda"
        self.numbers = torch.zeros(most, TOKENS + longest, dtype=torch.int32, pin_memory=on_gpu)
        self.tables = torch.zeros(most, shapes.max_blocks, dtype=torch.int32, pin_memory=on_gpu)
        self.told = torch.zeros(most * longest, 3, dtype=torch.float64, pin_memory=on_gpu)
        self.rows: Numbers = self.numbers.numpy()
        self.table_rows: Numbers = self.tables.numpy()
        self.told_rows: np.ndarray[tuple[int, int], np.dtype[np.float64]] = self.told.numpy()
        self.numbers_of = {batch: self.numbers[:batch] for batch in shapes.batch_sizes}
        self.told_of = {n: self.told[:n] for n in {b * q for b in shapes.batch_sizes for q in shapes.query_lens}}
        self.ended = torch.cuda.Event() if on_gpu else None  # type: ignore[no-untyped-call]
        self.is_in_use = False


class DecodeInFlight:
    """A step that the device may still be at. Owned by the engine thread."""

    def __init__(self, side: _Side, step: _Step, rows: Rows) -> None:
        """``rows``: of ``step``, one for each token of each run, in order."""
        self._side = side
        self._step = step
        self._rows = rows

    def wait(self) -> GreedyChoices:
        """The choice behind each token of each run, in order. Called once; when it returns, the step's writes into the
        cache are done."""
        side = self._side
        if side.ended is not None:
            side.ended.synchronize()
        told = side.told_rows[self._rows]  # a copy
        side.is_in_use = False
        damaged = frozenset[int]() if told[:, 2].all() else frozenset(np.flatnonzero(told[:, 2] == 0).tolist())
        return GreedyChoices(told[:, 0].astype(np.int64).tolist(), told[:, 1].tolist(), damaged)

    def hidden(self, which: Sequence[int] | None = None) -> Tensor:  # [len(which), hidden], as lm_head takes it
        """Rows behind the tokens ``which``, counted over all runs; None: behind all. Only until the next launch."""
        rows = self._rows if which is None else self._rows[list(which)]
        return self._step.hidden[rows.tolist()]


class DecodeGraphs:
    """Decode steps of one model over one cache. Owned by the engine thread, as are its buffers; two steps at a time.

    ``replays`` false: the same shapes and operations, one by one, on any device. Other threads of the process may use
    the device while a graph is captured, as long as they wait for nothing but their own work.
    """

    def __init__(self, model: M3Model, cache: KvViews, shapes: DecodeShapes, *, replays: bool = True) -> None:
        self._model = model
        self._cache = cache
        self._shapes = shapes
        self._replays = replays
        self._graphs: dict[tuple[int, int], tuple[torch.cuda.CUDAGraph, _Step]] = {}
        self._pool = torch.cuda.graph_pool_handle() if replays else None
        most, longest = shapes.batch_sizes[-1], shapes.query_lens[-1]
        self._sides = (_Side(shapes, model.device), _Side(shapes, model.device))
        self._rows = DecodeRows(most)
        self._numbers = torch.zeros(most, TOKENS + longest, dtype=torch.int32, device=model.device)
        self._numbers_of = {batch: self._numbers[:batch] for batch in shapes.batch_sizes}
        self._tables = torch.zeros(most, shapes.max_blocks, dtype=torch.int32, device=model.device)
        self._last = torch.zeros(most, dtype=torch.int64, device=model.device)
        """What the latest step chose behind each sequence's last token."""

    def takes(self, step: MaybeDecodes) -> bool:
        """Whether ``launch`` can: a token is wanted behind every row, and there is a shape for them."""
        if isinstance(step, Onward):
            return True
        longest, widest = self._shapes.query_lens[-1], self._shapes.max_blocks
        if not 0 < len(step) <= self._shapes.batch_sizes[-1]:
            return False
        for run in step:
            wanted = run.sampling is not None and 1 + run.num_drafts == len(run.tokens) <= longest
            if not wanted or run.targets or len(run.pages) > widest:
                return False
        return True

    @torch.inference_mode()
    def prepare(self) -> None:
        """Capture every shape now, the largest first, so that smaller ones live in its memory."""
        if not self._replays:
            return
        for query_len in reversed(self._shapes.query_lens):
            for batch in reversed(self._shapes.batch_sizes):
                self._captured(batch, query_len)

    @torch.inference_mode()
    def launch(self, step: MaybeDecodes) -> DecodeInFlight:
        """One step that ``takes`` accepts. One other may be in flight: runs may take its tokens for theirs."""
        side = self._free_side()
        if isinstance(step, Onward):
            query_len = 1
            changes = self._rows.go_on(step, side.rows)
        else:
            longest = max(len(run.tokens) for run in step)
            query_len = next(n for n in self._shapes.query_lens if n >= longest)
            changes = self._rows.enter(step, side.rows, query_len)
        count = len(self._rows.index)
        batch = next(n for n in self._shapes.batch_sizes if n >= count)
        if count < batch:
            side.rows[count:batch] = _EMPTY[: side.rows.shape[1]]
        self._numbers_of[batch].copy_(side.numbers_of[batch], non_blocking=True)
        for row, source in changes.moved:
            self._tables[row].copy_(self._tables[source])
        for row, pages in changes.written:
            side.table_rows[row, : len(pages)] = pages
            self._tables[row, : len(pages)].copy_(side.tables[row, : len(pages)], non_blocking=True)
        lengths = [] if isinstance(step, Onward) else [len(run.tokens) for run in step]
        rows = self._rows.index if query_len == 1 else _last_rows(self._rows.index.tolist(), lengths, query_len)
        return DecodeInFlight(side, self._replayed(batch, query_len, side), rows)

    def _replayed(self, batch: int, query_len: int, side: _Side) -> _Step:
        """Computed, or about to be, and then told to ``side``."""
        if self._replays:
            graph, step = self._captured(batch, query_len)
            graph.replay()
        else:
            step = self._compute(batch, query_len)
        side.told_of[batch * query_len].copy_(step.told, non_blocking=True)
        if side.ended is not None:
            side.ended.record(torch.cuda.current_stream(self._model.device))
        return step

    def _free_side(self) -> _Side:
        """What the host writes now, no copy reads any more: the step that had this side has been waited for."""
        side = next((side for side in self._sides if not side.is_in_use), None)
        assert side is not None, "two steps are in flight"
        side.is_in_use = True
        return side

    def _captured(self, batch: int, query_len: int) -> tuple[torch.cuda.CUDAGraph, _Step]:
        found = self._graphs.get((batch, query_len))
        if found is not None:
            return found
        device = self._model.device
        last = self._last.clone()  # a step that is tried out must not choose what the real one begins with
        aside = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        aside.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(aside):  # what compiles, loads or measures itself at first use does so here
            self._compute(batch, query_len)
        torch.cuda.current_stream(device).wait_stream(aside)
        self._last.copy_(last)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            step = self._compute(batch, query_len)
        self._graphs[batch, query_len] = graph, step
        return graph, step

    def _compute(self, batch: int, query_len: int) -> _Step:
        """All from the buffers, nothing from the host: this is what a graph holds."""
        rows = self._numbers[:batch]
        device = rows.device
        before = torch.arange(-query_len, 0, device=device)  # [query_len]
        positions = rows[:, END, None] + before  # int64 [batch, query_len]; negative where there is no token
        behind = rows[:, BEHIND]
        tokens = rows[:, TOKENS : TOKENS + query_len].long()
        chosen = self._last.index_select(0, behind.clamp(min=0))
        tokens[:, -1] = torch.where(behind >= 0, chosen, tokens[:, -1])
        hidden = self._model.hidden(
            StepBatch(
                token_ids=tokens.flatten(),
                positions=positions.flatten(),
                query_starts=torch.arange(0, batch * query_len + 1, query_len, dtype=torch.int32, device=device),
                context_lens=rows[:, END] - query_len,
                page_table=self._tables[:batch],
                logits_rows=torch.arange(batch * query_len, device=device),
                query_len=query_len,
                stored_from=rows[:, START],
            ),
            self._cache,
        )
        told = torch.cat([self._greedy(some) for some in torch.split(hidden, _ROWS_AT_ONCE)])
        self._last[:batch].copy_(told[query_len - 1 :: query_len, 0])
        return _Step(told, hidden)

    def _greedy(self, hidden: Tensor) -> Tensor:  # [num_rows, hidden] -> float64 [num_rows, 3]
        """Of equal logits the lowest token, as everywhere."""
        logits = self._model.logits(hidden)
        assert logits is not None, "graphs are for models that are not divided"
        token = logits.argmax(dim=-1)
        logprob = logits.gather(1, token[:, None])[:, 0] - logits.logsumexp(dim=-1)
        finite = logits.isfinite().all(dim=-1)
        return torch.stack((token.double(), logprob.double(), finite.double()), dim=1)


def _last_rows(places: Sequence[int], lengths: Sequence[int], query_len: int) -> Rows:
    """Of each token of each run, in order: a sequence's tokens are the last of its rows."""
    ends = [(place + 1) * query_len for place in places]
    rows = [row for end, length in zip(ends, lengths, strict=True) for row in range(end - length, end)]
    return np.array(rows, dtype=np.int64)
