"""Turns what the engine process says of a request's jobs into an answer, whole or as a stream, in some API's form."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import Protocol

import msgspec

from pdkv.daemons import openai_api
from pdkv.daemons.choice import ChoiceWriter, Piece, merge
from pdkv.daemons.engine_link import JobEvent
from pdkv.daemons.generation import Generation
from pdkv.daemons.job_group import JobGroup
from pdkv.daemons.link import JobFailed, TokensOut, TransferReport
from pdkv.daemons.openai_api import ApiError, DebugBlock, Usage
from pdkv.daemons.tokenization import TextCodec
from pdkv.daemons.traffic import current_span

_LONG_ECHO = 500
"""Scored prompt tokens above which their form is written outside the event loop, so that streams do not stall."""

Numbered = tuple[int, JobEvent]


class AnswerForm(Protocol):
    """How an API writes an answer. Holds what all parts of one answer share: its id, the time, the model's name."""

    def whole(self, choices: Sequence[Piece], usage: Usage, debug: DebugBlock | None) -> msgspec.Struct:
        """The body of a 200; ``choices`` are whole ones, in order."""
        ...

    def chunks(self, piece: Piece, debug: DebugBlock | None) -> Sequence[msgspec.Struct]:
        """A stream's chunks for one piece; ``debug`` comes with a choice's last."""
        ...

    def usage_chunk(self, usage: Usage) -> msgspec.Struct:
        """A stream's last chunk, where the client asked for it."""
        ...


class Answer:
    """The answer to one request. Job i of the group writes choice i. Belongs to the event loop's thread."""

    def __init__(
        self, asked: Generation, form: AnswerForm, codec: TextCodec | None, debug: DebugBlock | None = None
    ) -> None:
        self._asked = asked
        self._form = form
        self._writers = [ChoiceWriter(asked, i, codec) for i in range(asked.num_choices)]
        self._has_begun = [False] * asked.num_choices
        self._reports: list[TransferReport | None] = [None] * asked.num_choices
        self._debug = debug

    async def whole(self, first: Numbered, jobs: JobGroup) -> bytes:
        """The body of a 200. Raises ApiError when any job fails on the way."""
        pieces: list[list[Piece]] = [[] for _ in self._writers]
        async for piece in self._pieces(first, jobs):
            pieces[piece.choice].append(piece)
        choices = [merge(mine) for mine in pieces]
        if any(map(_takes_long, choices)):
            return await asyncio.to_thread(self._write_whole, choices)
        return self._write_whole(choices)

    async def stream(self, first: Numbered, jobs: JobGroup) -> AsyncGenerator[bytes, None]:
        """Server-sent events; a failure on the way is an error event, and no [DONE] follows it."""
        try:
            async for piece in self._pieces(first, jobs):
                yield await asyncio.to_thread(self._write, piece) if _takes_long(piece) else self._write(piece)
        except ApiError as exc:
            yield openai_api.encode_event(exc.body)
            return
        if self._asked.options.include_usage:
            yield openai_api.encode_event(self._form.usage_chunk(self._usage()))
        yield openai_api.END_OF_STREAM

    async def _pieces(self, first: Numbered, jobs: JobGroup) -> AsyncIterator[Piece]:
        """Pieces of all choices as they come; the last of each says why it ended."""
        async for piece in self._read(*first, jobs):
            yield piece
        async for index, event in jobs.rest():
            async for piece in self._read(index, event, jobs):
                yield piece

    async def _read(self, index: int, event: JobEvent, jobs: JobGroup) -> AsyncIterator[Piece]:
        writer = self._writers[index]
        if isinstance(event, JobFailed):
            if not writer.stopped:
                raise failure(event)
            yield writer.finish("stop")  # whatever went wrong, nothing of it was wanted any more
            return
        if not isinstance(event, TokensOut):
            self._reports[index] = event.report
            self._tell_span(event.report)
            yield writer.finish(event.reason)
            return
        if self._asked.options.echo and not self._has_begun[index]:
            yield await self._echo(index, event)
        self._has_begun[index] = True
        was_stopped = writer.stopped
        piece = writer.push(event)
        if writer.stopped and not was_stopped:
            jobs.finish(index)
        if piece is not None:
            yield piece

    def _tell_span(self, report: TransferReport | None) -> None:
        span = current_span()
        if span is None:
            return
        usage = self._usage()  # that of the last choice to end stands
        told = {"input": usage.prompt_tokens, "output": usage.completion_tokens}
        span.note({f"gen_ai.usage.{which}_tokens": number for which, number in told.items()})
        if report is not None:
            span.moved(report)

    async def _echo(self, index: int, event: TokensOut) -> Piece:
        writer = self._writers[index]
        if event.prompt is None or len(self._asked.prompt_of(index).token_ids) < _LONG_ECHO:
            return writer.echo(event.prompt)
        return await asyncio.to_thread(writer.echo, event.prompt)

    def _write(self, piece: Piece) -> bytes:
        """One piece as server-sent events."""
        debug = None
        if piece.finish_reason is not None and self._debug is not None:
            debug = msgspec.structs.replace(self._debug, transfer=self._reports[piece.choice])
        return b"".join(openai_api.encode_event(chunk) for chunk in self._form.chunks(piece, debug))

    def _write_whole(self, choices: Sequence[Piece]) -> bytes:
        return msgspec.json.encode(self._form.whole(choices, self._usage(), self._debug_block()))

    def _usage(self) -> Usage:
        num_prompt_tokens = sum(len(prompt.token_ids) for prompt in self._asked.prompts)
        first = self._reports[:: self._asked.options.n]
        num_cached = sum(report.cached_tokens for report in first if report is not None)
        return Usage.of(num_prompt_tokens, sum(writer.num_tokens for writer in self._writers), num_cached)

    def _debug_block(self) -> DebugBlock | None:
        if self._debug is None:
            return None
        block = msgspec.structs.replace(self._debug, transfer=self._reports[0])
        return msgspec.structs.replace(block, transfers=self._reports) if len(self._reports) > 1 else block


def _takes_long(piece: Piece) -> bool:
    return piece.prompt is not None and len(piece.prompt.token_ids) >= _LONG_ECHO


def failure(failed: JobFailed) -> ApiError:
    """A failed job as the client sees it."""
    retry = 1 if failed.status in (429, 503) else None
    return ApiError.of(failed.status, failed.message, code=failed.code, retry_after_s=retry)
