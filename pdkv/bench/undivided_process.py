"""An engine process that computes and decodes by itself, behind the same front as a decode worker's.

What a divided deployment adds to the time to the first token is told by asking both over the same HTTP.
"""

import argparse
import secrets
import signal
import socket
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import msgspec
import torch

from pdkv.daemons.inbox import Inbox
from pdkv.daemons.link import (
    AbortJob,
    Beat,
    BeatQuery,
    BlockingLink,
    DecodeJob,
    EngineFatal,
    EngineReady,
    FinishJob,
    JobFailed,
    JobFinished,
    Status,
    StatusQuery,
    StepTokens,
    ToEngine,
    WorkerSettings,
)
from pdkv.daemons.rank_share import device_of, use_device
from pdkv.errors import FailureCode, PdkvError
from pdkv.m3.engine import Engine
from pdkv.m3.model import load_model
from pdkv.m3.requests import (
    CompleteRequest,
    EngineEvent,
    EngineSettings,
    RequestFinished,
    RequestId,
    RequestRefused,
    TokenGenerated,
    singly,
)
from pdkv.m3.sampling import SamplingParams
from pdkv.verify.undivided import local_worker

_CHUNK = 512
_LONGEST_WAIT_S = 0.5


class UndividedSide:
    """The engine, and what its front says. Owned by the main thread; ``inbox`` is filled by another."""

    def __init__(self, settings: WorkerSettings, link: BlockingLink) -> None:
        """Raises ``PdkvError`` where the model cannot be loaded."""
        torch.set_num_threads(settings.num_threads or torch.get_num_threads())
        use_device(device_of(settings, 0))
        model = load_model(Path(settings.model_dir), device=device_of(settings, 0), dtype=settings.dtype)
        bounds = EngineSettings(
            max_model_len=settings.max_model_len,
            max_batch=settings.max_batch,
            prefill_chunk=settings.prefill_chunk or _CHUNK,
        )
        num_pages = settings.max_batch * -(-settings.max_model_len // model.config.block_size)
        worker = local_worker(model, num_pages, bounds, settings.kv_dtype, settings.index_dtype)
        worker.runner.prepare()
        self.inbox = Inbox[ToEngine]()
        self._engine: Engine = worker.engine
        self._link = link
        self._jobs: set[RequestId] = set()
        self.ready = EngineReady(
            role=settings.role,
            incarnation=secrets.randbits(64),
            control="tcp://127.0.0.1:0",
            manifest_digest="undivided",
            model_fingerprint="",
            max_model_len=settings.max_model_len,
            block_size=model.config.block_size,
            num_pages=num_pages,
            bytes_per_token=0,
            num_regions=0,
            transport="none",
        )

    def turn(self) -> None:
        """Act on all that has come in, then run one step; waits only while there is nothing to do."""
        for message in self.inbox.take(0.0 if self._engine.has_work else _LONGEST_WAIT_S):
            self._hear(message)
        if self._engine.has_work:
            self._tell(self._engine.step())

    def _hear(self, message: ToEngine) -> None:
        match message:
            case DecodeJob(sampling=asked):
                request = CompleteRequest(
                    id=RequestId(message.transfer),
                    prompt=tuple(message.prompt),
                    max_tokens=message.max_tokens,
                    sampling=SamplingParams(temperature=asked.temperature, seed=asked.seed, top_p=asked.top_p),
                    ignore_eos=message.ignore_eos,
                )
                self._jobs.add(request.id)
                self._tell(self._engine.submit(request))
            case AbortJob(transfer=transfer) | FinishJob(transfer=transfer):
                if RequestId(transfer) in self._jobs:
                    self._jobs.discard(RequestId(transfer))
                    self._engine.release(RequestId(transfer))
                    self._link.send(JobFailed(transfer, FailureCode.CANCELLED.value, "the client is gone", 499))
            case StatusQuery(query=query):
                self._link.send(self._status(query))
            case _:
                raise AssertionError(f"a decode worker's front sends no {type(message).__name__}")

    def _tell(self, events: Sequence[EngineEvent]) -> None:
        for event in singly(events):
            match event:
                case TokenGenerated():
                    self._link.send(StepTokens((event.id,), [event.token], [event.logprob]))
                case RequestFinished(id=request, reason=reason):
                    self._jobs.discard(request)
                    self._link.send(JobFinished(request, reason.value))
                case RequestRefused(id=request, message=message):
                    self._jobs.discard(request)
                    self._link.send(JobFailed(request, FailureCode.NO_CAPACITY.value, message, 400))
                case _:
                    pass  # what only a divided deployment wants to know

    def _status(self, query: int) -> Status:
        told = self._engine.statistics()
        return Status(
            query=query,
            role=self.ready.role,
            incarnation=self.ready.incarnation,
            pages_usable=told.num_pages_usable,
            pages_free=told.num_pages_free,
            fragmentation=0.0,
            requests_queued=told.num_queued,
            requests_running=told.num_prefilling + told.num_decoding,
            transfers_open=0,
            leases_active=0,
            reads_outstanding=0,
            messages_dropped=0,
            peers=[],
        )


def _serve(settings: WorkerSettings, link: BlockingLink) -> None:
    """Until the front goes."""
    side = UndividedSide(settings, link)
    front_gone = threading.Event()

    def read_front() -> None:
        decoder = msgspec.msgpack.Decoder(ToEngine)
        while (body := link.receive_bytes()) is not None:
            message = decoder.decode(body)
            if isinstance(message, BeatQuery):
                link.send(Beat(message.query, 0.0, 0.0))
            else:
                side.inbox.put(message)
        front_gone.set()

    threading.Thread(target=read_front, daemon=True).start()
    link.send(side.ready)
    while not front_gone.is_set():
        side.turn()


def main() -> int:
    """Entry point: ``--fd`` names the inherited end of the link."""
    parser = argparse.ArgumentParser(prog="pdkv.bench.undivided_process")
    parser.add_argument("--fd", type=int, required=True)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    link = BlockingLink(socket.socket(fileno=parser.parse_args().fd))
    body = link.receive_bytes()
    if body is None:
        return 1
    try:
        _serve(msgspec.msgpack.decode(body, type=WorkerSettings), link)
    except PdkvError as exc:
        link.send(EngineFatal(message=str(exc), exit_code=exc.exit_code))
        return exc.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
