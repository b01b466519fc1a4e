"""One choice of an answer: tokens of one job in, pieces of text with their tokens that may be shown out."""

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import msgspec

from pdkv.daemons.generation import Generation
from pdkv.daemons.link import TokensOut
from pdkv.daemons.stop_strings import StopScanner
from pdkv.daemons.tokenization import TextCodec, TextStream
from pdkv.m3.logprobs import NO_TOP, PromptLogprobs, TopLogprobs


class ShownToken(NamedTuple):
    """A generated token that the client may see."""

    id: int
    logprob: float
    top: TopLogprobs
    offset: int
    """Where it begins in the choice's text, in characters."""


class ScoredPrompt(NamedTuple):
    """The prompt that a choice echoes, with what the model thought of it."""

    token_ids: Sequence[int]
    offsets: Sequence[int]
    """Where each token begins in the choice's text, in characters."""
    logprobs: PromptLogprobs
    """Of all tokens but the first."""


class Piece(msgspec.Struct, frozen=True, kw_only=True):
    """What may be shown of a choice by now and was not before; no API's form yet."""

    choice: int
    text: str
    tokens: list[ShownToken] = []
    finish_reason: str | None = None
    """Why the choice ended, in its last piece: "stop" or "length"."""
    prompt: ScoredPrompt | None = None
    """In the first piece, where it was asked for."""


class ChoiceWriter:
    """Writes one choice, piece by piece; the pieces' texts join to the choice's text. Owned by one request."""

    def __init__(self, asked: Generation, index: int, codec: TextCodec | None) -> None:
        self._shows_tokens = asked.max_tokens > 0
        self._index = index
        self._prompt = asked.prompt_of(index)
        self._text = TextStream(codec)
        self._stops = StopScanner(asked.options.stop)
        self._waiting: deque[ShownToken] = deque()
        """Tokens that begin in text which is held back."""
        self._shown = 0
        """Characters of the choice that went out."""
        self.num_tokens = 0
        """Generated, those of a stop string included."""

    @property
    def stopped(self) -> bool:
        """A stop string was found: whatever comes now is not shown."""
        return self._stops.found

    def echo(self, scored: PromptLogprobs | None) -> Piece:
        """The prompt itself, before anything else. Takes long for a long prompt with ``scored``."""
        prompt, offsets = self._prompt, self._prompt.offsets
        if scored is not None and offsets is None:
            offsets, decoded = self._read_one_by_one()
        else:
            decoded = self._text.push(prompt.token_ids)
        text = prompt.text if prompt.text is not None else decoded
        self._shown = len(text)
        told = ScoredPrompt(prompt.token_ids, offsets, scored) if scored is not None and offsets is not None else None
        return Piece(choice=self._index, text=text, prompt=told)

    def push(self, event: TokensOut) -> Piece | None:
        """What these tokens add that may be shown; None for nothing."""
        if self.stopped or not self._shows_tokens:
            return None
        text = ""
        for i, (token, logprob) in enumerate(zip(event.tokens, event.logprobs, strict=True)):
            self.num_tokens += 1
            offset = self._shown + len(text) + self._stops.num_held
            self._waiting.append(ShownToken(token, logprob, event.top[i] if event.top else NO_TOP, offset))
            text += self._stops.push(self._text.push([token]))
            if self.stopped:
                break
        tokens = self._release(self._shown + len(text))
        self._shown += len(text)
        return Piece(choice=self._index, text=text, tokens=tokens) if text or tokens else None

    def finish(self, reason: str) -> Piece:
        """The last piece. ``reason``: why the engine stopped, unless a stop string was the cause."""
        rest = ""
        if not self.stopped and self._shows_tokens:
            rest = self._stops.push(self._text.finish())
            rest += self._stops.finish()
        self._shown += len(rest)
        tokens = self._release(self._shown if self.stopped else None)
        told = "stop" if self.stopped else reason
        return Piece(choice=self._index, text=rest, tokens=tokens, finish_reason=told)

    def _release(self, shown: int | None) -> list[ShownToken]:
        """Tokens that begin in shown text, or stand behind all of it while nothing is held back."""
        everything = shown is None or (self._stops.num_held == 0 and not self.stopped)
        tokens = []
        while self._waiting and (everything or (shown is not None and self._waiting[0].offset < shown)):
            tokens.append(self._waiting.popleft())
        return tokens

    def _read_one_by_one(self) -> tuple[list[int], str]:
        """At which character of the decoded prompt each token begins, and the text itself."""
        offsets, pieces = [], []
        for token in self._prompt.token_ids:
            offsets.append(self._text.num_characters)
            pieces.append(self._text.push([token]))
        return offsets, "".join(pieces)


def merge(pieces: Sequence[Piece]) -> Piece:
    """All pieces of one choice as the whole one; the last says why it ended."""
    return msgspec.structs.replace(
        pieces[-1],
        text="".join(piece.text for piece in pieces),
        tokens=[token for piece in pieces for token in piece.tokens],
        prompt=pieces[0].prompt,
    )
