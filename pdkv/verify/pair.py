"""A prefill and a decode worker in one process: the very code of the daemons, without HTTP, over ``inproc``."""

import time
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Self

import msgspec

from pdkv.daemons.engine_side import EngineSide
from pdkv.daemons.link import (
    DecodeJob,
    GroupTokens,
    JobFailed,
    JobFinished,
    PrefillJob,
    Sampling,
    StepTokens,
    ToFront,
    TokenReader,
    TokensOut,
    TransferReport,
)
from pdkv.daemons.rank_threads import thread_ranks
from pdkv.daemons.worker_settings import worker_settings
from pdkv.errors import FailureCode, TransferError
from pdkv.memory.arena import Arena
from pdkv.transport.inproc import InprocTransport
from pdkv.verify.tampering import WitnessTransport

PROBE_PAGES = 2
_TURN_S = 0.001


class DividedAnswer(msgspec.Struct, frozen=True):
    token_ids: tuple[int, ...]
    report: TransferReport
    seconds: float


class DividedPair:
    """One P and one D with room for a single request each, so that the next request gets the same pages. Everything
    runs in the calling thread but the two agents, and ranks other than 0. Use as a context."""

    def __init__(
        self,
        model_dir: Path,
        max_model_len: int,
        *,
        block_size: int = 128,
        prefill_chunk: int = 512,
        prefill_tp: int = 1,
        decode_tp: int = 1,
        **settings: object,
    ) -> None:
        """``settings``: fields of ``WorkerSettings`` of both workers, to be other than they usually are here.

        The arenas and the witness are those of the ranks 0.
        """
        num_pages = -(-max_model_len // block_size) + PROBE_PAGES
        self._heard: list[ToFront] = []
        self._reader = TokenReader()
        self._number = 0
        self.witness = WitnessTransport(InprocTransport())
        prefill, decode = (
            msgspec.structs.replace(
                worker_settings(role, model_dir, max_model_len, num_pages, prefill_chunk), tp_size=tp_size, **settings
            )
            for role, tp_size in (("prefill", prefill_tp), ("decode", decode_tp))
        )
        others = thread_ranks(prefill_tp, InprocTransport)
        self._prefill = EngineSide(prefill, self._heard.append, InprocTransport(), others)
        others = thread_ranks(decode_tp, InprocTransport)
        self._decode = EngineSide(decode, self._heard.append, self.witness, others)
        self.witness.attach(self._decode.arena)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self._decode.close()
        self._prefill.close()

    @property
    def manifest_digest(self) -> str:
        return self._decode.ready().manifest_digest

    @property
    def prefill_arena(self) -> Arena:
        return self._prefill.arena

    @property
    def decode_arena(self) -> Arena:
        return self._decode.arena

    def ask(self, prompt: tuple[int, ...], max_tokens: int, deadline_s: float = 600.0) -> DividedAnswer:
        """Answer one prompt greedily, blind to end tokens. Raises ``TransferError`` when it fails on either side."""
        self._number += 1
        transfer = self._number.to_bytes(16, "big")
        ready = self._prefill.ready()
        started = time.perf_counter()
        self._heard.clear()
        self._prefill.hear(PrefillJob(transfer, list(prompt), Sampling(), deadline_s))
        job = DecodeJob(
            transfer=transfer,
            prompt=list(prompt),
            max_tokens=max_tokens,
            sampling=Sampling(),
            ignore_eos=True,
            prefill_control=ready.control,
            prefill_incarnation=ready.incarnation,
            deadline_s=deadline_s,
        )
        self._decode.hear(job)
        while (end := self._end(transfer)) is None:
            self._prefill.turn(_TURN_S)
            self._decode.turn(_TURN_S)
        tokens = [token for message in self._heard for told in self._told(message) for token in told.tokens]
        assert end.report is not None, "a decode worker reports its transfer"
        return DividedAnswer(tuple(tokens), end.report, time.perf_counter() - started)

    def _told(self, message: ToFront) -> Iterable[TokensOut]:
        if isinstance(message, StepTokens | GroupTokens):
            return self._reader.each(message)
        return (message,) if isinstance(message, TokensOut) else ()

    def _end(self, transfer: bytes) -> JobFinished | None:
        for message in self._heard:
            if not isinstance(message, JobFailed | JobFinished) or message.transfer != transfer:
                continue  # P may tell of a failure after D's has been raised
            if isinstance(message, JobFailed):
                raise TransferError(FailureCode(message.code), message.message)
            if message.reason != "prefilled":
                return message
        return None
