"""Names for the content of full pages: equal names mean equal tokens from the sequence's start, in equal state."""

import hashlib
import sys
from array import array
from collections.abc import Sequence

import msgspec

from pdkv.schema import KvLayout

_NAME_BYTES = 16
assert array("I").itemsize == 4, "tokens are hashed as four bytes each, the lowest first"


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

    def first(self, count: int, tokens: Sequence[int], since: int = 0) -> list[bytes]:
        """Of the first ``count`` blocks of ``tokens``, which may have grown at their end since the last call, but for
        the ``since`` first of them."""
        size, known = self._block_size, len(self._names)
        if known < count:
            # At once, and through an array: of a long prompt's tokens one by one takes longer than all the digests.
            new = array("I", tokens[known * size : count * size])
            assert len(new) == (count - known) * size, f"block {count - 1} is not full"
            if sys.byteorder == "big":
                new.byteswap()
            content, width = new.tobytes(), new.itemsize * size
            for begin in range(0, len(content), width):
                before = self._names[-1] if self._names else self._seed
                own = content[begin : begin + width]
                self._names.append(hashlib.blake2b(before + own, digest_size=_NAME_BYTES).digest())
        return self._names[since:count]
