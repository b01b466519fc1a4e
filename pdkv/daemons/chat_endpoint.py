"""``/v1/chat/completions``: from a client's messages to what is asked of the engine, and the form of the answer."""

from pdkv.daemons.answer import AnswerForm
from pdkv.daemons.chat_form import ChatForm
from pdkv.daemons.chat_request import parse_chat
from pdkv.daemons.generation import Generation, check_length, check_model, check_num_choices, check_token_ids
from pdkv.daemons.served_model import ServedModel

_HOW_TO_DO_WITHOUT = "send token ids to /v1/completions"


class ChatEndpoint:
    """One edge of a worker; both roles refuse the same in the same words."""

    def __init__(self, served: ServedModel) -> None:
        self._served = served

    async def read(self, body: bytes, max_model_len: int, at: float) -> Generation:
        """The conversation as one prompt. ``at``: the request's time, in seconds since 1970. Raises RequestError."""
        served = self._served
        asked = parse_chat(body)
        check_model(asked.options.model, served.names)
        check_num_choices(1, asked.options.n, served.max_prompts)
        prompt = await served.encode_chat(asked.conversation, at, num_bytes=len(body))
        num_tokens = len(prompt.token_ids)
        check_token_ids(prompt.token_ids, served.vocab_size, "messages")
        max_tokens = asked.max_tokens if asked.max_tokens is not None else max(1, max_model_len - num_tokens)
        check_length(num_tokens, max_tokens, max_model_len, ("messages", "max_tokens"))
        return Generation([prompt], max_tokens, asked.options)

    def form(self, asked: Generation) -> AnswerForm:
        codec = self._served.need_codec("messages", _HOW_TO_DO_WITHOUT)
        return ChatForm(asked.options, self._served.name, codec)
