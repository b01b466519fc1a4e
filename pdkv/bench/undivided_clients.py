"""The same load on one undivided engine in this process, with all of the machine and without HTTP in between."""

import os
import time
from collections.abc import Iterator, Sequence

import msgspec
import torch

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

NEAR_TIE = {torch.float32: LOGIT_TOLERANCE, torch.float16: 0.02, torch.bfloat16: 0.1}
"""By how much a token's log-probability may be ahead of the next one's where another batch may choose that one."""

_CHUNK_CPU, _CHUNK_GPU = 512, 8192


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
        self._judge: tuple[tuple[int, int], Engine] | None = None
        """For one request at a time; and for which length of prompt and answer."""

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

    def is_near_tie(self, question: Question, tokens: Sequence[int], at: int) -> bool:
        """Whether answering ``tokens[at]`` is excused: it is this engine's second choice there by next to nothing.

        Asked alone this engine may answer otherwise even before; then it was a near tie in an earlier place.
        """
        length = len(question.prompt), len(tokens)
        if self._judge is None or self._judge[0] != length:
            self._judge = length, self._worker(Load(input_tokens=length[0], output_tokens=length[1]), 1).engine
        engine = self._judge[1]
        engine.submit(_request(0, question, at + 1, num_top=2))
        ours: list[TokenGenerated] = []
        while engine.has_work:
            ours += [event for event in singly(engine.step()) if isinstance(event, TokenGenerated)]
        first, second = ours[at].top.logprobs[:2]
        before = all(event.token == token for event, token in zip(ours[:at], tokens, strict=False))
        return before and first - second < NEAR_TIE[self._model.dtype] and tokens[at] in ours[at].top.token_ids

    def _worker(self, load: Load, concurrency: int) -> LocalWorker:
        length = load.input_tokens + load.output_tokens
        chunk = self._config.prefill_chunk or (_CHUNK_CPU if self._device == "cpu" else _CHUNK_GPU)
        settings = EngineSettings(max_model_len=length, max_batch=concurrency, prefill_chunk=chunk)
        num_pages = concurrency * -(-length // self._model.config.block_size)
        stored = (self._config.kv_dtype, self._config.index_dtype)
        return local_worker(self._model, num_pages, settings, *stored)


def _request(number: int, question: Question, max_tokens: int, num_top: int = 0) -> CompleteRequest:
    return CompleteRequest(
        id=RequestId(number.to_bytes(8, "big")),
        prompt=question.prompt,
        max_tokens=max_tokens,
        sampling=SamplingParams(),
        ignore_eos=True,
        num_top=num_top,
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
                    self._watches[event.id].saw([event.token], at)
                case RequestFinished():
                    self._served[event.id] = self._watches.pop(event.id).served(at)
                    ended += 1
                case RequestRefused():
                    raise RequestError(f"the undivided engine refuses: {event.message}")
        return ended
