"""The same load on one undivided engine in this process, with all of the machine and without HTTP in between."""

import os
import time
from collections.abc import Iterator, Sequence

import msgspec
import torch

from pdkv.bench.answer_scores import Scorer
from pdkv.bench.serve_load import Load, Question, Served, Stopwatch, Tell
from pdkv.daemons.config import UpConfig
from pdkv.daemons.rank_share import use_device
from pdkv.errors import RequestError
from pdkv.m3.engine import Engine
from pdkv.m3.model import M3Model, load_model
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
from pdkv.verify.equality import LOGIT_TOLERANCE
from pdkv.verify.undivided import LocalWorker, local_worker

_CHUNK_CPU, _CHUNK_GPU = 512, 8192
_JUDGES_CHUNK = 3 / 8
"""Of what is computed at a time otherwise: of concurrent prompts each step has parts, which round in ways of their own,
and what is called rounding must show that."""


class Undivided:
    """A model, and engines that serve it. Owned by the calling thread."""

    def __init__(self, config: UpConfig) -> None:
        """Loads the model that the deployment ``config`` serves. Raises ``PdkvError``."""
        torch.set_num_threads(config.threads or len(os.sched_getaffinity(0)))
        self._config = config
        self._device = "cuda:0" if config.device == "cuda" else "cpu"
        use_device(self._device)
        self._model: M3Model = load_model(
            config.model, device=self._device, dtype=config.dtype, load_format=config.load_format
        )

    @property
    def last_place(self) -> float:
        """A unit in the last place of 1 in the model's dtype; of float32, what its sums may be off by."""
        return max(LOGIT_TOLERANCE, torch.finfo(self._model.dtype).eps)

    @property
    def vocab_size(self) -> int:
        return self._model.config.vocab_size

    def run(
        self, load: Load, questions: Sequence[Question], tell: Tell, replicas: int = 1
    ) -> tuple[list[Served], float]:
        """As ``http_clients.run`` does: the last question first, to warm up, and not counted.

        ``replicas`` equal engines, among which clients and questions are dealt out, are one engine here that is asked
        the share of each in turn; the seconds are those of the slowest.
        """
        share = msgspec.structs.replace(load, concurrency=max(1, load.concurrency // replicas))
        worker = self._worker(load, share.concurrency)
        worker.runner.prepare()  # as the divided workers have when they say that they are ready
        engine = worker.engine
        _Clients(engine, share).ask_all(questions[-1:], lambda _: None)
        served: dict[int, Served] = {}
        slowest = 0.0
        for replica in range(replicas):
            numbers = range(replica, load.requests, replicas)
            began = time.perf_counter()
            answers = _Clients(engine, share).ask_all([questions[number] for number in numbers], tell)
            slowest = max(slowest, time.perf_counter() - began)
            served.update(zip(numbers, answers, strict=True))
        return [served[number] for number in range(load.requests)], slowest

    def alone(self, load: Load, questions: Sequence[Question], tell: Tell) -> list[Served]:
        """The same questions one after another, with nothing else to do: what answers are set beside."""
        return self.run(msgspec.structs.replace(load, concurrency=1), questions, tell)[0]

    def scorer(self, load: Load) -> Scorer:
        """For answers of ``load``, in chunks of its own."""
        length = load.input_tokens + load.output_tokens
        chunk = max(1, int(self._chunk * _JUDGES_CHUNK))
        return Scorer(self._model, length, chunk, (self._config.kv_dtype, self._config.index_dtype))

    @property
    def _chunk(self) -> int:
        return self._config.prefill_chunk or (_CHUNK_CPU if self._device == "cpu" else _CHUNK_GPU)

    def _worker(self, load: Load, concurrency: int) -> LocalWorker:
        length = load.input_tokens + load.output_tokens
        invariant = self._config.batch_invariant  # then all engines' steps have the shape of the workers'
        settings = EngineSettings(
            max_model_len=length,
            max_batch=self._config.max_batch if invariant else concurrency,
            prefill_chunk=self._chunk,
            batch_invariant=invariant,
        )
        num_pages = concurrency * -(-length // self._model.config.block_size)
        stored = (self._config.kv_dtype, self._config.index_dtype)
        return local_worker(self._model, num_pages, settings, *stored)


def _request(number: int, question: Question, max_tokens: int) -> CompleteRequest:
    return CompleteRequest(
        id=RequestId(number.to_bytes(8, "big")),
        prompt=question.prompt,
        max_tokens=max_tokens,
        sampling=SamplingParams(),
        ignore_eos=True,
    )


class _Clients:
    """``concurrency`` requests in the engine at a time. Owned by the calling thread."""

    def __init__(self, engine: Engine, load: Load) -> None:
        self._engine = engine
        self._load = load
        self._watches: dict[RequestId, Stopwatch] = {}
        self._served: dict[RequestId, Served] = {}

    def ask_all(self, questions: Sequence[Question], tell: Tell) -> list[Served]:
        requests = [_request(n, question, self._load.output_tokens) for n, question in enumerate(questions)]
        waiting = iter(requests)
        events = list(self._send(waiting, self._load.concurrency))
        while self._watches:
            ended = self._hear(events, time.perf_counter())
            if ended:
                tell(f"{len(self._served)} of {len(questions)} answered")
            events = [*self._send(waiting, ended), *self._engine.step()]
        return [self._served[request.id] for request in requests]

    def _send(self, waiting: Iterator[CompleteRequest], count: int) -> Iterator[EngineEvent]:
        for _, request in zip(range(count), waiting, strict=False):  # in this order, or one is lost
            self._watches[request.id] = Stopwatch(time.perf_counter())
            yield from self._engine.submit(request)

    def _hear(self, events: Sequence[EngineEvent], at: float) -> int:
        """Returns how many requests ended."""
        ended = 0
        for event in singly(events):
            match event:
                case TokenGenerated():
                    self._watches[event.id].saw([event.token], at, [event.logprob])
                case RequestFinished():
                    self._served[event.id] = self._watches.pop(event.id).served(at)
                    ended += 1
                case RequestRefused():
                    raise RequestError(f"the undivided engine refuses: {event.message}")
        return ended
