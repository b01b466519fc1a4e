"""Decode steps in fixed shapes on a GPU: captured once as CUDA graphs, replayed with whatever the buffers hold.

A step in which all go on that were in the step before is one replay and nothing else: the device has taken their
numbers further, has their tokens, and copies what it has chosen to where the host reads it. One in which somebody joins
or leaves takes a copy to the device before (numbers of all sequences), and one for each that joins (its page table).
The next step may be launched before anybody has read this one's tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pdkv.m3.attention import KvViews, StepBatch
from pdkv.m3.decode_rows import BEHIND, END, GROWS, START, TOKENS, DecodeRows, Numbers, Rows, TableChanges
from pdkv.m3.model import M3Model
from pdkv.m3.requests import EngineSettings
from pdkv.m3.run import Onward, Run
from pdkv.m3.sampling import GreedyChoices

MAX_QUERY_LEN = 8
_ROWS_AT_ONCE = 64
"""Rows of logits held at once inside a step."""

_EMPTY = [0, 0, -1, 0] + [0] * MAX_QUERY_LEN
"""What the row of no sequence says: nothing before it, nothing of it stored."""

_DAMAGED = -1
"""Told instead of a token where logits are not finite."""

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


class _Side:
    """What the host writes for a step and reads of it. There are two: one is written while the other is copied."""

    def __init__(self, shapes: "DecodeShapes", device: torch.device, told: Tensor) -> None:
        """told: int64 [2, batch * query_len], tokens and the bits of their log-probabilities, as the device copies them
        there."""
        most, longest = shapes.batch_sizes[-1], shapes.query_lens[-1]
        # Pinned, or a copy would wait for the device and be no part of the stream's order.
        on_gpu = device.type == "cuda"
        self.numbers = torch.zeros(most, TOKENS + longest, dtype=torch.int32, pin_memory=on_gpu)
        self.tables = torch.zeros(most, shapes.max_blocks, dtype=torch.int32, pin_memory=on_gpu)
        self.numbers_of = {batch: self.numbers[:batch] for batch in shapes.batch_sizes}
        self.rows: Numbers = self.numbers.numpy()
        self.table_rows: Numbers = self.tables.numpy()
        self.tokens: Rows = told[0].numpy()
        self.logprobs: np.ndarray[tuple[int], np.dtype[np.float64]] = told[1].view(torch.float64).numpy()
        self.ended = torch.cuda.Event() if on_gpu else None  # type: ignore[no-untyped-call]
        self.is_in_use = False


class _Shape(NamedTuple):
    """What is the same in every step of so many sequences and rows of each."""

    before: Tensor  # int64 [query_len]: how far before its sequence's end each row stands
    query_starts: Tensor  # int32 [batch + 1]
    all_rows: Tensor  # int64 [batch * query_len]

    @classmethod
    def of(cls, batch: int, query_len: int, device: torch.device) -> "_Shape":
        starts = torch.arange(0, batch * query_len + 1, query_len, dtype=torch.int32, device=device)
        return cls(torch.arange(-query_len, 0, device=device), starts, torch.arange(batch * query_len, device=device))


class _Form(NamedTuple):
    """Of a step, and of those behind it as long as all go on."""

    batch: int
    query_len: int
    rows: Rows
    """Of the step, one for each token of each run, in order."""
    places: Rows | slice
    """The same, as it is quicker to look up."""

    @classmethod
    def of(cls, batch: int, query_len: int, rows: Rows) -> "_Form":
        is_in_order = bool((rows == np.arange(len(rows))).all())
        return cls(batch, query_len, rows, slice(len(rows)) if is_in_order else rows)


class DecodeInFlight:
    """A step that the device may still be at. Owned by the engine thread."""

    def __init__(self, side: _Side, form: _Form, hidden: Tensor) -> None:
        """hidden: [batch * query_len, hidden], as lm_head takes it."""
        self._side = side
        self._form = form
        self._hidden = hidden

    def wait(self) -> GreedyChoices:
        """The choice behind each token of each run, in order. Called once; when it returns, the step's writes into the
        cache are done."""
        side, places = self._side, self._form.places
        if side.ended is not None:
            side.ended.synchronize()
        tokens: list[int] = side.tokens[places].tolist()
        logprobs: list[float] = side.logprobs[places].tolist()
        side.is_in_use = False
        if _DAMAGED not in tokens:
            return GreedyChoices(tokens, logprobs)
        damaged = [place for place, token in enumerate(tokens) if token == _DAMAGED]
        return GreedyChoices(tokens, logprobs, frozenset(damaged))

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
        self._graphs: dict[tuple[int, int], tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        """With what each leaves behind: hidden [batch * query_len, hidden]."""
        self._shapes_made: dict[tuple[int, int], _Shape] = {}
        self._pool = torch.cuda.graph_pool_handle() if replays else None
        device, most, longest = model.device, shapes.batch_sizes[-1], shapes.query_lens[-1]
        self._rows = DecodeRows(most)
        self._form: _Form | None = None
        """Of the latest step."""
        self._numbers = torch.zeros(most, TOKENS + longest, dtype=torch.int32, device=device)
        self._numbers_of = {batch: self._numbers[:batch] for batch in shapes.batch_sizes}
        self._tables = torch.zeros(most, shapes.max_blocks, dtype=torch.int32, device=device)
        self._own_rows = torch.arange(most, dtype=torch.int32, device=device)
        self._last = torch.zeros(most, dtype=torch.int64, device=device)
        """What the latest step chose behind each sequence's last token."""
        # What steps tell, by turns in one half and the other. Both are copied every time, so that a graph need not know
        # whose turn it is; the half that the host may be reading keeps its bytes.
        self._told = torch.zeros(2, 2, most * longest, dtype=torch.int64, device=device)
        self._told_host = torch.zeros(self._told.shape, dtype=torch.int64, pin_memory=device.type == "cuda")
        self._turn = torch.zeros(1, dtype=torch.int64, device=device)
        """The half of the step that is computed next."""
        self._sides = (_Side(shapes, device, self._told_host[0]), _Side(shapes, device, self._told_host[1]))
        self._stream: torch.cuda.Stream | None = None
        """On which steps are computed."""
        self._num_launched = 0

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
        side = self._sides[self._num_launched % 2]
        assert not side.is_in_use, "two steps are in flight"
        changes, query_len = self._enter(step, side)
        if changes is not None:
            self._form = self._tell(step, query_len, changes, side)
        form = self._form
        assert form is not None, "nobody is there to go on"
        hidden = self._computed(form.batch, form.query_len)
        if side.ended is not None:
            side.ended.record(self._stream)
        side.is_in_use = True
        self._num_launched += 1
        return DecodeInFlight(side, form, hidden)

    def _enter(self, step: MaybeDecodes, side: _Side) -> tuple[TableChanges | None, int]:
        """Who is in the step, and how many rows each has. None: as in the step before, and the device knows."""
        if isinstance(step, Onward):
            return self._rows.go_on(step, side.rows), 1
        longest = max(len(run.tokens) for run in step)
        query_len = next(n for n in self._shapes.query_lens if n >= longest)
        return self._rows.enter(step, side.rows, query_len), query_len

    @torch.inference_mode()
    def _tell(self, step: MaybeDecodes, query_len: int, changes: TableChanges, side: _Side) -> _Form:
        """Give the device the numbers of all sequences, and what of its page tables is new."""
        if self._model.device.type == "cuda":
            self._stream = torch.cuda.current_stream(self._model.device)
        index = self._rows.index
        count = len(index)
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
        if query_len > 1:
            return _Form.of(batch, query_len, _last_rows(index.tolist(), lengths, query_len))
        if self._form is not None and self._form.rows is index:
            return self._form
        return _Form.of(batch, query_len, index)

    def _computed(self, batch: int, query_len: int) -> Tensor:
        """Or about to be."""
        found = self._graphs.get((batch, query_len))
        if found is None:
            with torch.inference_mode():
                if not self._replays:
                    return self._compute(batch, query_len)
                found = self._captured(batch, query_len)
        graph, hidden = found
        graph.replay()
        return hidden

    def _captured(self, batch: int, query_len: int) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        device = self._model.device
        # A step that is tried out must leave what the real one begins with.
        kept = [(buffer, buffer.clone()) for buffer in (self._numbers, self._last, self._turn)]
        aside = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        aside.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(aside):  # what compiles, loads or measures itself at first use does so here
            self._compute(batch, query_len)
        torch.cuda.current_stream(device).wait_stream(aside)
        for buffer, content in kept:
            buffer.copy_(content)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            hidden = self._compute(batch, query_len)
        self._graphs[batch, query_len] = graph, hidden
        return graph, hidden

    def _shape_of(self, batch: int, query_len: int) -> "_Shape":
        """Kept, so that no graph has to make it again with every step."""
        if (batch, query_len) not in self._shapes_made:
            self._shapes_made[batch, query_len] = _Shape.of(batch, query_len, self._model.device)
        return self._shapes_made[batch, query_len]

    def _compute(self, batch: int, query_len: int) -> Tensor:  # [batch * query_len, hidden], as lm_head takes it
        """All from the buffers, nothing from the host: this is what a graph holds."""
        rows, shape = self._numbers[:batch], self._shape_of(batch, query_len)
        positions = rows[:, END, None] + shape.before  # int64 [batch, query_len]; negative where there is no token
        behind = rows[:, BEHIND]
        tokens = rows[:, TOKENS : TOKENS + query_len].long()
        chosen = self._last.index_select(0, behind.clamp(min=0))
        tokens[:, -1] = torch.where(behind >= 0, chosen, tokens[:, -1])
        hidden = self._model.hidden(
            StepBatch(
                token_ids=tokens.flatten(),
                positions=positions.flatten(),
                query_starts=shape.query_starts,
                context_lens=rows[:, END] - query_len,
                page_table=self._tables[:batch],
                logits_rows=shape.all_rows,
                query_len=query_len,
                stored_from=rows[:, START],
            ),
            self._cache,
        )
        parts = [self._greedy(some) for some in torch.split(hidden, _ROWS_AT_ONCE)]
        told = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        self._last[:batch].copy_(told[0, query_len - 1 :: query_len])
        self._told[:, :, : batch * query_len].index_copy_(0, self._turn, told[None, 1:])
        self._told_host.copy_(self._told, non_blocking=True)
        self._turn.bitwise_xor_(1)
        rows[:, :BEHIND].add_(rows[:, GROWS, None])  # END and START, for the step behind
        rows[:, BEHIND].copy_(self._own_rows[:batch])
        return hidden

    def _greedy(self, hidden: Tensor) -> Tensor:  # [num_rows, hidden] -> int64 [3, num_rows]
        """A token, the same as the host is told it, and the bits of its log-probability in float64. Of equal logits the
        lowest token, as everywhere."""
        logits = self._model.logits(hidden)
        assert logits is not None, "graphs are for models that are not divided"
        token = logits.argmax(dim=-1)
        logprob = logits.gather(1, token[:, None])[:, 0] - logits.logsumexp(dim=-1)
        told = torch.where(logits.isfinite().all(dim=-1), token, _DAMAGED)
        return torch.stack((token, told, logprob.double().view(torch.int64)))


def _last_rows(places: Sequence[int], lengths: Sequence[int], query_len: int) -> Rows:
    """Of each token of each run, in order: a sequence's tokens are the last of its rows."""
    ends = [(place + 1) * query_len for place in places]
    rows = [row for end, length in zip(ends, lengths, strict=True) for row in range(end - length, end)]
    return np.array(rows, dtype=np.int64)
