"""What P sends D with a first token: log-probabilities that the request asked for, of that token and of the prompt."""

import msgspec

from pdkv.errors import FailureCode, TransferError
from pdkv.m3.logprobs import NO_TOP, PromptLogprobs, TopLogprobs


class FirstTokenExtras(msgspec.Struct, frozen=True):
    top: TopLogprobs = NO_TOP
    prompt: PromptLogprobs | None = None
    """Of all prompt tokens but the first."""


NOTHING = FirstTokenExtras()
_ENCODER = msgspec.msgpack.Encoder()
_DECODER = msgspec.msgpack.Decoder(FirstTokenExtras)


def encode(extras: FirstTokenExtras) -> bytes:
    """Empty when there is nothing to tell."""
    return _ENCODER.encode(extras) if extras != NOTHING else b""


def decode(attachment: bytes, num_prompt_tokens: int, num_top: int, prompt_top: int | None) -> FirstTokenExtras:
    """Read what a peer sent. Raises TransferError unless it is what was asked for."""
    try:
        extras = _DECODER.decode(attachment) if attachment else NOTHING
    except msgspec.DecodeError as exc:
        raise _unfit(f"cannot be read: {exc}") from exc
    if len(extras.top.token_ids) != len(extras.top.logprobs) or len(extras.top.token_ids) > num_top:
        raise _unfit(f"tell {len(extras.top.token_ids)} likeliest tokens of the first one instead of {num_top}")
    if prompt_top is None:
        return msgspec.structs.replace(extras, prompt=None)
    if extras.prompt is None or not extras.prompt.fits(num_prompt_tokens - 1, prompt_top):
        told = extras.prompt.num_tokens if extras.prompt else 0
        raise _unfit(f"are of {told} prompt tokens instead of {num_prompt_tokens - 1}")
    return extras


def _unfit(how: str) -> TransferError:
    return TransferError(FailureCode.INTERNAL, f"the log-probabilities that prefill sent {how}")
