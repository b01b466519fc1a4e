"""Decode steps in fixed shapes on a GPU: captured once as CUDA graphs, replayed with whatever the buffers hold.

A step takes one copy to the device (numbers of sequences, their new tokens, their page tables), one replay, one copy
back (tokens, log-probabilities) and one wait. Everything else a step needs is computed on the device, inside the graph.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pdkv.m3.attention import KvViews, StepBatch
from pdkv.m3.model import M3Model
from pdkv.m3.requests import EngineSettings
from pdkv.m3.run import Run

MAX_QUERY_LEN = 8
_END, _START, _TOKENS = 0, 1, 2
"""Columns of a sequence's row in the buffer; its page table follows its tokens."""
_ROWS_AT_ONCE = 64
"""Rows of logits held at once inside a step."""


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


class Chosen(NamedTuple):
    """The greedy choice behind one row."""

    token: int
    logprob: float
    finite: bool
    """Whether all logits are; else the other two mean nothing."""


class DecodeResult(NamedTuple):
    chosen: list[Chosen]
    """One for each token of each run, in order."""
    hidden: Tensor  # [one row for each of ``chosen``, hidden], as lm_head takes it
    """Valid until the next step."""


class _Step(NamedTuple):
    told: Tensor  # float64 [batch * query_len, 3], fields of ``Chosen``
    hidden: Tensor  # [batch * query_len, hidden]


class DecodeGraphs:
    """Decode steps of one model over one cache. Owned by the engine thread, as are its buffers; one step at a time.

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
        self._table = _TOKENS + longest
        size = (most, self._table + shapes.max_blocks)
        # Pinned, or the copy would wait for the device and be no part of the stream's order.
        self._on_gpu = model.device.type == "cuda"
        self._staged = torch.zeros(size, dtype=torch.int32, pin_memory=self._on_gpu)
        self._rows = self._staged.numpy()
        self._pages: list[tuple[int, ...]] = [() for _ in range(most)]  # what each row's page table was filled from
        self._inputs = torch.zeros(size, dtype=torch.int32, device=model.device)
        self._told = torch.zeros(most * longest, 3, dtype=torch.float64, pin_memory=self._on_gpu)

    def takes(self, runs: Sequence[Run]) -> bool:
        """Whether ``run`` can: a token is wanted behind every row, and there is a shape for them."""
        return 0 < len(runs) <= self._shapes.batch_sizes[-1] and all(
            run.num_choices == len(run.tokens) <= self._shapes.query_lens[-1]
            and len(run.pages) <= self._shapes.max_blocks
            and not run.targets
            for run in runs
        )

    @torch.inference_mode()
    def prepare(self) -> None:
        """Capture every shape now, the largest first, so that smaller ones live in its memory."""
        for query_len in reversed(self._shapes.query_lens):
            for batch in reversed(self._shapes.batch_sizes):
                self._captured(batch, query_len)

    @torch.inference_mode()
    def run(self, runs: Sequence[Run]) -> DecodeResult:
        """One step of runs that ``takes`` accepts; when it returns, its writes into the cache are done."""
        longest = max(len(run.tokens) for run in runs)
        query_len = next(n for n in self._shapes.query_lens if n >= longest)
        batch = next(n for n in self._shapes.batch_sizes if n >= len(runs))
        self._fill(runs, batch, query_len)
        self._inputs[:batch].copy_(self._staged[:batch], non_blocking=True)
        if self._replays:
            graph, step = self._captured(batch, query_len)
            graph.replay()
        else:
            step = self._compute(batch, query_len)
        told = self._told[: step.told.shape[0]]
        told.copy_(step.told, non_blocking=True)
        if self._on_gpu:
            torch.cuda.current_stream(self._model.device).synchronize()
        return self._result(runs, query_len, told.tolist(), step.hidden)

    def _fill(self, runs: Sequence[Run], batch: int, query_len: int) -> None:
        """A run of fewer tokens than ``query_len`` has them last: rows before them repeat what is stored already."""
        rows, count = self._rows, len(runs)
        rows[:count, _END] = [run.end for run in runs]
        rows[:count, _START] = [run.start for run in runs]
        rows[count:batch, : self._table] = 0
        begin = _TOKENS + query_len
        if all(len(run.tokens) == query_len for run in runs):
            rows[:count, _TOKENS:begin] = [run.tokens for run in runs]
        else:
            for i, run in enumerate(runs):
                rows[i, begin - len(run.tokens) : begin] = run.tokens
        for i, run in enumerate(runs):
            if run.pages != self._pages[i]:
                rows[i, self._table : self._table + len(run.pages)] = run.pages
                self._pages[i] = run.pages

    def _captured(self, batch: int, query_len: int) -> tuple[torch.cuda.CUDAGraph, _Step]:
        found = self._graphs.get((batch, query_len))
        if found is not None:
            return found
        device = self._model.device
        aside = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        aside.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(aside):  # what compiles, loads or measures itself at first use does so here
            self._compute(batch, query_len)
        torch.cuda.current_stream(device).wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            step = self._compute(batch, query_len)
        self._graphs[batch, query_len] = graph, step
        return graph, step

    def _compute(self, batch: int, query_len: int) -> _Step:
        """All from the buffers, nothing from the host: this is what a graph holds."""
        rows = self._inputs[:batch]
        device = rows.device
        before = torch.arange(-query_len, 0, device=device)  # [query_len]
        positions = rows[:, _END, None] + before  # int64 [batch, query_len]; negative where there is no token
        hidden = self._model.hidden(
            StepBatch(
                token_ids=rows[:, _TOKENS : _TOKENS + query_len].long().flatten(),
                positions=positions.flatten(),
                query_starts=torch.arange(0, batch * query_len + 1, query_len, dtype=torch.int32, device=device),
                context_lens=rows[:, _END] - query_len,
                page_table=rows[:, self._table :],
                logits_rows=torch.arange(batch * query_len, device=device),
                query_len=query_len,
                stored_from=rows[:, _START],
            ),
            self._cache,
        )
        return _Step(torch.cat([self._greedy(some) for some in torch.split(hidden, _ROWS_AT_ONCE)]), hidden)

    def _greedy(self, hidden: Tensor) -> Tensor:  # [num_rows, hidden] -> float64 [num_rows, 3]
        """Of equal logits the lowest token, as everywhere."""
        logits = self._model.logits(hidden)
        assert logits is not None, "graphs are for models that are not divided"
        token = logits.argmax(dim=-1)
        logprob = logits.gather(1, token[:, None])[:, 0] - logits.logsumexp(dim=-1)
        finite = logits.isfinite().all(dim=-1)
        return torch.stack((token.double(), logprob.double(), finite.double()), dim=1)

    def _result(self, runs: Sequence[Run], query_len: int, told: list[list[float]], hidden: Tensor) -> DecodeResult:
        rows = [(i + 1) * query_len - left for i, run in enumerate(runs) for left in range(len(run.tokens), 0, -1)]
        chosen = [Chosen(int(told[row][0]), told[row][1], told[row][2] == 1.0) for row in rows]
        assert not any(math.isnan(c.logprob) for c in chosen if c.finite), "finite logits have a finite best"
        wanted = hidden[: len(rows)] if len(rows) == len(runs) * query_len else hidden[rows]
        return DecodeResult(chosen, wanted)
