"""What a worker's front knows of the model it serves, without loading it."""

import asyncio
import json
from pathlib import Path
from typing import Any

import msgspec

from pdkv.daemons.choice import EncodedPrompt
from pdkv.daemons.completion_request import Prompt
from pdkv.daemons.config import WorkerConfig
from pdkv.daemons.tokenization import TextCodec
from pdkv.errors import ModelError, RequestError
from pdkv.m3.config import load_config

_DEFAULT_MAX_MODEL_LEN = 32_768
_LONG_TEXT = 20_000
"""Characters above which texts are encoded outside the event loop, so that running streams do not stall."""


class ServedModel(msgspec.Struct, frozen=True):
    """Name, size and tokenizer of a checkpoint."""

    name: str
    path: str
    vocab_size: int
    max_model_len: int
    codec: TextCodec | None
    max_prompts: int
    """Prompts that one request may hold."""
    special_tokens: dict[str, str | None] = {}
    """``bos_token``, ``eos_token`` and ``pad_token`` as text; None for one that the checkpoint does not have."""

    @classmethod
    def load(cls, config: WorkerConfig) -> "ServedModel":
        """Read config.json and the tokenizer. Raises ModelError."""
        model = load_config(config.model)
        codec = TextCodec.load(config.model)
        return cls(
            name=config.served_model_name or config.model.resolve().name,
            path=str(config.model),
            vocab_size=model.vocab_size,
            max_model_len=config.max_model_len or min(model.max_position_embeddings, _DEFAULT_MAX_MODEL_LEN),
            codec=codec,
            max_prompts=config.max_prompts,
            special_tokens=_special_tokens(config.model, codec, model.bos_token_id, model.eos_token_ids),
        )

    @property
    def names(self) -> tuple[str, str]:
        """What a request may call it."""
        return self.name, self.path

    def need_codec(self, param: str, instead: str) -> TextCodec:
        """The tokenizer. Raises RequestError that names ``param`` and what to do ``instead`` when there is none."""
        if self.codec is None:
            raise RequestError(f"the model {self.name!r} has no tokenizer.json; {instead}", param=param)
        return self.codec

    async def encode(self, prompts: list[Prompt], *, offsets: bool) -> list[EncodedPrompt]:
        """All prompts as ids. Raises RequestError for a text when there is no tokenizer."""
        num_characters = sum(len(prompt) for prompt in prompts if isinstance(prompt, str))
        if num_characters < _LONG_TEXT:
            return self._encode(prompts, offsets)
        return await asyncio.to_thread(self._encode, prompts, offsets)

    def _encode(self, prompts: list[Prompt], offsets: bool) -> list[EncodedPrompt]:
        encoded = []
        for prompt in prompts:
            if not isinstance(prompt, str):
                encoded.append(EncodedPrompt(prompt))
                continue
            codec = self.need_codec("prompt", "send 'prompt' as a list of token ids")
            ids, starts = codec.encode_with_offsets(prompt) if offsets else (codec.encode(prompt), None)
            encoded.append(EncodedPrompt(ids, prompt, starts))
        return encoded


def _special_tokens(
    model_dir: Path, codec: TextCodec | None, bos: int | None, eos: tuple[int, ...]
) -> dict[str, str | None]:
    """As ``tokenizer_config.json`` names them, else by the ids that the model's config gives."""
    path = model_dir / "tokenizer_config.json"
    named: dict[str, Any] = {}
    if path.exists():
        try:
            named = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as exc:
            raise ModelError(f"{path} is not JSON: {exc}") from exc
    found: dict[str, str | None] = {}
    ids = {"bos_token": bos, "eos_token": eos[0] if eos else None, "pad_token": None}
    for name, token_id in ids.items():
        value = named.get(name)
        text = value.get("content") if isinstance(value, dict) else value
        known = codec.spelling(token_id) if codec is not None and token_id is not None else None
        found[name] = text if isinstance(text, str) else known
    return found
