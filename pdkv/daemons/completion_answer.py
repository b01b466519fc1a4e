"""Turns what the engine process says of one job into OpenAI's answer, whole or as a stream."""

import time
from collections.abc import AsyncIterator

import msgspec

from pdkv.daemons import openai_api
from pdkv.daemons.engine_link import JobEvent, JobEvents
from pdkv.daemons.link import JobFailed, JobFinished, TokensOut
from pdkv.daemons.openai_api import ApiError, Choice, Completion, CompletionRequest, DebugBlock, Usage
from pdkv.daemons.tokenization import TextCodec, TextStream


class CompletionAnswer:
    """Turns one job's messages into OpenAI's answer, whole or as a stream."""

    def __init__(
        self,
        asked: CompletionRequest,
        model: str,
        codec: TextCodec | None,
        num_prompt_tokens: int,
        debug: DebugBlock | None,
    ) -> None:
        self._asked = asked
        self._model = model
        self._text = TextStream(codec)
        self._num_prompt_tokens = num_prompt_tokens
        self._num_tokens = 0
        self._debug = debug
        self._id = f"cmpl-{time.time_ns():x}"
        self._created = int(time.time())

    async def whole(self, event: JobEvent, events: JobEvents) -> bytes:
        """The body of a 200. Raises ApiError when the job fails on the way."""
        text: list[str] = []
        tokens: list[int] = []
        while isinstance(event, TokensOut):
            tokens += event.tokens
            text.append(self._push(event))
            event = await events.next()
        if isinstance(event, JobFailed):
            raise failure(event)
        text.append(self._text.finish())
        completion = self._completion(self._choice("".join(text), tokens, event.reason))
        return msgspec.json.encode(
            msgspec.structs.replace(completion, usage=self._usage(), pdkv=self._debug_block(event))
        )

    async def stream(self, event: JobEvent, events: JobEvents) -> AsyncIterator[bytes]:
        """Server-sent events; a failure on the way is an error event, and no [DONE] follows it."""
        while isinstance(event, TokensOut):
            yield self._chunk(self._choice(self._push(event), event.tokens, None))
            event = await events.next()
        if isinstance(event, JobFailed):
            yield openai_api.encode_event(failure(event).body)
            return
        yield self._chunk(self._choice(self._text.finish(), [], event.reason), event)
        if self._asked.include_usage:
            yield openai_api.encode_event(msgspec.structs.replace(self._completion(), usage=self._usage()))
        yield openai_api.END_OF_STREAM

    def _push(self, event: TokensOut) -> str:
        self._num_tokens += len(event.tokens)
        return self._text.push(event.tokens)

    def _chunk(self, choice: Choice, finished: JobFinished | None = None) -> bytes:
        chunk = self._completion(choice)
        if self._asked.include_usage:
            chunk = msgspec.structs.replace(chunk, usage=None)
        if finished is not None:
            chunk = msgspec.structs.replace(chunk, pdkv=self._debug_block(finished))
        return openai_api.encode_event(chunk)

    def _choice(self, text: str, tokens: list[int], reason: str | None) -> Choice:
        token_ids = tokens if self._asked.return_token_ids else msgspec.UNSET
        return Choice(text=text, finish_reason=reason, token_ids=token_ids)

    def _completion(self, *choices: Choice) -> Completion:
        return Completion(id=self._id, created=self._created, model=self._model, choices=choices)

    def _usage(self) -> Usage:
        return Usage.of(self._num_prompt_tokens, self._num_tokens)

    def _debug_block(self, finished: JobFinished) -> DebugBlock | msgspec.UnsetType:
        if self._debug is None:
            return msgspec.UNSET
        return msgspec.structs.replace(self._debug, transfer=finished.report)


def failure(failed: JobFailed) -> ApiError:
    """A failed job as the client sees it."""
    retry = 1 if failed.status in (429, 503) else None
    return ApiError.of(failed.status, failed.message, code=failed.code, retry_after_s=retry)
