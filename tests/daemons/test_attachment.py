"""What comes with a first token is believed only when it is what was asked for."""

import numpy as np
import pytest

from pdkv.daemons.attachment import NOTHING, FirstTokenExtras, decode, encode
from pdkv.errors import TransferError
from pdkv.m3.logprobs import PromptLogprobs, TopLogprobs

SCORED = PromptLogprobs.pack(np.zeros(4, np.float32), np.zeros((4, 2), np.int64), np.zeros((4, 2), np.float32))
EXTRAS = FirstTokenExtras(TopLogprobs((3, 4), (-0.5, -1.0)), SCORED)


def test_what_goes_in_comes_out() -> None:
    assert encode(NOTHING) == b""
    assert decode(b"", 5, 2, None) == NOTHING
    assert decode(encode(EXTRAS), 5, 2, 2) == EXTRAS
    assert decode(encode(EXTRAS), 5, 2, None) == FirstTokenExtras(EXTRAS.top)


@pytest.mark.parametrize(
    ("attachment", "num_tokens", "num_top", "prompt_top"),
    [
        (b"\xc1", 5, 2, 2),
        (b"", 5, 0, 0),
        (encode(EXTRAS), 6, 2, 2),
        (encode(EXTRAS), 5, 1, 2),
        (encode(EXTRAS), 5, 2, 1),
        (encode(FirstTokenExtras(TopLogprobs((3,), ()))), 5, 2, None),
    ],
)
def test_anything_else_fails_the_transfer(attachment: bytes, num_tokens: int, num_top: int, prompt_top: int) -> None:
    with pytest.raises(TransferError, match="log-probabilities that prefill sent"):
        decode(attachment, num_tokens, num_top, prompt_top)
