"""Text to token ids and back, the way back in pieces that join to the whole text."""

import re
from functools import cache
from pathlib import Path

import tokenizers

from pdkv.errors import ModelError

_REPLACEMENT = "\ufffd"
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class TextCodec:
    """A checkpoint's tokenizer. Safe to share between threads."""

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self._texts: dict[int, str] = {}
        self._anchor = next(iter(tokenizer.encode("a", add_special_tokens=False).ids), 0)

    @classmethod
    def load(cls, model_dir: Path) -> "TextCodec | None":
        """The tokenizer of a checkpoint; None when it has none and therefore serves token ids only."""
        path = model_dir / "tokenizer.json"
        if not path.exists():
            return None
        try:
            return cls(tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8")))
        except Exception as exc:  # noqa: BLE001  the library raises bare Exception and nothing narrower
            raise ModelError(f"{path} is not a tokenizer: {exc}") from exc

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids, with the special tokens that the checkpoint's tokenizer adds to a text."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[int]]:
        """Token ids as ``encode`` gives them, and at which character of ``text`` each begins."""
        encoding = self._tokenizer.encode(text)
        return encoding.ids, [begin for begin, _ in encoding.offsets]

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool = True) -> str:
        """The text of all ids."""
        text: str = self._tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)
        return text

    def token_text(self, token_id: int) -> str:
        """One token as it reads inside a text, leading space included; special tokens by name.

        A token that is only part of a character is named as the vocabulary spells it.
        """
        text = self._texts.get(token_id)
        if text is None:
            text = self._texts[token_id] = self._read_token(token_id)
        return text

    def _read_token(self, token_id: int) -> str:
        # Decoders treat the first token of a text differently: so it is read behind another one.
        before = self.decode([self._anchor], skip_special_tokens=False)
        both = self.decode([self._anchor, token_id], skip_special_tokens=False)
        text = both.removeprefix(before) if both.startswith(before) else self.decode([token_id])
        if text and _REPLACEMENT not in text:
            return text
        return self.spelling(token_id) or text

    def token_bytes(self, token_id: int) -> bytes | None:
        """What a token adds to a text, in UTF-8; of one that is part of a character, that part.

        None where such a part is spelled in a way that is not known.
        """
        spelled = self.spelling(token_id)
        text = self.token_text(token_id)
        if spelled is None or text != spelled or _REPLACEMENT not in self.decode([token_id], skip_special_tokens=False):
            return text.encode()
        if found := _BYTE.fullmatch(spelled):
            return bytes.fromhex(found[1])
        bytes_of = _byte_of_character()
        return bytes(bytes_of[char] for char in spelled) if all(char in bytes_of for char in spelled) else None

    def spelling(self, token_id: int) -> str | None:
        """One token as the vocabulary spells it; None for an id that it does not have."""
        spelled: str | None = self._tokenizer.id_to_token(token_id)
        return spelled


class TextStream:
    """Turns tokens that come one by one into text that is never taken back; owned by one request.

    A character whose bytes are spread over tokens is held back until it is whole. Only a window of recent tokens is
    decoded anew for each token: it starts where the text last was complete, with the tokens before it as context,
    because decoders treat the first token of a text differently (leading space).
    """

    def __init__(self, codec: TextCodec | None) -> None:
        self._codec = codec
        self.num_characters = 0
        """That have come out so far."""
        self._window: list[int] = []
        self._num_context = 0
        """Leading tokens of the window whose text went out before."""
        self._sent = 0
        """Characters of the window's text that went out, those of the context included."""

    def push(self, token_ids: list[int]) -> str:
        """The text that these tokens complete; "" while there is none, and always without a tokenizer."""
        if self._codec is None:
            return ""
        self._window += token_ids
        text = self._codec.decode(self._window)
        complete = text.rstrip(_REPLACEMENT)
        new = complete[self._sent :]
        self._sent = max(self._sent, len(complete))
        if len(complete) == len(text) and new:
            self._advance()
        self.num_characters += len(new)
        return new

    def finish(self) -> str:
        """What is held back: the text of bytes that never became a character."""
        if self._codec is None:
            return ""
        rest = self._codec.decode(self._window)[self._sent :]
        self._sent += len(rest)
        self.num_characters += len(rest)
        return rest

    def _advance(self) -> None:
        assert self._codec is not None, "without a tokenizer there is no window"
        self._window = self._window[self._num_context :]
        self._num_context = len(self._window)
        self._sent = len(self._codec.decode(self._window))


@cache
def _byte_of_character() -> dict[str, int]:
    """How byte-level vocabularies spell bytes: printable ones as themselves, the others from U+0100 on, in order."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(0x100) if byte not in printable]
    spelled = {chr(byte): byte for byte in printable}
    return spelled | {chr(0x100 + i): byte for i, byte in enumerate(others)}
