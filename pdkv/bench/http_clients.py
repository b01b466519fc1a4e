"""Concurrent clients of an OpenAI-compatible server: real HTTP, answers streamed, one request after another each."""

import asyncio
import contextlib
import ssl
import time
from collections.abc import AsyncIterator, Callable, Sequence

import httpx
import msgspec

from pdkv.bench.serve_load import Load, Question, Served, Stopwatch, Tell
from pdkv.daemons.link import TransferReport
from pdkv.errors import PdkvError


class ServerError(PdkvError):
    """The server cannot be asked at all."""


class _Logprobs(msgspec.Struct):
    token_logprobs: list[float]


class _Choice(msgspec.Struct):
    text: str = ""
    token_ids: list[int] | None = None
    logprobs: _Logprobs | None = None


class _Block(msgspec.Struct):
    transfer: TransferReport | None = None


class _Failure(msgspec.Struct):
    message: str = "no explanation"
    code: str | None = None


class _Chunk(msgspec.Struct):
    """What is read of a stream's event."""

    choices: list[_Choice] = []
    pdkv: _Block | None = None
    error: _Failure | None = None


class _Model(msgspec.Struct):
    id: str


class _Models(msgspec.Struct):
    data: list[_Model]


async def run(
    url: str, load: Load, questions: Sequence[Question], timeout_s: float, tell: Tell, api_key: str = ""
) -> tuple[list[Served], float]:
    """Ask all but the last question, by ``load.concurrency`` clients; the last is asked first, and does not count.

    In the questions' order, with the seconds that all took. Failed requests are among them. Raises ``ServerError`` when
    nobody is there, or the first question, which warms up, is not answered.
    """
    async with connected(url, load, questions[-1], timeout_s, api_key=api_key) as clients:
        began = time.perf_counter()
        served = await clients.ask_all(questions[: load.requests], tell)
        return served, time.perf_counter() - began


@contextlib.asynccontextmanager
async def connected(
    url: str,
    load: Load,
    warm_up: Question,
    timeout_s: float,
    headers: Callable[[], dict[str, str]] = dict,
    api_key: str = "",
) -> "AsyncIterator[Clients]":
    """Clients whose first question has been answered. ``headers``: more of them, made for each request.

    Raises ``ServerError`` when nobody is there, or that question is not answered.
    """
    key = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    limits = httpx.Limits(max_connections=load.concurrency)
    trusted = ssl.create_default_context()  # the system's, or SSL_CERT_FILE's, as OpenSSL has it
    async with httpx.AsyncClient(
        base_url=url, headers=key, verify=trusted, trust_env=False, timeout=timeout_s, limits=limits
    ) as client:
        clients = Clients(client, await _model(client), load, headers)
        first = await clients.ask(warm_up)
        if first.error:
            raise ServerError(f"{url} did not answer the first request: {first.error}")
        yield clients


class Clients:
    """Owned by one event loop."""

    def __init__(
        self, client: httpx.AsyncClient, model: str, load: Load, headers: Callable[[], dict[str, str]]
    ) -> None:
        self._client = client
        self._model = model
        self._load = load
        self._headers = headers

    async def ask_all(self, questions: Sequence[Question], tell: Tell) -> list[Served]:
        waiting = iter(enumerate(questions))
        served: dict[int, Served] = {}

        async def one_client() -> None:
            for number, question in waiting:
                served[number] = await self.ask(question)
                tell(f"{len(served)} of {len(questions)} answered")

        async with asyncio.TaskGroup() as group:
            for _ in range(min(self._load.concurrency, len(questions))):
                group.create_task(one_client())
        return [served[number] for number in range(len(questions))]

    async def ask(self, question: Question) -> Served:
        body: dict[str, object] = {
            "model": self._model,
            "prompt": list(question.prompt),
            "max_tokens": self._load.output_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "return_token_ids": True,
        }
        if self._load.logprobs:
            body["logprobs"] = 0  # of the tokens themselves, and of no others
        watch = Stopwatch(time.perf_counter())
        try:
            transfer = await self._stream(body, watch)
        except httpx.HTTPError as error:
            return watch.served(time.perf_counter(), type(error).__name__)
        except (ServerError, msgspec.DecodeError) as error:
            return watch.served(time.perf_counter(), str(error))
        served = watch.served(time.perf_counter(), transfer=transfer)
        short = self._load.output_tokens - len(served.tokens)
        return msgspec.structs.replace(served, error=f"{short} tokens short") if short > 0 else served

    async def _stream(self, body: dict[str, object], watch: Stopwatch) -> TransferReport | None:
        transfer = None
        headers = {"X-Pdkv-Debug": "1", **self._headers()}
        async with self._client.stream("POST", "/v1/completions", json=body, headers=headers) as response:
            if response.status_code != 200:
                raise _failed(response.status_code, await response.aread())
            async for line in response.aiter_lines():
                if not line.startswith("data: ") or line == "data: [DONE]":
                    continue
                at = time.perf_counter()
                chunk = msgspec.json.decode(line[6:], type=_Chunk)
                if chunk.error is not None:
                    raise ServerError(f"{chunk.error.code}: {chunk.error.message}")
                for choice in chunk.choices:
                    watch.saw(_tokens(choice), at, choice.logprobs.token_logprobs if choice.logprobs else ())
                if chunk.pdkv is not None:
                    transfer = chunk.pdkv.transfer
        return transfer


def _tokens(choice: _Choice) -> list[int]:
    """A server that tells no ids is taken to send one token a piece of text."""
    if choice.token_ids is not None:
        return choice.token_ids
    return [-1] if choice.text else []


def _failed(status: int, body: bytes) -> ServerError:
    try:
        failure = msgspec.json.decode(body, type=_Chunk).error or _Failure()
    except msgspec.DecodeError:
        failure = _Failure()
    return ServerError(f"HTTP {status}, {failure.code}: {failure.message}")


async def _model(client: httpx.AsyncClient) -> str:
    try:
        response = await client.get("/v1/models")
        return msgspec.json.decode(response.raise_for_status().content, type=_Models).data[0].id
    except (httpx.HTTPError, msgspec.DecodeError, IndexError) as error:
        raise ServerError(f"no model is served at {client.base_url}: {error}") from error
