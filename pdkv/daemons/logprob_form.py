"""Log-probabilities of tokens in OpenAI's legacy form, collected token by token."""

from collections.abc import Sequence

from pdkv.daemons.openai_api import Logprobs
from pdkv.daemons.tokenization import TextCodec
from pdkv.m3.logprobs import NO_TOP, PromptLogprobs, TopLogprobs


class LogprobForm:
    """Grows by tokens, gives its block and begins anew. Without a tokenizer tokens are named ``token_id:N``."""

    def __init__(self, codec: TextCodec | None) -> None:
        self._codec = codec
        self._block = Logprobs([], [], [], [])

    def add(self, token: int, logprob: float, top: TopLogprobs, offset: int) -> None:
        """One token that begins at character ``offset``, with its likeliest rivals."""
        block, text = self._block, self._text(token)
        ranked: dict[str, float] = {}
        for rival, value in zip(top.token_ids, top.logprobs, strict=True):
            ranked.setdefault(self._text(rival), value)  # of tokens that read the same, the likelier
        ranked.setdefault(text, logprob)
        block.tokens.append(text)
        block.token_logprobs.append(logprob)
        block.top_logprobs.append(ranked)
        block.text_offset.append(offset)

    def add_prompt(self, tokens: Sequence[int], offsets: Sequence[int], scored: PromptLogprobs) -> None:
        """A whole prompt; ``scored`` speaks of all its tokens but the first, before which nothing stands."""
        self._block.tokens.append(self._text(tokens[0]))
        self._block.token_logprobs.append(None)
        self._block.top_logprobs.append(None)
        self._block.text_offset.append(offsets[0])
        own, tops = scored.unpack()
        for token, offset, logprob, top in zip(tokens[1:], offsets[1:], own, tops or [NO_TOP] * len(own), strict=True):
            self.add(token, logprob, top, offset)

    def take(self) -> Logprobs:
        """All that was added since the last time."""
        block, self._block = self._block, Logprobs([], [], [], [])
        return block

    def _text(self, token: int) -> str:
        return f"token_id:{token}" if self._codec is None else self._codec.token_text(token)
