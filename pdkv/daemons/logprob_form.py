"""Log-probabilities of tokens in OpenAI's two forms: lists beside one another, and an object a token."""

from collections.abc import Sequence

from pdkv.daemons.chat_api import ChatLogprobs, ChatToken, RivalToken
from pdkv.daemons.choice import Piece, ScoredPrompt
from pdkv.daemons.openai_api import Logprobs
from pdkv.daemons.tokenization import TextCodec
from pdkv.m3.logprobs import NO_TOP, TopLogprobs


def logprobs_of(piece: Piece, codec: TextCodec | None) -> Logprobs:
    """The form of completions. Takes long for a long scored prompt."""
    form = _Lists(codec)
    if piece.prompt is not None:
        form.add_prompt(piece.prompt)
    for token in piece.tokens:
        form.add(token.id, token.logprob, token.top, token.offset)
    return form.block


def chat_logprobs_of(piece: Piece, codec: TextCodec) -> ChatLogprobs:
    """The form of chat completions: the likeliest tokens as they were asked for, the token itself not added."""

    def rival(token: int, logprob: float) -> RivalToken:
        spelled = codec.token_bytes(token)
        return RivalToken(codec.token_text(token), logprob, None if spelled is None else list(spelled))

    content = []
    for token in piece.tokens:
        own = rival(token.id, token.logprob)
        top = [rival(*other) for other in zip(token.top.token_ids, token.top.logprobs, strict=True)]
        content.append(ChatToken(own.token, own.logprob, own.bytes, top))
    return ChatLogprobs(content)


class _Lists:
    """Grows by tokens. Without a tokenizer they are named ``token_id:N``."""

    def __init__(self, codec: TextCodec | None) -> None:
        self._codec = codec
        self.block = Logprobs([], [], [], [])

    def add(self, token: int, logprob: float, top: TopLogprobs, offset: int) -> None:
        """One token that begins at character ``offset``, with its likeliest rivals."""
        block, text = self.block, self._text(token)
        ranked: dict[str, float] = {}
        for rival, value in zip(top.token_ids, top.logprobs, strict=True):
            ranked.setdefault(self._text(rival), value)  # of tokens that read the same, the likelier
        ranked.setdefault(text, logprob)
        block.tokens.append(text)
        block.token_logprobs.append(logprob)
        block.top_logprobs.append(ranked)
        block.text_offset.append(offset)

    def add_prompt(self, prompt: ScoredPrompt) -> None:
        """A whole prompt; before its first token nothing stands that could have foretold it."""
        tokens, offsets = prompt.token_ids, prompt.offsets
        self.block.tokens.append(self._text(tokens[0]))
        self.block.token_logprobs.append(None)
        self.block.top_logprobs.append(None)
        self.block.text_offset.append(offsets[0])
        own, tops = prompt.logprobs.unpack()
        ranked: Sequence[TopLogprobs] = tops or [NO_TOP] * len(own)
        for token, offset, logprob, top in zip(tokens[1:], offsets[1:], own, ranked, strict=True):
            self.add(token, logprob, top, offset)

    def _text(self, token: int) -> str:
        return f"token_id:{token}" if self._codec is None else self._codec.token_text(token)
