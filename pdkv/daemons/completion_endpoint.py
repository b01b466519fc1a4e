"""``/v1/completions``: from a client's body to what is asked of the engine, and the form of the answer."""

from pdkv.daemons.answer import AnswerForm
from pdkv.daemons.completion_form import CompletionForm
from pdkv.daemons.completion_request import parse_completion
from pdkv.daemons.generation import (
    Generation,
    check_length,
    check_model,
    check_num_choices,
    check_prompt_logprobs,
    check_token_ids,
)
from pdkv.daemons.served_model import ServedModel


class CompletionEndpoint:
    """One edge of a worker; both roles refuse the same in the same words."""

    def __init__(self, served: ServedModel) -> None:
        self._served = served

    async def read(self, body: bytes, max_model_len: int, at: float) -> Generation:
        """The request, with prompts that the model knows and that fit. Raises RequestError."""
        served = self._served
        asked = parse_completion(body)
        options = asked.options
        check_model(options.model, served.names)
        check_num_choices(len(asked.prompts), options.n, served.max_prompts)
        if options.stop:
            served.need_codec("stop", "stop strings cannot be found in its answers")
        prompts = await served.encode(asked.prompts, offsets=options.prompt_logprobs is not None)
        for prompt in prompts:
            check_token_ids(prompt.token_ids, served.vocab_size)
            check_length(len(prompt.token_ids), max(1, asked.max_tokens), max_model_len)
        check_prompt_logprobs(options, options.n * sum(len(prompt.token_ids) for prompt in prompts))
        return Generation(prompts, asked.max_tokens, options)

    def form(self, asked: Generation) -> AnswerForm:
        return CompletionForm(asked.options, self._served.name, self._served.codec)
