"""Answers in the form of OpenAI's completions."""

import time
from collections.abc import Sequence

import msgspec

from pdkv.daemons.choice import Piece
from pdkv.daemons.generation import Options
from pdkv.daemons.logprob_form import logprobs_of
from pdkv.daemons.openai_api import Choice, Completion, DebugBlock, Usage
from pdkv.daemons.tokenization import TextCodec


class CompletionForm:
    """Writes one answer."""

    def __init__(self, options: Options, model: str, codec: TextCodec | None) -> None:
        self._options = options
        self._codec = codec
        self._blank = Completion(id=f"cmpl-{time.time_ns():x}", created=int(time.time()), model=model, choices=())

    def whole(self, choices: Sequence[Piece], usage: Usage, debug: DebugBlock | None) -> Completion:
        written = [self.choice(piece) for piece in choices]
        return msgspec.structs.replace(self._blank, choices=written, usage=usage, pdkv=debug or msgspec.UNSET)

    def chunks(self, piece: Piece, debug: DebugBlock | None) -> Sequence[Completion]:
        usage = None if self._options.include_usage else msgspec.UNSET
        choices = (self.choice(piece),)
        return [msgspec.structs.replace(self._blank, choices=choices, usage=usage, pdkv=debug or msgspec.UNSET)]

    def usage_chunk(self, usage: Usage) -> Completion:
        return msgspec.structs.replace(self._blank, usage=usage)

    def choice(self, piece: Piece) -> Choice:
        """A whole choice or a piece of one."""
        asked = self._options
        return Choice(
            text=piece.text,
            index=piece.choice,
            logprobs=logprobs_of(piece, self._codec) if asked.logprobs is not None else None,
            finish_reason=piece.finish_reason,
            token_ids=[token.id for token in piece.tokens] if asked.return_token_ids else msgspec.UNSET,
        )
