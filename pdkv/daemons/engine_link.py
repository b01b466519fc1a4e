"""The front's end of the link to its engine process: starts it, hands it jobs, and notices when it is gone."""

import asyncio
import contextlib
import socket
from asyncio.subprocess import Process
from collections.abc import Callable, Iterator

import msgspec
import structlog

from pdkv.daemons import lifeline
from pdkv.daemons.job_meter import JobMeter
from pdkv.daemons.link import (
    AbortJob,
    Beat,
    BeatQuery,
    DecodeJob,
    EngineFatal,
    EngineReady,
    FinishJob,
    GroupTokens,
    JobFailed,
    JobFinished,
    ManifestQuery,
    Manifests,
    PrefillJob,
    ReleaseLease,
    Status,
    StatusQuery,
    StepTokens,
    ToFront,
    TokenReader,
    TokensOut,
    WorkerSettings,
    encode_frame,
)
from pdkv.errors import FailureCode, PdkvError, RequestError
from pdkv.metrics import Meter
from pdkv.schema import Manifest

JobEvent = TokensOut | JobFinished | JobFailed
_Answer = Status | Manifests | Beat

ENGINE_MODULE = "pdkv.daemons.engine_process"
_EXIT_GRACE_S = 3.0
_STATUS_TIMEOUT_S = 5.0
_log = structlog.get_logger(__name__)


class EngineGoneError(PdkvError):
    """The engine process has ended, or never started. ``exit_code`` is what the worker ends with."""

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class EngineLink:
    """One engine process for one life: when it goes, so does the worker. Belongs to the event loop's thread."""

    def __init__(
        self, process: Process, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, meter: Meter
    ) -> None:
        self._meter = JobMeter(meter)
        self._process = process
        self._reader = reader
        self._writer = writer
        self._decoder = msgspec.msgpack.Decoder(ToFront)
        self._tokens = TokenReader()
        self._jobs: dict[bytes, _OpenJob] = {}
        self._queries: dict[int, asyncio.Future[_Answer]] = {}
        self._num_queries = 0
        self._fatal: EngineFatal | None = None
        self._stopping = False
        self.ready: EngineReady | None = None
        """None while the model is loading."""
        self._reading = asyncio.create_task(self._read())

    @classmethod
    async def start(cls, settings: WorkerSettings, meter: Meter, module: str = ENGINE_MODULE) -> "EngineLink":
        """Start the engine process and send it its settings. It loads while the caller goes on. ``meter`` counts
        tokens, on the event loop's thread."""
        ours, theirs = socket.socketpair()
        with theirs:
            args = lifeline.command(module, "--fd", str(theirs.fileno()))
            process = await asyncio.create_subprocess_exec(
                *args,
                stdin=asyncio.subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
                process_group=0,  # a terminal's Ctrl-C is for the front, which ends the engine process in good order
            )
        reader, writer = await asyncio.open_unix_connection(sock=ours)
        writer.write(encode_frame(settings))
        return cls(process, reader, writer, meter)

    @contextlib.contextmanager
    def open(self, job: PrefillJob | DecodeJob, deliver: Callable[[JobEvent], None]) -> Iterator[None]:
        """Start a job. ``deliver`` gets its messages as they come; the last is JobFinished or JobFailed.

        Leaving the block before that aborts it, for whatever reason it is left.
        """
        if job.transfer in self._jobs:
            raise RequestError("this transfer id is in use; every try of a request needs a new one")
        opened = self._jobs[job.transfer] = _OpenJob(deliver)
        self._meter.opened(job)
        self._send(job)
        if self._reading.done() or self._stopping:
            opened.hear(_gone(job.transfer))
        try:
            yield
        finally:
            self._jobs.pop(job.transfer, None)
            self._meter.closed(job.transfer)
            if not opened.has_ended:
                self._send(AbortJob(job.transfer))

    def finish(self, transfer: bytes) -> None:
        """Enough of a decode job that is open: it ends with JobFinished. Harmless for one that has ended."""
        self._send(FinishJob(transfer))

    def release_lease(self, transfer: bytes) -> None:
        """End a lease of this prefill worker. Harmless where there is none."""
        self._send(ReleaseLease(transfer))

    async def status(self, *, with_series: bool = False) -> Status:
        """Raises EngineGoneError when the engine process does not answer."""
        answer = await self._ask(lambda query: StatusQuery(query, with_series))
        assert isinstance(answer, Status), "the answer to its own kind of question"
        return answer

    async def manifests(self) -> tuple[Manifest, ...]:
        """Of all ranks. Raises EngineGoneError when the engine process does not answer."""
        answer = await self._ask(ManifestQuery)
        assert isinstance(answer, Manifests), "the answer to its own kind of question"
        return answer.ranks

    async def beat(self) -> Beat:
        """When its threads last came round. Raises EngineGoneError when the engine process does not answer."""
        answer = await self._ask(BeatQuery)
        assert isinstance(answer, Beat), "the answer to its own kind of question"
        return answer

    async def _ask(self, question: Callable[[int], StatusQuery | ManifestQuery | BeatQuery]) -> _Answer:
        if self._reading.done():
            raise EngineGoneError("the engine process has ended")
        self._num_queries += 1
        query = self._num_queries
        answer: asyncio.Future[_Answer] = asyncio.get_running_loop().create_future()
        self._queries[query] = answer
        self._send(question(query))
        try:
            async with asyncio.timeout(_STATUS_TIMEOUT_S):
                return await answer
        except TimeoutError:
            raise EngineGoneError("the engine process does not answer") from None
        finally:
            self._queries.pop(query, None)

    async def ended(self) -> EngineGoneError:
        """Wait until the engine process is gone; returns why."""
        await asyncio.wait((self._reading,))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_EXIT_GRACE_S):
                await self._process.wait()
        if self._fatal is not None:
            return EngineGoneError(self._fatal.message, self._fatal.exit_code)
        code = self._process.returncode
        how = (
            "closed its link"
            if code is None
            else f"was killed by signal {-code}"
            if code < 0
            else f"exited with {code}"
        )
        return EngineGoneError(f"the engine process {how}")

    def fail_all(self) -> None:
        """Tell every running job that the worker is ending."""
        self._stopping = True
        for transfer, job in self._jobs.items():
            job.hear(_gone(transfer))

    async def close(self) -> None:
        """End the engine process: by closing the link, and by force when that is not heard."""
        self._stopping = True
        self._writer.close()
        try:
            async with asyncio.timeout(_EXIT_GRACE_S):
                await self._process.wait()
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
            await self._process.wait()
        self._reading.cancel()
        await asyncio.gather(self._reading, return_exceptions=True)

    def _send(self, message: msgspec.Struct) -> None:
        if not self._writer.is_closing():
            self._writer.write(encode_frame(message))

    async def _read(self) -> None:
        try:
            while True:
                length = int.from_bytes(await self._reader.readexactly(4), "little")
                self._dispatch(self._decoder.decode(await self._reader.readexactly(length)))
        except (asyncio.IncompleteReadError, OSError):
            pass
        except msgspec.MsgspecError as exc:
            _log.error("the engine process sent a message that is none of the link's", error=str(exc))
        finally:
            self._writer.close()
            for transfer, job in self._jobs.items():
                job.hear(_gone(transfer))
            for answer in self._queries.values():
                if not answer.done():
                    answer.set_exception(EngineGoneError("the engine process has ended"))

    def _dispatch(self, message: ToFront) -> None:
        match message:
            case EngineReady():
                self.ready = message
                _log.info("ready", **msgspec.structs.asdict(message))
            case EngineFatal():
                self._fatal = message
            case Status() | Manifests() | Beat():
                answer = self._queries.get(message.query)
                if answer is not None and not answer.done():
                    answer.set_result(message)
            case StepTokens() | GroupTokens():
                for told in self._tokens.each(message):
                    self._tell(told)
            case _:
                self._tell(message)

    def _tell(self, event: JobEvent) -> None:
        """A job that nobody waits for any more was aborted; its last messages may still come."""
        self._meter.heard(event)
        if (job := self._jobs.get(event.transfer)) is not None:
            job.hear(event)


class _OpenJob:
    """A job that somebody waits for."""

    def __init__(self, deliver: Callable[[JobEvent], None]) -> None:
        self._deliver = deliver
        self.has_ended = False

    def hear(self, event: JobEvent) -> None:
        """Nothing after the last message."""
        if not self.has_ended:
            self.has_ended = not isinstance(event, TokensOut)
            self._deliver(event)


def _gone(transfer: bytes) -> JobFailed:
    return JobFailed(transfer, FailureCode.SHUTDOWN.value, "this worker is ending", 503)
