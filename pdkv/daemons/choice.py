"""One choice of an answer: tokens of one job in, pieces of text and logprobs that may be shown out."""

from collections import deque
from typing import NamedTuple

import msgspec

from pdkv.daemons.completion_request import CompletionRequest
from pdkv.daemons.link import TokensOut
from pdkv.daemons.logprob_form import LogprobForm
from pdkv.daemons.openai_api import Choice
from pdkv.daemons.stop_strings import StopScanner
from pdkv.daemons.tokenization import TextCodec, TextStream
from pdkv.m3.logprobs import NO_TOP, PromptLogprobs, TopLogprobs


class EncodedPrompt(msgspec.Struct, frozen=True):
    """A prompt as token ids."""

    token_ids: list[int]
    text: str | None = None
    """As the client sent it; None for one that came as ids."""
    offsets: list[int] | None = None
    """At which character of ``text`` each token begins; where it is known."""


class _Token(NamedTuple):
    id: int
    logprob: float
    top: TopLogprobs
    offset: int
    """Where it begins in the choice's text."""


class ChoiceWriter:
    """Writes one choice, piece by piece; the pieces' texts join to the choice's text. Owned by one request."""

    def __init__(self, asked: CompletionRequest, index: int, prompt: EncodedPrompt, codec: TextCodec | None) -> None:
        self._asked = asked
        self._index = index
        self._prompt = prompt
        self._codec = codec
        self._text = TextStream(codec)
        self._stops = StopScanner(asked.stop)
        self._logprobs = LogprobForm(codec)
        self._waiting: deque[_Token] = deque()
        """Tokens that begin in text which is held back."""
        self._shown = 0
        """Characters of the choice that went out."""
        self.num_tokens = 0
        """Generated, those of a stop string included."""

    @property
    def stopped(self) -> bool:
        """A stop string was found: whatever comes now is not shown."""
        return self._stops.found

    def echo(self, scored: PromptLogprobs | None) -> Choice:
        """The prompt itself, before anything else. Takes long for a long prompt with ``scored``."""
        prompt, offsets = self._prompt, self._prompt.offsets
        if scored is not None and offsets is None:
            offsets, decoded = self._read_one_by_one()
        else:
            decoded = self._text.push(prompt.token_ids)
        text = prompt.text if prompt.text is not None else decoded
        if scored is not None and offsets is not None:
            self._logprobs.add_prompt(prompt.token_ids, offsets, scored)
        self._shown = len(text)
        return self._choice(text, [], None)

    def push(self, event: TokensOut) -> Choice | None:
        """What these tokens add that may be shown; None for nothing."""
        if self.stopped or self._asked.max_tokens == 0:
            return None
        text = ""
        for i, (token, logprob) in enumerate(zip(event.tokens, event.logprobs, strict=True)):
            self.num_tokens += 1
            offset = self._shown + len(text) + self._stops.num_held
            self._waiting.append(_Token(token, logprob, event.top[i] if event.top else NO_TOP, offset))
            text += self._stops.push(self._text.push([token]))
            if self.stopped:
                break
        tokens = self._release(self._shown + len(text))
        self._shown += len(text)
        return self._choice(text, tokens, None) if text or tokens else None

    def finish(self, reason: str) -> Choice:
        """The last piece. ``reason``: why the engine stopped, unless a stop string was the cause."""
        rest = ""
        if not self.stopped and self._asked.max_tokens > 0:
            rest = self._stops.push(self._text.finish())
            rest += self._stops.finish()
        self._shown += len(rest)
        tokens = self._release(self._shown if self.stopped else None)
        return self._choice(rest, tokens, "stop" if self.stopped else reason)

    def _release(self, shown: int | None) -> list[_Token]:
        """Tokens that begin in shown text, or stand behind all of it while nothing is held back."""
        everything = shown is None or (self._stops.num_held == 0 and not self.stopped)
        tokens = []
        while self._waiting and (everything or (shown is not None and self._waiting[0].offset < shown)):
            tokens.append(self._waiting.popleft())
        return tokens

    def _choice(self, text: str, tokens: list[_Token], reason: str | None) -> Choice:
        block = None
        if self._asked.logprobs is not None:
            for token in tokens:
                self._logprobs.add(token.id, token.logprob, token.top, token.offset)
            block = self._logprobs.take()
        ids = [token.id for token in tokens] if self._asked.return_token_ids else msgspec.UNSET
        return Choice(text=text, index=self._index, logprobs=block, finish_reason=reason, token_ids=ids)

    def _read_one_by_one(self) -> tuple[list[int], str]:
        """At which character of the decoded prompt each token begins, and the text itself."""
        offsets, pieces = [], []
        for token in self._prompt.token_ids:
            offsets.append(self._text.num_characters)
            pieces.append(self._text.push([token]))
        return offsets, "".join(pieces)


def merge(pieces: list[Choice]) -> Choice:
    """All pieces of one choice as the whole one; the last says why it ended."""
    last = pieces[-1]
    block, ids = last.logprobs, last.token_ids
    if block is not None:
        parts = [piece.logprobs for piece in pieces if piece.logprobs is not None]
        block = type(block)(
            [offset for part in parts for offset in part.text_offset],
            [value for part in parts for value in part.token_logprobs],
            [text for part in parts for text in part.tokens],
            [top for part in parts for top in part.top_logprobs],
        )
    if ids is not msgspec.UNSET:
        ids = [token for piece in pieces if piece.token_ids is not msgspec.UNSET for token in piece.token_ids]
    text = "".join(piece.text for piece in pieces)
    return msgspec.structs.replace(last, text=text, logprobs=block, token_ids=ids)
