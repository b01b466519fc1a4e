"""Text to token ids and back over HTTP, in the form that vLLM gave it and evaluation harnesses ask for."""

import time
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from pdkv.daemons import http_server
from pdkv.daemons.conversation import CONVERSATION, Conversation
from pdkv.daemons.generation import check_model, check_token_ids
from pdkv.daemons.request_fields import Readers, read_as, read_fields, read_values
from pdkv.daemons.served_model import ServedModel
from pdkv.daemons.tokenizer_config import DEFAULT_TEMPLATE
from pdkv.errors import RequestError

_TEXT: Readers = {
    "model": read_as(str, "a model's name"),
    "prompt": read_as(str, "text"),
    "add_special_tokens": read_as(bool, "true or false"),
    "return_token_strs": read_as(bool, "true or false"),
}
_CHAT: Readers = {
    "model": read_as(str, "a model's name"),
    "return_token_strs": read_as(bool, "true or false"),
    **CONVERSATION,
}
_DETOKENIZE: Readers = {
    "model": read_as(str, "a model's name"),
    "tokens": read_as(list[int], "a list of token ids"),
}


class Tokenized(msgspec.Struct, frozen=True):
    """Answer of ``POST /tokenize``."""

    tokens: list[int]
    count: int
    max_model_len: int
    token_strs: list[str] | None = None


class Detokenized(msgspec.Struct, frozen=True):
    """Answer of ``POST /detokenize``."""

    prompt: str


class TextRoutes:
    """Handlers of a worker's front; they need the tokenizer alone, so they answer while the model is loading."""

    def __init__(self, served: ServedModel) -> None:
        self._served = served

    async def tokenize(self, request: Request) -> Response:
        """``{"prompt": TEXT, "add_special_tokens": true, "return_token_strs": false}``, or ``messages`` and what goes
        with them in a chat request."""
        body = await http_server.read_body(request)
        codec = self._served.need_codec("prompt", "it takes and gives token ids only")
        if "messages" in read_fields(body):
            asked = self._read(body, _CHAT, "messages")
            prompt = await self._served.encode_chat(Conversation.of(asked), time.time(), num_bytes=len(body))
            tokens = prompt.token_ids
        else:
            asked = self._read(body, _TEXT, "prompt")
            tokens = codec.encode(asked["prompt"], add_special_tokens=asked.get("add_special_tokens", True))
        strings = [codec.token_text(token) for token in tokens] if asked.get("return_token_strs") else None
        return _answer(Tokenized(tokens, len(tokens), self._served.max_model_len, strings))

    async def detokenize(self, request: Request) -> Response:
        """``{"tokens": IDS}``; special tokens become text too, so that the way back gives the same ids."""
        asked = self._read(await http_server.read_body(request), _DETOKENIZE, "tokens")
        codec = self._served.need_codec("tokens", "it takes and gives token ids only")
        tokens = asked["tokens"]
        if tokens:
            check_token_ids(tokens, self._served.vocab_size, "tokens")
        return _answer(Detokenized(codec.decode(tokens, skip_special_tokens=False)))

    async def tokenizer_info(self, _request: Request) -> Response:
        """What the tokenizer's config says, special tokens as text, and the chat template wherever it stands.

        Harnesses take its presence for the sign that ``/tokenize`` is there.
        """
        self._served.need_codec("model", "there is nothing to tell of it")
        config = self._served.tokenizer_config
        template = config.templates.get(DEFAULT_TEMPLATE)
        known = {"max_model_len": self._served.max_model_len, "chat_template": template}
        return http_server.json_response(msgspec.json.encode({**config.values, **known, **self._served.special_tokens}))

    def _read(self, body: bytes, readers: Readers, needed: str) -> dict[str, Any]:
        values = read_values(read_fields(body), readers)
        if needed not in values:
            raise RequestError(f"the field {needed!r} is missing", param=needed)
        check_model(values.get("model"), self._served.names)
        return values


def _answer(body: msgspec.Struct) -> Response:
    return http_server.json_response(msgspec.json.encode(body))
