"""Answers in the form of OpenAI's chat completions."""

import time
from collections.abc import Sequence

import msgspec

from pdkv.daemons.chat_api import (
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatDelta,
    ChatLogprobs,
    ChatMessage,
)
from pdkv.daemons.choice import Piece
from pdkv.daemons.generation import Options
from pdkv.daemons.logprob_form import chat_logprobs_of
from pdkv.daemons.openai_api import DebugBlock, Usage
from pdkv.daemons.tokenization import TextCodec


class ChatForm:
    """Writes one answer. Belongs to one request: it knows which of its choices have begun."""

    def __init__(self, options: Options, model: str, codec: TextCodec) -> None:
        self._options = options
        self._model = model
        self._codec = codec
        self._id = f"chatcmpl-{time.time_ns():x}"
        self._created = int(time.time())
        self._begun: set[int] = set()

    def whole(self, choices: Sequence[Piece], usage: Usage, debug: DebugBlock | None) -> ChatCompletion:
        written = [
            ChatChoice(
                index=piece.choice,
                message=ChatMessage(piece.text),
                logprobs=self._logprobs(piece),
                finish_reason=piece.finish_reason,
                token_ids=self._token_ids(piece),
            )
            for piece in choices
        ]
        return ChatCompletion(
            id=self._id,
            created=self._created,
            model=self._model,
            choices=written,
            usage=usage,
            pdkv=debug or msgspec.UNSET,
        )

    def chunks(self, piece: Piece, debug: DebugBlock | None) -> Sequence[ChatChunk]:
        """The role before a choice's first text, text and tokens, and an empty delta that says why it ended."""
        index = piece.choice
        chunks = []
        if index not in self._begun:
            self._begun.add(index)
            chunks.append(self._chunk(ChatChunkChoice(index=index, delta=ChatDelta("assistant", ""))))
        if piece.text or piece.tokens:
            said = ChatChunkChoice(
                index=index,
                delta=ChatDelta(content=piece.text),
                logprobs=self._logprobs(piece),
                token_ids=self._token_ids(piece),
            )
            chunks.append(self._chunk(said))
        if piece.finish_reason is not None:
            ended = ChatChunkChoice(index=index, delta=ChatDelta(), finish_reason=piece.finish_reason)
            chunks.append(msgspec.structs.replace(self._chunk(ended), pdkv=debug or msgspec.UNSET))
        return chunks

    def usage_chunk(self, usage: Usage) -> ChatChunk:
        return ChatChunk(id=self._id, created=self._created, model=self._model, choices=(), usage=usage)

    def _chunk(self, choice: ChatChunkChoice) -> ChatChunk:
        usage = None if self._options.include_usage else msgspec.UNSET
        return ChatChunk(id=self._id, created=self._created, model=self._model, choices=(choice,), usage=usage)

    def _logprobs(self, piece: Piece) -> ChatLogprobs | None:
        return None if self._options.logprobs is None else chat_logprobs_of(piece, self._codec)

    def _token_ids(self, piece: Piece) -> Sequence[int] | msgspec.UnsetType:
        return [token.id for token in piece.tokens] if self._options.return_token_ids else msgspec.UNSET
