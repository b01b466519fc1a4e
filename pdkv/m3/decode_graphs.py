"""Decode steps in fixed shapes on a GPU: captured once as CUDA graphs, replayed with whatever the buffers hold.

A step is one replay: the device takes the numbers of its sequences further by itself and has their tokens, its first
kernel reads what the host says of those that have joined or left, and its last tells what was chosen, both in the
host's memory. Where somebody asks for more than the likeliest token, a second graph draws behind it. The next step may
be launched before anybody has read this one's tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from pdkv_kernels.decode_rows_ref import BEHIND, PAGES, TOKENS, RowBuffers, RowInputs
from pdkv_kernels.draw_ref import ASKED
from torch import Tensor

from pdkv.m3.attention import KvViews, StepBatch
from pdkv.m3.choosing import kernels_for
from pdkv.m3.decode_rows import DecodeRows, Rows, Said
from pdkv.m3.logprobs import MAX_TOP, Tops
from pdkv.m3.model import M3Model
from pdkv.m3.requests import EngineSettings
from pdkv.m3.run import Onward, Run
from pdkv.m3.sampling import Choices, Logprobs

MAX_QUERY_LEN = 8
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
        """Powers of two up to 8, then every eighth, so that little more than an eighth is ever padding. One size where
        steps are to be batch-invariant: kernels divide their work by it, and so round by it."""
        most = settings.max_batch
        sizes = {n for n in (1, 2, 4, *range(8, most, 8)) if n < most and not settings.batch_invariant} | {most}
        query_lens = {1, min(1 + settings.speculative_tokens, MAX_QUERY_LEN)}
        blocks = min(-(-settings.max_model_len // block_size), num_pages)
        return cls(tuple(sorted(sizes)), tuple(sorted(query_lens)), blocks)


def _row_buffers(shapes: "DecodeShapes", device: torch.device) -> RowBuffers:
    """Of rows that are nobody's."""
    most, longest, blocks = shapes.batch_sizes[-1], shapes.query_lens[-1], shapes.max_blocks
    pinned = device.type == "cuda"  # the device reads and writes it
    buffers = RowBuffers(
        said_at=torch.full((2, most), -1, dtype=torch.int64, pin_memory=pinned),
        said=torch.zeros(2, most, TOKENS + longest, dtype=torch.int32, pin_memory=pinned),
        said_pages=torch.zeros(2, most, blocks, dtype=torch.int32, pin_memory=pinned),
        said_asked=torch.zeros(2, most, ASKED, dtype=torch.int64, pin_memory=pinned),
        step=torch.zeros(1, dtype=torch.int64, device=device),
        numbers=torch.zeros(2, most, PAGES, dtype=torch.int32, device=device),
        asked=torch.zeros(2, most, ASKED, dtype=torch.int64, device=device),
        tables=torch.zeros(most, blocks, dtype=torch.int32, device=device),
        last=torch.zeros(most, dtype=torch.int64, device=device),
        told=torch.zeros(2, 2, most * longest, dtype=torch.int64, pin_memory=pinned),
        told_tops=torch.zeros(2, most, 2, MAX_TOP, dtype=torch.int64, pin_memory=pinned),
    )
    buffers.numbers[:, :, BEHIND] = -1
    return buffers


class _Side:
    """What the host says to a step and reads of it. There are two: one is written while the device is at the other."""

    def __init__(self, buffers: RowBuffers, half: int, device: torch.device) -> None:
        said = buffers.said_at, buffers.said, buffers.said_pages, buffers.said_asked
        self.said = Said(*(tensor[half].numpy() for tensor in said))
        self.tokens: Rows = buffers.told[half, 0].numpy()
        self.logprobs: Logprobs = buffers.told[half, 1].view(torch.float64).numpy()
        self.tops = buffers.told_tops[half].numpy()
        self.ended = torch.cuda.Event() if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self.is_in_use = False


class _Shape(NamedTuple):
    """What is the same in every step of so many sequences and rows of each."""

    query_starts: Tensor  # int32 [batch + 1]
    all_rows: Tensor  # int64 [batch * query_len]

    @classmethod
    def of(cls, batch: int, query_len: int, device: torch.device) -> "_Shape":
        starts = torch.arange(0, batch * query_len + 1, query_len, dtype=torch.int32, device=device)
        return cls(starts, torch.arange(batch * query_len, device=device))


class _Form(NamedTuple):
    """Of a step, and of those behind it as long as all go on."""

    batch: int
    query_len: int
    rows: Rows
    """Of the step, one for each token of each run, in order."""
    places: Rows | slice
    """The same, as it is quicker to look up."""
    draws: bool = False
    """What is asked of some row is more than a greedy choice, and made behind the step."""
    counts: Rows | None = None
    """Of each run, how many likeliest tokens it tells; None: none of any."""

    @classmethod
    def of(cls, batch: int, rows: DecodeRows) -> "_Form":
        """One row of each."""
        places = slice(rows.count) if rows.is_in_order else rows.index
        if not rows.draws:
            return cls(batch, 1, rows.index, places)
        counts = rows.counts[places].copy()
        return cls(batch, 1, rows.index, places, draws=True, counts=counts if counts.any() else None)


class _Made(NamedTuple):
    """What computing a step leaves behind, until the next one is computed."""

    hidden: Tensor  # [batch * query_len, hidden], as lm_head takes it
    inputs: RowInputs
    logits: Tensor  # [batch * query_len, vocab], of as many rows as are kept
    chosen: Tensor  # int64 [3, batch * query_len]


class _Graphs(NamedTuple):
    """Of one shape."""

    step: torch.cuda.CUDAGraph
    draws: torch.cuda.CUDAGraph | None
    """Behind it where something is drawn: of one row of each sequence."""
    made: _Made


class DecodeInFlight:
    """A step that the device may still be at. Owned by the engine thread."""

    def __init__(self, side: _Side, form: _Form, hidden: Tensor) -> None:
        """hidden: [batch * query_len, hidden], as lm_head takes it."""
        self._side = side
        self._form = form
        self._hidden = hidden

    @property
    def is_drawn(self) -> bool:
        """All that runs ask for is chosen, not greedily alone."""
        return self._form.query_len == 1

    def wait(self) -> Choices:
        """The choice behind each token of each run, in order. Called once; when it returns, the step's writes into the
        cache are done."""
        side, form = self._side, self._form
        places = form.places
        if side.ended is not None:
            side.ended.synchronize()
        tops = None if form.counts is None else Tops(form.counts, side.tops[places, :, : form.counts.max()].copy())
        choices = Choices(side.tokens[places].copy(), side.logprobs[places].copy(), tops)
        side.is_in_use = False
        return choices

    def hidden(self, which: Sequence[int] | None = None) -> Tensor:  # [len(which), hidden], as lm_head takes it
        """Rows behind the tokens ``which``, counted over all runs; None: behind all. Only until the next launch."""
        rows = self._form.rows
        return self._hidden[(rows if which is None else rows[list(which)]).tolist()]


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
        self._graphs: dict[tuple[int, int], _Graphs] = {}
        self._shapes_made: dict[tuple[int, int], _Shape] = {}
        self._pool = torch.cuda.graph_pool_handle() if replays else None
        self._kernels = kernels_for(model.device)
        self._buffers = _row_buffers(shapes, model.device)
        most = shapes.batch_sizes[-1]
        self._logits = model.empty_logits(most)
        """Of a step with one row of each sequence; where there are more, of the last that were looked at."""
        self._tops = torch.empty(most, 2, MAX_TOP, dtype=torch.int64, device=model.device)
        self._rows = DecodeRows(most, min(MAX_TOP, model.config.vocab_size))
        self._form: _Form | None = None
        """Of the latest step."""
        self._sides = _Side(self._buffers, 0, model.device), _Side(self._buffers, 1, model.device)
        self._stream: torch.cuda.Stream | None = None
        """On which steps are computed."""
        self._num_launched = 0
        """As ``self._buffers.step``, when all that was launched has been computed."""

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
                if (batch, query_len) not in self._graphs:
                    self._captured(batch, query_len)

    def launch(self, step: MaybeDecodes) -> DecodeInFlight:
        """One step that ``takes`` accepts. One other may be in flight: runs may take its tokens for theirs."""
        number = self._num_launched
        side = self._sides[number % 2]
        assert not side.is_in_use, "two steps are in flight"
        form = self._form
        if not isinstance(step, Onward):
            form = self._enter(step, side.said, number)
        elif step.left or step.joined:
            form = self._go_on(step, side.said, number)
        assert form is not None, "nobody is there to go on"
        hidden = self._computed(form)
        if side.ended is not None:
            side.ended.record(self._stream)
        side.is_in_use = True
        self._form = form
        self._num_launched = number + 1
        return DecodeInFlight(side, form, hidden)

    def _enter(self, runs: Sequence[Run], said: Said, number: int) -> _Form:
        if self._model.device.type == "cuda":
            self._stream = torch.cuda.current_stream(self._model.device)
        lengths = [len(run.tokens) for run in runs]
        longest = max(lengths)
        query_len = next(n for n in self._shapes.query_lens if n >= longest)
        batch = self._batch_of(len(runs))
        self._rows.enter(runs, said, number, (batch, query_len))
        if query_len == 1:
            return _Form.of(batch, self._rows)
        if self._rows.is_in_order and min(lengths) == query_len:
            rows = np.arange(len(runs) * query_len)
            return _Form(batch, query_len, rows, slice(len(rows)))
        rows = _last_rows(self._rows.index.tolist(), lengths, query_len)
        return _Form(batch, query_len, rows, rows)

    def _go_on(self, step: Onward, said: Said, number: int) -> _Form:
        batch = self._batch_of(self._rows.count - len(step.left) + len(step.joined))
        self._rows.go_on(step, said, number, batch)
        return _Form.of(batch, self._rows)

    def _batch_of(self, count: int) -> int:
        return next(n for n in self._shapes.batch_sizes if n >= count)

    def _computed(self, form: _Form) -> Tensor:
        """Or about to be."""
        batch, query_len = form.batch, form.query_len
        found = self._graphs.get((batch, query_len))
        if found is None:
            with torch.inference_mode():
                if not self._replays:
                    made = self._compute(batch, query_len)
                    if form.draws:
                        self._draw(made)
                    return made.hidden
                found = self._captured(batch, query_len)
        found.step.replay()
        if form.draws and found.draws is not None:
            found.draws.replay()
        return found.made.hidden

    def _captured(self, batch: int, query_len: int) -> _Graphs:
        device = self._model.device
        # A step that is tried out must leave what the real one begins with.
        buffers = self._buffers
        begins = buffers.step, buffers.numbers, buffers.asked, buffers.tables, buffers.last
        kept = [(buffer, buffer.clone()) for buffer in begins]
        aside = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        aside.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(aside):  # what compiles, loads or measures itself at first use does so here
            made = self._compute(batch, query_len)
            if query_len == 1:
                self._draw(made)
        torch.cuda.current_stream(device).wait_stream(aside)
        for buffer, content in kept:
            buffer.copy_(content)
        graph, draws = torch.cuda.CUDAGraph(), None
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            made = self._compute(batch, query_len)
        if query_len == 1:
            draws = torch.cuda.CUDAGraph()
            with torch.cuda.graph(draws, pool=self._pool, capture_error_mode="thread_local"):
                self._draw(made)
        self._graphs[batch, query_len] = found = _Graphs(graph, draws, made)
        return found

    def _shape_of(self, batch: int, query_len: int) -> "_Shape":
        """Kept, so that no graph has to make it again with every step."""
        if (batch, query_len) not in self._shapes_made:
            self._shapes_made[batch, query_len] = _Shape.of(batch, query_len, self._model.device)
        return self._shapes_made[batch, query_len]

    def _compute(self, batch: int, query_len: int) -> _Made:
        """All from the buffers, nothing from the host: this is what a graph holds."""
        shape = self._shape_of(batch, query_len)
        inputs = self._kernels.begin(self._buffers, batch, query_len)
        hidden = self._model.hidden(
            StepBatch(
                token_ids=inputs.token_ids,
                positions=inputs.positions,
                query_starts=shape.query_starts,
                context_lens=inputs.context_lens,
                page_table=self._buffers.tables[:batch],
                logits_rows=shape.all_rows,
                query_len=query_len,
                stored_from=inputs.stored_from,
            ),
            self._cache,
        )
        num_rows = batch * query_len
        chosen = torch.empty(3, num_rows, dtype=torch.int64, device=hidden.device)
        logits = self._logits
        for begin in range(0, num_rows, len(self._logits)):
            few = slice(begin, min(begin + len(self._logits), num_rows))
            logits = self._model.plain_logits(hidden[few], self._logits)
            self._kernels.choose(chosen[:, few], logits)
        self._kernels.end(self._buffers, chosen, batch, query_len)
        return _Made(hidden, inputs, logits, chosen)

    def _draw(self, made: _Made) -> None:
        """Behind a step of one row of each, and as ``_compute`` from the buffers alone."""
        tops = self._tops[: len(made.logits)]
        self._kernels.draw(made.chosen, tops, made.logits, made.inputs.asked, made.inputs.positions)
        self._kernels.retell(self._buffers, made.chosen, tops, made.inputs.asked)


def _last_rows(places: Sequence[int], lengths: Sequence[int], query_len: int) -> Rows:
    """Of each token of each run, in order: a sequence's tokens are the last of its rows."""
    ends = [(place + 1) * query_len for place in places]
    rows = [row for end, length in zip(ends, lengths, strict=True) for row in range(end - length, end)]
    return np.array(rows, dtype=np.int64)
