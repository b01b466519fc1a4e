"""Turns what the engine process says of a request's jobs into OpenAI's answer, whole or as a stream."""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence

import msgspec

from pdkv.daemons import openai_api
from pdkv.daemons.choice import ChoiceWriter, EncodedPrompt, merge
from pdkv.daemons.completion_request import CompletionRequest
from pdkv.daemons.engine_link import JobEvent
from pdkv.daemons.job_group import JobGroup
from pdkv.daemons.link import JobFailed, TokensOut, TransferReport
from pdkv.daemons.openai_api import ApiError, Choice, Completion, DebugBlock, Usage
from pdkv.daemons.tokenization import TextCodec

_LONG_ECHO = 500
"""Scored prompt tokens above which their form is written outside the event loop, so that streams do not stall."""

Numbered = tuple[int, JobEvent]


class CompletionAnswer:
    """The answer to one request, a choice a prompt. Job i of the group is prompt i's."""

    def __init__(
        self,
        asked: CompletionRequest,
        model: str,
        codec: TextCodec | None,
        prompts: Sequence[EncodedPrompt],
        debug: DebugBlock | None,
    ) -> None:
        self._asked = asked
        self._model = model
        self._writers = [ChoiceWriter(asked, i, prompt, codec) for i, prompt in enumerate(prompts)]
        self._prompts = prompts
        self._has_begun = [False] * len(prompts)
        self._reports: list[TransferReport | None] = [None] * len(prompts)
        self._debug = debug
        self._id = f"cmpl-{time.time_ns():x}"
        self._created = int(time.time())

    async def whole(self, first: Numbered, jobs: JobGroup) -> bytes:
        """The body of a 200. Raises ApiError when any job fails on the way."""
        pieces: list[list[Choice]] = [[] for _ in self._writers]
        async for choice in self._choices(first, jobs):
            pieces[choice.index].append(choice)
        completion = self._completion(*(merge(mine) for mine in pieces))
        return msgspec.json.encode(msgspec.structs.replace(completion, usage=self._usage(), pdkv=self._debug_block()))

    async def stream(self, first: Numbered, jobs: JobGroup) -> AsyncIterator[bytes]:
        """Server-sent events; a failure on the way is an error event, and no [DONE] follows it."""
        try:
            async for choice in self._choices(first, jobs):
                yield self._chunk(choice)
        except ApiError as exc:
            yield openai_api.encode_event(exc.body)
            return
        if self._asked.include_usage:
            yield openai_api.encode_event(msgspec.structs.replace(self._completion(), usage=self._usage()))
        yield openai_api.END_OF_STREAM

    async def _choices(self, first: Numbered, jobs: JobGroup) -> AsyncIterator[Choice]:
        """Pieces of all choices as they come; the last of each says why it ended."""
        async for choice in self._pieces(*first, jobs):
            yield choice
        async for index, event in jobs.rest():
            async for choice in self._pieces(index, event, jobs):
                yield choice

    async def _pieces(self, index: int, event: JobEvent, jobs: JobGroup) -> AsyncIterator[Choice]:
        writer = self._writers[index]
        if isinstance(event, JobFailed):
            if not writer.stopped:
                raise failure(event)
            yield writer.finish("stop")  # whatever went wrong, nothing of it was wanted any more
            return
        if not isinstance(event, TokensOut):
            self._reports[index] = event.report
            yield writer.finish(event.reason)
            return
        if self._asked.echo and not self._has_begun[index]:
            yield await self._echo(index, event)
        self._has_begun[index] = True
        was_stopped = writer.stopped
        piece = writer.push(event)
        if writer.stopped and not was_stopped:
            jobs.finish(index)
        if piece is not None:
            yield piece

    async def _echo(self, index: int, event: TokensOut) -> Choice:
        num_tokens = len(self._prompts[index].token_ids)
        if event.prompt is None or num_tokens < _LONG_ECHO:
            return self._writers[index].echo(event.prompt)
        return await asyncio.to_thread(self._writers[index].echo, event.prompt)

    def _chunk(self, choice: Choice) -> bytes:
        chunk = self._completion(choice)
        if self._asked.include_usage:
            chunk = msgspec.structs.replace(chunk, usage=None)
        if choice.finish_reason is not None and self._debug is not None:
            report = self._reports[choice.index]
            chunk = msgspec.structs.replace(chunk, pdkv=msgspec.structs.replace(self._debug, transfer=report))
        return openai_api.encode_event(chunk)

    def _completion(self, *choices: Choice) -> Completion:
        return Completion(id=self._id, created=self._created, model=self._model, choices=choices)

    def _usage(self) -> Usage:
        num_prompt_tokens = sum(len(prompt.token_ids) for prompt in self._prompts)
        num_cached = sum(report.cached_tokens for report in self._reports if report is not None)
        return Usage.of(num_prompt_tokens, sum(writer.num_tokens for writer in self._writers), num_cached)

    def _debug_block(self) -> DebugBlock | msgspec.UnsetType:
        if self._debug is None:
            return msgspec.UNSET
        block = msgspec.structs.replace(self._debug, transfer=self._reports[0])
        return msgspec.structs.replace(block, transfers=self._reports) if len(self._reports) > 1 else block


def failure(failed: JobFailed) -> ApiError:
    """A failed job as the client sees it."""
    retry = 1 if failed.status in (429, 503) else None
    return ApiError.of(failed.status, failed.message, code=failed.code, retry_after_s=retry)
