"""Log-probabilities as values: the likeliest tokens at one position, and what a model thought of a whole prompt.

Knows no torch, so that what speaks HTTP may hold them too.
"""

from collections.abc import Sequence

import msgspec
import numpy as np
import numpy.typing as npt

MAX_TOP = 20
"""Most alternatives that can be asked for at one position."""

_FLOAT, _ID = np.dtype("<f4"), np.dtype("<u4")


class TopLogprobs(msgspec.Struct, frozen=True):
    """The likeliest tokens at one position, likeliest first, with natural logarithms of their probabilities."""

    token_ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()


NO_TOP = TopLogprobs()


class Tops(msgspec.Struct, frozen=True, gc=False):
    """The likeliest tokens behind rows of a step, likeliest first, where some are asked for."""

    counts: npt.NDArray[np.int64]  # [num_entries]; how many there are of each
    told: npt.NDArray[np.int64]  # [num_entries, 2, most]; ids, then bits of log-probabilities in float64

    def each(self) -> list[TopLogprobs]:
        """One for each entry."""
        ids, logprobs = self.told[:, 0].tolist(), self.told[:, 1].view(np.float64).tolist()
        told = zip(self.counts.tolist(), ids, logprobs, strict=True)
        return [TopLogprobs(tuple(a[:count]), tuple(b[:count])) if count else NO_TOP for count, a, b in told]

    def pack(self) -> tuple[bytes, bytes]:
        """Counts, and as much of the rest as there is of any entry."""
        return self.counts.tobytes(), self.told[:, :, : self.counts.max()].tobytes()

    @classmethod
    def unpack(cls, counts: bytes, told: bytes) -> "Tops":
        """What ``pack`` made."""
        numbers = np.frombuffer(counts, np.int64)
        return cls(numbers, np.frombuffer(told, np.int64).reshape(len(numbers), 2, -1))


class PromptLogprobs(msgspec.Struct, frozen=True):
    """Of consecutive prompt tokens: each one's own log-probability, and the likeliest in its place.

    Packed, because a long prompt has hundreds of thousands: little-endian float32 [num_tokens] and
    [num_tokens, num_top], and uint32 ids [num_tokens, num_top]. A prompt's first token has none.
    """

    num_top: int = 0
    own: bytes = b""
    top_ids: bytes = b""
    top: bytes = b""

    @classmethod
    def pack(
        cls, own: npt.NDArray[np.float32], top_ids: npt.NDArray[np.int64], top: npt.NDArray[np.float32]
    ) -> "PromptLogprobs":
        """From ``own`` [num_tokens], ``top_ids`` and ``top`` [num_tokens, num_top]."""
        ids = top_ids.astype(_ID).tobytes()
        return cls(top.shape[1], own.astype(_FLOAT).tobytes(), ids, top.astype(_FLOAT).tobytes())

    @classmethod
    def join(cls, parts: Sequence["PromptLogprobs"]) -> "PromptLogprobs":
        """Of consecutive pieces of one prompt."""
        return cls(
            parts[0].num_top if parts else 0,
            b"".join(part.own for part in parts),
            b"".join(part.top_ids for part in parts),
            b"".join(part.top for part in parts),
        )

    @staticmethod
    def num_bytes(num_tokens: int, num_top: int) -> int:
        """What these many tokens take when packed."""
        return num_tokens * (_FLOAT.itemsize + num_top * (_FLOAT.itemsize + _ID.itemsize))

    @property
    def num_tokens(self) -> int:
        return len(self.own) // _FLOAT.itemsize

    def fits(self, num_tokens: int, num_top: int) -> bool:
        """Whether this speaks of exactly these many tokens, with at most these many alternatives, and is whole."""
        if self.num_tokens != num_tokens or not 0 <= self.num_top <= num_top:
            return False
        sizes = len(self.own), len(self.top_ids), len(self.top)
        wanted = num_tokens * _FLOAT.itemsize, self.num_top * num_tokens * _ID.itemsize
        return sizes == (*wanted, self.num_top * num_tokens * _FLOAT.itemsize)

    def unpack(self) -> tuple[list[float], list[TopLogprobs]]:
        """One entry a token in both lists."""
        shape = self.num_tokens, self.num_top
        ids = np.frombuffer(self.top_ids, _ID).reshape(shape).tolist()
        top = np.frombuffer(self.top, _FLOAT).reshape(shape).tolist()
        pairs = [TopLogprobs(tuple(a), tuple(b)) for a, b in zip(ids, top, strict=True)]
        return np.frombuffer(self.own, _FLOAT).tolist(), pairs
