"""Names for the content of full pages: equal names mean equal tokens from the sequence's start, in equal state."""

import hashlib
from array import array
from collections.abc import Sequence

import msgspec
import numpy as np

from pdkv.schema import KvLayout

_NAME_BYTES = 16
_TOKEN = np.dtype("<u4")


def seed_of(model_fingerprint: str, layout: KvLayout) -> bytes:
    """What every name of one deployment hangs on besides tokens: the model, and how its state is stored.

    The same in every process: two workers with equal seeds give equal content equal names. Ranks do not count, since a
    name is of the state of all heads.
    """
    said = (
        model_fingerprint,
        layout.block_size,
        layout.kv_dtype,
        layout.index_dtype,
        layout.scale_convention,
        layout.index_schedule,
    )
    return hashlib.blake2b(msgspec.json.encode(said), digest_size=_NAME_BYTES).digest()


class BlockNames:
    """The names of one sequence's full blocks, made as they are asked for. Owned by its sequence.

    A name is BLAKE2b of the name before it (of the seed, for the first block) and the block's tokens, so it stands for
    the whole sequence up to the block's end.
    """

    def __init__(self, seed: bytes, block_size: int) -> None:
        self._seed = seed
        self._block_size = block_size
        self._names: list[bytes] = []

    def first(self, count: int, tokens: Sequence[int]) -> list[bytes]:
        """Of the first ``count`` blocks of ``tokens``, which may have grown at their end since the last call."""
        size, known = self._block_size, len(self._names)
        if known < count:
            # At once, and through an array: of a long prompt's tokens one by one takes longer than all the digests.
            new = np.frombuffer(array("I", tokens[known * size : count * size]), np.uintc).astype(_TOKEN)
            assert new.size == (count - known) * size, f"block {count - 1} is not full"
            for own in new.reshape(-1, size):
                before = self._names[-1] if self._names else self._seed
                self._names.append(hashlib.blake2b(before + own.tobytes(), digest_size=_NAME_BYTES).digest())
        return self._names[:count]
