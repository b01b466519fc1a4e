"""An engine process that follows a script instead of a model: the seed of a request says what becomes of it.

It speaks the real link over the real socket pair; everything above it is the real thing.
"""

import argparse
import os
import signal
import socket
import time
from enum import IntEnum

import msgspec
import numpy as np

from pdkv.daemons import link
from pdkv.m3.logprobs import PromptLogprobs, TopLogprobs


class Script(IntEnum):
    ANSWER = 1
    """P: prefilled. D: "n0", "n1", ... up to max_tokens, one message a token."""
    HANG = 2
    """P: prefilled. D: says nothing until it is aborted."""
    HANG_PREFILL = 3
    """P: says nothing until it is aborted. D: likewise."""
    FULL = 4
    """D refuses with 503; P waits."""
    DIE_PREFILL = 5
    """P: the engine process kills itself. D: waits."""
    HANG_AFTER_TWO = 6
    """D: two tokens, then nothing."""
    DIE_AFTER_TWO = 7
    """D: two tokens, then the engine process kills itself."""
    FAIL_AFTER_TWO = 8
    """D: two tokens, then the job fails."""
    PREFILL_FAILS = 9
    """P fails with 500; D waits."""
    ONE_OF_SEVEN_FAILS = 10
    """A prompt of seven tokens fails, on P at once, on D after two tokens; others answer two tokens and hang."""

    @classmethod
    def _missing_(cls, value: object) -> "Script":
        """A seed that was drawn, as that of a prompt's second choice."""
        return cls.ANSWER


FIRST_NODE = 64
"""Token id of n0 in the link-chasing checkpoint."""


class ScriptedEngine:
    def __init__(self, wire: link.BlockingLink, settings: link.WorkerSettings) -> None:
        self._wire = wire
        self._settings = settings
        self._open: set[bytes] = set()
        self._aborted = 0
        self._incarnation = int.from_bytes(os.urandom(8), "big")

    def run(self) -> None:
        digest = "aa" * 16 if "other" not in self._settings.model_dir else "bb" * 16
        self._wire.send(
            link.EngineReady(
                role=self._settings.role,
                incarnation=self._incarnation,
                control="tcp://127.0.0.1:9",
                manifest_digest=digest,
                model_fingerprint="f",
                max_model_len=self._settings.max_model_len,
                block_size=128,
                num_pages=10,
                bytes_per_token=1,
                num_regions=1,
                transport="scripted",
            )
        )
        decoder = msgspec.msgpack.Decoder(link.ToEngine)
        while (frame := self._wire.receive_bytes()) is not None:
            self._handle(decoder.decode(frame))

    def _handle(self, message: link.ToEngine) -> None:
        match message:
            case link.PrefillJob():
                self._open.add(message.transfer)
                self._prefill(message)
            case link.DecodeJob():
                self._open.add(message.transfer)
                self._decode(message)
            case link.FinishJob():
                if message.transfer in self._open:
                    self._finish(message.transfer, "stop")
            case link.AbortJob():
                self._aborted += 1
                self._fail(message.transfer, "cancelled", 499)
            case link.ReleaseLease():
                self._fail(message.transfer, "lease_expired", 503)
            case link.BeatQuery():
                self._wire.send(link.Beat(message.query, 0.0, 0.0))
            case link.StatusQuery():
                self._wire.send(self._status(message.query))

    def _prefill(self, job: link.PrefillJob) -> None:
        match Script(job.sampling.seed):
            case Script.HANG_PREFILL | Script.FULL:
                return
            case Script.DIE_PREFILL:
                os.kill(os.getpid(), signal.SIGKILL)
            case Script.ONE_OF_SEVEN_FAILS if len(job.prompt) != 7:
                return
            case Script.PREFILL_FAILS | Script.ONE_OF_SEVEN_FAILS:
                self._fail(job.transfer, "internal", 500)
            case _:
                self._finish(job.transfer, "prefilled")

    def _decode(self, job: link.DecodeJob) -> None:
        script = Script(job.sampling.seed)
        if script == Script.FULL:
            self._fail(job.transfer, "no_capacity", 503)
        elif script == Script.ANSWER:
            self._tokens(job, job.max_tokens)
            self._finish(job.transfer, "length")
        elif script == Script.ONE_OF_SEVEN_FAILS:
            self._tokens(job, 2)
            if job.num_prompt_tokens == 7:
                self._fail(job.transfer, "internal", 500)
        elif script in (Script.HANG_AFTER_TWO, Script.DIE_AFTER_TWO, Script.FAIL_AFTER_TWO):
            self._tokens(job, 2)
            if script == Script.DIE_AFTER_TWO:
                time.sleep(0.2)  # the script's own timing: lets the two tokens out first
                os.kill(os.getpid(), signal.SIGKILL)
            if script == Script.FAIL_AFTER_TWO:
                self._fail(job.transfer, "internal", 500)

    def _tokens(self, job: link.DecodeJob, count: int) -> None:
        """Each token is as likely as the last but for a half; its rival is always token 0."""
        for i in range(count):
            logprob, token = -0.5 * (i + 1), FIRST_NODE + i
            top = [TopLogprobs((0, token)[: job.num_top], (-0.25, logprob)[: job.num_top])] if job.num_top else []
            prompt = None if i or job.prompt_top is None else _scored(job.num_prompt_tokens - 1, job.prompt_top)
            if top or prompt is not None:
                self._wire.send(link.TokensOut(job.transfer, [token], [logprob], top, prompt))
            else:  # as of a step that others have tokens of too, whom nobody waits for any more
                told = (bytes(16), job.transfer, bytes(15) + b"1")
                self._wire.send(link.StepTokens(told, [1, token, 2], [0.0, logprob, 0.0]))

    def _finish(self, transfer: bytes, reason: str) -> None:
        self._open.discard(transfer)
        moved = link.TransferReport(1, 1, 1, 128, {"k": 64, "v": 64}, 0, 0.1, 0.2, "tcp", "peer", 2)
        report = msgspec.structs.replace(moved, resident_at=time.time())
        self._wire.send(link.JobFinished(transfer, reason, report if reason != "prefilled" else None))

    def _fail(self, transfer: bytes, code: str, status: int) -> None:
        self._open.discard(transfer)
        self._wire.send(link.JobFailed(transfer, code, f"scripted: {code}", status))

    def _status(self, query: int) -> link.Status:
        return link.Status(
            query=query,
            role=self._settings.role,
            incarnation=self._incarnation,
            pages_usable=10,
            pages_free=10 - len(self._open),
            fragmentation=0.0,
            requests_queued=0,
            requests_running=len(self._open),
            transfers_open=len(self._open),
            leases_active=0,
            reads_outstanding=0,
            messages_dropped=self._aborted,
            peers=[],
            leases=[
                link.LeaseStatus(transfer.hex(), "decode@scripted", "prefilling", 3, float(age), 9.5)
                for age, transfer in enumerate(sorted(self._open), 1)
            ],
        )


def _scored(count: int, num_top: int) -> PromptLogprobs:
    """Token i + 1 has -i; all rivals are token 0 at -0.125."""
    rivals = np.zeros((count, num_top), np.int64), np.full((count, num_top), -0.125, np.float32)
    return PromptLogprobs.pack(-np.arange(count, dtype=np.float32), *rivals)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--fd", type=int, required=True)
    with socket.socket(fileno=parser.parse_args().fd) as sock:
        wire = link.BlockingLink(sock)
        first = wire.receive_bytes()
        assert first is not None, "the front sends the settings first"
        settings = msgspec.msgpack.decode(first, type=link.WorkerSettings)
        if "fatal" in settings.model_dir:
            wire.send(link.EngineFatal("scripted: cannot start", 6))
            return
        ScriptedEngine(wire, settings).run()


if __name__ == "__main__":
    main()
