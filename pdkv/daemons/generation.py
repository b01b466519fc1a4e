"""What is asked of the engine, whichever API it came by: prompts as token ids, and how to answer them."""

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from pdkv.errors import RequestError
from pdkv.m3.logprobs import PromptLogprobs

DEFAULT_TEMPERATURE = 1.0
"""OpenAI's: a client that wants greedy decoding says ``temperature: 0``."""
MAX_PROMPT_LOGPROB_BYTES = 6 << 20
"""Of all prompts of a request together, packed: they travel in one message a prompt."""


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """How to answer; both APIs have all of it, under one name or another."""

    model: str | None = None
    """None: the client named none and takes what is served."""
    temperature: float = DEFAULT_TEMPERATURE
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    n: int = 1
    """Choices for each prompt."""
    logprobs: int | None = None
    """Likeliest tokens to tell with each token; None: tell nothing, not even of the tokens themselves."""
    echo: bool = False
    stream: bool = False
    include_usage: bool = False
    ignore_eos: bool = False
    """Extension: go on to the most tokens whatever the model says."""
    return_token_ids: bool = False
    """Extension: add ``token_ids`` to every choice."""
    user: str = ""
    """Read and not used."""

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> "Options":
        """From the fields that were read, whatever else is among them. Raises RequestError for what does not fit."""
        named = {name: values[name] for name in cls.__struct_fields__ if name in values}
        if "stream_options" in values:
            if not values.get("stream"):
                raise RequestError(
                    "'stream_options' is only allowed together with 'stream': true", param="stream_options"
                )
            named["include_usage"] = values["stream_options"]
        return cls(**named)

    @property
    def prompt_logprobs(self) -> int | None:
        """Likeliest tokens to tell with each prompt token; None: the prompt is not scored."""
        return self.logprobs if self.echo else None


class EncodedPrompt(msgspec.Struct, frozen=True):
    """A prompt as token ids."""

    token_ids: list[int]
    text: str | None = None
    """As the client sent it; None for one that came as ids."""
    offsets: list[int] | None = None
    """At which character of ``text`` each token begins; where it is known."""


class Generation(msgspec.Struct, frozen=True):
    """A request that the model can serve: what depends on the model has been checked."""

    prompts: list[EncodedPrompt]
    max_tokens: int
    """Of each choice; 0, with ``echo`` only: nothing but the prompt."""
    options: Options

    @property
    def num_choices(self) -> int:
        """Prompt i has the choices ``i * n`` to ``i * n + n - 1``."""
        return len(self.prompts) * self.options.n

    def prompt_of(self, choice: int) -> EncodedPrompt:
        return self.prompts[choice // self.options.n]


def check_model(model: str | None, served: Sequence[str]) -> None:
    """Raise the 404 of an unknown model. ``served``: the name, and other spellings that are accepted."""
    if model is not None and model not in served:
        raise RequestError(
            f"the model {model!r} is not served here; {served[0]!r} is",
            param="model",
            code="model_not_found",
            status=404,
        )


def check_num_choices(num_prompts: int, n: int, most: int) -> None:
    """Raise RequestError for a list of prompts that is too long, or too many choices in all."""
    if num_prompts > most:
        raise RequestError(
            f"'prompt' holds {num_prompts} prompts; at most {most} are served in one request", param="prompt"
        )
    if num_prompts * n > most:
        told = f"{num_prompts} prompts with 'n' {n} are {num_prompts * n} choices"
        raise RequestError(f"{told}; at most {most} are served in one request", param="n")


def check_token_ids(token_ids: Sequence[int], vocab_size: int, param: str = "prompt") -> None:
    """Raise RequestError when a prompt is empty or holds an id that the model has no embedding for."""
    if not token_ids:
        raise RequestError(f"{param!r} is empty; at least one token is needed", param=param)
    if min(token_ids) >= 0 and max(token_ids) < vocab_size:
        return
    position = next(i for i, token in enumerate(token_ids) if not 0 <= token < vocab_size)
    raise RequestError(
        f"{param!r} holds the token id {token_ids[position]} at position {position}; "
        f"this model's ids are 0 to {vocab_size - 1}",
        param=param,
    )


def check_length(
    num_prompt_tokens: int, max_tokens: int, max_model_len: int, params: tuple[str, str] = ("prompt", "max_tokens")
) -> None:
    """Raise RequestError when prompt and answer together exceed the context. ``params``: what the two are called."""
    prompt, most = params
    if num_prompt_tokens + max_tokens > max_model_len:
        raise RequestError(
            f"the context is {max_model_len} tokens; the prompt has {num_prompt_tokens} and {most!r} asks for "
            f"{max_tokens} more, {num_prompt_tokens + max_tokens} in all",
            param=prompt if num_prompt_tokens >= max_model_len else most,
            code="context_length_exceeded",
        )


def check_prompt_logprobs(options: Options, num_prompt_tokens: int) -> None:
    """Raise RequestError when the prompts (``num_prompt_tokens`` in all) are too long to be scored in one request."""
    if options.prompt_logprobs is None:
        return
    longest = MAX_PROMPT_LOGPROB_BYTES // PromptLogprobs.num_bytes(1, options.prompt_logprobs)
    if num_prompt_tokens > longest:
        raise RequestError(
            f"'echo' with 'logprobs' {options.prompt_logprobs} is served for up to {longest} prompt tokens a request, "
            f"all prompts together; these are {num_prompt_tokens}: send fewer, or ask for fewer 'logprobs'",
            param="logprobs",
        )
