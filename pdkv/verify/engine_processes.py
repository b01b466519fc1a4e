"""A prefill and a decode engine process without fronts: the very processes of a deployment, on one CPU or one GPU."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Self

import msgspec

from pdkv.daemons.link import (
    BlockingLink,
    DecodeJob,
    EngineFatal,
    EngineReady,
    GroupTokens,
    JobFailed,
    JobFinished,
    PrefillJob,
    Sampling,
    StepTokens,
    ToFront,
    TokenReader,
    TokensOut,
    WorkerSettings,
)
from pdkv.errors import FailureCode, PdkvError, TransferError
from pdkv.verify.pair import DividedAnswer

_MODULE = "pdkv.daemons.engine_process"
_END_S = 20.0


class EngineProcess:
    """One worker's engine process, started and spoken to as its front does it. Owned by one thread."""

    def __init__(self, settings: WorkerSettings, variables: Mapping[str, str] | None = None) -> None:
        """``variables``: of its environment, beside ours."""
        ours, theirs = socket.socketpair()
        command = [sys.executable, "-m", _MODULE, "--fd", str(theirs.fileno())]
        environment = {**os.environ, "PYTHONPATH": ":".join(filter(None, sys.path)), **(variables or {})}
        self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()], env=environment)
        theirs.close()
        self._link = BlockingLink(ours)
        self._decoder = msgspec.msgpack.Decoder(ToFront)
        self._link.send(settings)

    def ready(self) -> EngineReady:
        """Wait until it serves. Raises ``PdkvError`` with what it says when it cannot."""
        message = self.receive()
        assert isinstance(message, EngineReady), f"{type(message).__name__} before it is ready"
        return message

    def send(self, message: msgspec.Struct) -> None:
        self._link.send(message)

    def receive(self) -> ToFront:
        body = self._link.receive_bytes()
        if body is None:
            raise PdkvError(f"an engine process ended with {self._process.wait(_END_S)}")
        message: ToFront = self._decoder.decode(body)
        if isinstance(message, EngineFatal):
            error = PdkvError(message.message)
            error.exit_code = message.exit_code
            raise error
        return message

    def end(self) -> None:
        """It ends when its link does."""
        self._link.end()
        try:
            self._process.wait(_END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._link.release()


class ProcessPair:
    """One P and one D. Use as a context; one request at a time."""

    def __init__(
        self, prefill: WorkerSettings, decode: WorkerSettings, variables: Sequence[Mapping[str, str]] = ({}, {})
    ) -> None:
        """``variables``: of P's environment and of D's.

        Raises ``PdkvError`` when one cannot start. They start at once where both are told how many pages to make, else
        one after the other: each sizes itself by what the other has left of a device that they share."""
        self._number = 0
        self._reader = TokenReader()
        self._prefill = EngineProcess(prefill, variables[0])
        self._decode: EngineProcess | None = None
        try:
            if prefill.num_pages and decode.num_pages:
                self._decode = EngineProcess(decode, variables[1])
            self._prefill_ready = self._prefill.ready()
            self._decode = self._decode or EngineProcess(decode, variables[1])
            self.decode_ready = self._decode.ready()
        except BaseException:
            self._end()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self._end()

    def ask(self, prompt: tuple[int, ...], max_tokens: int, deadline_s: float = 300.0) -> DividedAnswer:
        """Answer one prompt greedily, blind to end tokens. Raises ``TransferError`` when it fails on D."""
        self._number += 1
        transfer = self._number.to_bytes(16, "big")
        job = DecodeJob(
            transfer=transfer,
            prompt=list(prompt),
            max_tokens=max_tokens,
            sampling=Sampling(),
            ignore_eos=True,
            prefill_control=self._prefill_ready.control,
            prefill_incarnation=self._prefill_ready.incarnation,
            deadline_s=deadline_s,
        )
        started = time.perf_counter()
        assert self._decode is not None, "both are ready"
        self._decode.send(job)
        self._prefill.send(PrefillJob(transfer, list(prompt), Sampling(), deadline_s))
        tokens: list[int] = []
        while True:
            match self._decode.receive():
                case StepTokens() | GroupTokens() as step:
                    for told in self._reader.each(step):
                        tokens += told.tokens if told.transfer == transfer else []
                case TokensOut(transfer=mine, tokens=some) if mine == transfer:
                    tokens += some
                case JobFailed(transfer=mine) as failed if mine == transfer:
                    raise TransferError(FailureCode(failed.code), failed.message)
                case JobFinished(transfer=mine, report=report) if mine == transfer:
                    assert report is not None, "a decode worker reports its transfer"
                    return DividedAnswer(tuple(tokens), report, time.perf_counter() - started)

    def _end(self) -> None:
        if self._decode is not None:
            self._decode.end()
        self._prefill.end()
