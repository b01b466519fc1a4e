"""What a worker's front knows of the model it serves, without loading it."""

import asyncio
from hashlib import blake2b
from pathlib import Path

import msgspec

from pdkv.daemons.chat_template import ChatTemplates
from pdkv.daemons.completion_request import Prompt
from pdkv.daemons.config import WorkerConfig
from pdkv.daemons.conversation import Conversation
from pdkv.daemons.generation import EncodedPrompt
from pdkv.daemons.tokenization import TextCodec
from pdkv.daemons.tokenizer_config import TokenizerConfig
from pdkv.errors import RequestError
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
    """Prompts that one request may hold, or choices of them."""
    tokenizer_config: TokenizerConfig
    templates: ChatTemplates
    prompt_digest: str
    """Hex, of all that decides which ids a text or a conversation becomes."""
    special_tokens: dict[str, str | None]
    """As text: those that the tokenizer's config names, and ``bos_token``, ``eos_token`` and ``pad_token`` in any case;
    None for one that the checkpoint does not have."""

    @classmethod
    def load(cls, config: WorkerConfig) -> "ServedModel":
        """Read config.json and the tokenizer. Raises ModelError."""
        model = load_config(config.model)
        codec = TextCodec.load(config.model)
        tokenizer_config = TokenizerConfig.load(config.model)
        return cls(
            name=config.served_model_name or config.model.resolve().name,
            path=str(config.model),
            vocab_size=model.vocab_size,
            max_model_len=config.max_model_len or min(model.max_position_embeddings, _DEFAULT_MAX_MODEL_LEN),
            codec=codec,
            max_prompts=config.max_prompts,
            tokenizer_config=tokenizer_config,
            templates=ChatTemplates(tokenizer_config),
            prompt_digest=_prompt_digest(config.model, tokenizer_config),
            special_tokens=_special_tokens(tokenizer_config, codec, model.bos_token_id, model.eos_token_ids),
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

    async def encode_chat(self, conversation: Conversation, at: float, num_bytes: int) -> EncodedPrompt:
        """A conversation as ids; ``num_bytes``: how large it is. Raises RequestError where it cannot be rendered."""
        if num_bytes < _LONG_TEXT:
            return self._encode_chat(conversation, at)
        return await asyncio.to_thread(self._encode_chat, conversation, at)

    def _encode_chat(self, conversation: Conversation, at: float) -> EncodedPrompt:
        codec = self.need_codec("messages", "send token ids to /v1/completions")
        text = self.templates.render(conversation, at)
        return EncodedPrompt(codec.encode(text, add_special_tokens=conversation.add_special_tokens), text)

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


def _prompt_digest(model_dir: Path, config: TokenizerConfig) -> str:
    path = model_dir / "tokenizer.json"
    parts = (path.read_bytes() if path.exists() else b"", config.templates, config.special_tokens())
    return blake2b(msgspec.json.encode(parts, order="sorted"), digest_size=8).hexdigest()


def _special_tokens(
    config: TokenizerConfig, codec: TextCodec | None, bos: int | None, eos: tuple[int, ...]
) -> dict[str, str | None]:
    """As the tokenizer's config names them, else by the ids that the model's config gives."""
    ids = {"bos_token": bos, "eos_token": eos[0] if eos else None, "pad_token": None}
    known = {
        name: codec.spelling(token_id) if codec is not None and token_id is not None else None
        for name, token_id in ids.items()
    }
    return {**known, **config.special_tokens()}
