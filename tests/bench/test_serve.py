"""Load on servers: what is timed and counted, that failures are told, and that wrong answers are seen."""

import asyncio
import json
import signal
import threading
from pathlib import Path

import msgspec
import pytest

from pdkv.bench import http_clients, serve
from pdkv.bench.http_clients import ServerError
from pdkv.bench.serve_load import Load, Served, Side, Spread, Stopwatch, chains, noise
from pdkv.bench.undivided_clients import Undivided
from pdkv.daemons.config import UpConfig
from pdkv.errors import ConfigError
from pdkv.verify.undivided import complete
from tests.bench.scripted_server import served, tokens
from tests.soak import write_tiny_checkpoint

SMALL = Load(concurrency=2, requests=5, input_tokens=100, output_tokens=4)
FACTS = {
    "num_pages": 1,
    "num_regions": 2,
    "num_spans": 1,
    "num_bytes": 100,
    "bytes_by_region": {"k": 100},
    "bytes_before_done": 75,
    "read_s": 0.1,
    "total_s": 0.2,
    "path": "shm",
    "peer": "p",
    "exposed_s": 0.025,
    "hidden_fraction": 0.75,
    "granted_s": 0.05,
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tiny")
    write_tiny_checkpoint(directory)
    return directory


def quiet(_: str) -> None:
    pass


def ask(script, plan=None):
    with served(script) as url:
        return serve.run(plan or serve.ServePlan(SMALL, url=url, timeout_s=30), quiet)


def test_a_stopwatch_divides_gaps_among_tokens_that_come_together():
    watch = Stopwatch(10.0)
    for group, at in (([], 10.5), ([1], 11.0), ([2, 3], 12.0), ([4], 12.25)):
        watch.saw(group, at, [-0.5 * token for token in group])
    one = watch.served(13.0)
    assert one.logprobs == (-0.5, -1.0, -1.5, -2.0)
    assert (one.tokens, one.ttft_s, one.itl_s, one.total_s) == ((1, 2, 3, 4), 1.0, (0.5, 0.5, 0.25), 3.0)


def test_a_side_sums_up_what_was_answered_and_counts_the_rest():
    good = [Served((1, 2), ttft_s=n / 100, itl_s=(n / 1000,), total_s=n / 10) for n in range(1, 101)]
    side = Side.of("divided", [*good, Served(error="no"), Served(error="no")], 50.0)
    assert (side.answered, side.errors, side.requests_per_s, side.output_tokens_per_s) == (100, {"no": 2}, 2.0, 4.0)
    assert side.ttft_ms == Spread(505.0, 901.0, 990.1, 1000.0)
    assert side.exposed_ms is None
    assert Side.of("divided", [Served(error="no")], 1.0).ttft_ms is None


def test_prompts_are_the_seeds_and_never_alike():
    for made, again in ((chains(SMALL), chains(SMALL)), (noise(SMALL), noise(SMALL))):
        assert made == again
        assert len({question.prompt for question in made}) == 6
        assert {len(question.prompt) for question in made} == {100}
    assert all(len(question.expected) == 4 for question in chains(SMALL))
    assert {min(q.prompt) >= 3 and max(q.prompt) < 1000 for q in noise(SMALL)} == {True}
    with pytest.raises(ConfigError, match="--input-tokens 63 is less than the 64 of a chain"):
        chains(msgspec.structs.replace(SMALL, input_tokens=63))


def test_every_answer_is_streamed_and_counted():
    bodies = []

    def script(body):
        bodies.append(body)
        return tokens([7], [8, 9], [10], transfer=FACTS)

    report = ask(script)
    (side,) = report.sides
    assert (side.answered, side.errors, side.paths) == (5, {}, {"shm": 5})
    assert side.exposed_ms == Spread(25.0, 25.0, 25.0, 25.0)
    assert side.exposed_share == Spread(0.2, 0.2, 0.2, 0.2), "25 ms of 0.2 s, less as much and 50 ms until Granted"
    assert side.hidden == Spread(0.75, 0.75, 0.75, 0.75)
    assert len(bodies) == 6, "one warms up"
    assert all(body["stream"] and body["ignore_eos"] and body["max_tokens"] == 4 for body in bodies)
    shown = serve.table(report)
    assert "transfers: 5 over shm" in shown
    assert "answers: not compared" in shown
    assert json.loads(msgspec.json.encode(report))["schema"] == "pdkv.bench.serve/1"


def test_no_more_clients_than_asked_for_are_at_work():
    lock, at_work, most = threading.Lock(), [0], [0]

    def script(_):
        with lock:
            at_work[0] += 1
            most[0] = max(most[0], at_work[0])

        def stream():
            yield from tokens([1], [2], [3])
            with lock:
                at_work[0] -= 1
            yield from tokens([4])

        return stream()

    ask(script)
    assert 1 <= most[0] <= 2


def test_failures_of_every_kind_are_told_and_counted():
    asked = iter(range(100))

    def script(_):
        kinds = {
            1: lambda: 503,
            2: lambda: tokens([1], [2]),
            3: lambda: iter([b'data: {"error": {"message": "gone", "code": "peer_lost"}}']),
            4: lambda: iter([b"data: {"]),
        }
        return kinds.get(next(asked), lambda: tokens([1, 2, 3, 4]))()

    report = ask(script)
    (side,) = report.sides
    assert side.answered == 1
    assert sorted(side.errors.values()) == [1, 1, 1, 1]
    assert {"HTTP 503, scripted: as told", "2 tokens short", "peer_lost: gone"} <= set(side.errors)
    assert report.failed
    assert "divided: 1 failed: peer_lost: gone" in serve.table(report)


def test_a_server_that_is_not_there_or_refuses_all():
    with pytest.raises(ServerError, match="did not answer the first request: HTTP 500"):
        ask(lambda _: 500)
    with pytest.raises(ServerError, match="no model is served at http://127.0.0.1:1"):
        serve.run(serve.ServePlan(SMALL, url="http://127.0.0.1:1"), quiet)


def test_a_server_that_asks_for_a_key_gets_it():
    with served(lambda _: tokens([1, 2], [3, 4]), api_key="sk-one") as url:
        report = serve.run(serve.ServePlan(SMALL, url=url, timeout_s=30, api_key="sk-one"), quiet)
        assert not report.failed
        with pytest.raises(ServerError, match="401"):
            serve.run(serve.ServePlan(SMALL, url=url, timeout_s=30), quiet)


@pytest.fixture
def _ctrl_c():
    """As in a terminal: a shell's background jobs ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_ctrl_c")
@pytest.mark.parametrize("turn", [*range(1, 16), 40])
def test_a_ctrl_c_ends_it_at_whatever_turn_of_the_loop_it_comes(turn):
    """Also at that in which a connection is made: before 4.16 anyio took it for a cancellation of its own."""

    async def clients(url):
        loop = asyncio.get_running_loop()

        def count(turns):
            if turns:
                loop.call_soon(count, turns - 1)
            else:
                signal.raise_signal(signal.SIGINT)

        loop.call_soon(count, turn)
        await http_clients.run(url, SMALL, chains(SMALL), 30, quiet)

    def script(_):
        return tokens([1], [2], [3], [4])

    with served(script) as url, pytest.raises(KeyboardInterrupt):
        asyncio.run(clients(url))


def test_answers_of_chains_are_known():
    right = {question.prompt: list(question.expected) for question in chains(SMALL)}
    wrong = chains(SMALL)[2].prompt

    def script(body):
        prompt = tuple(body["prompt"])
        return tokens([0, 0, 0, 0] if prompt == wrong else right[prompt])

    with served(script) as url:
        report = serve.run(serve.ServePlan(SMALL, url=url, chains=True), quiet)
    assert (report.answers.compared, report.answers.equal) == (5, 4)
    assert report.answers.wrong == ("divided, request 2: [0, 0, 0, 0]",)
    assert "WRONG: divided, request 2" in serve.table(report)


def test_the_undivided_engine_answers_as_it_does_alone_and_judges_what_differs(checkpoint):
    """One answer has a wrong token, one is right and told with a log-probability that is not."""
    up = UpConfig(model=checkpoint, threads=1)
    engine = Undivided(up)
    load = msgspec.structs.replace(SMALL, logprobs=True)
    questions = noise(load, (0, engine.vocab_size))
    alone = [complete(checkpoint, q.prompt, 4, ignore_eos=True) for q in questions]
    number_of = {question.prompt: number for number, question in enumerate(questions)}

    def script(body):
        assert body["logprobs"] == 0
        number = number_of[tuple(body["prompt"])]
        told, logprobs = list(alone[number].token_ids), list(alone[number].logprobs)
        if number == 3:
            told[2] = (told[2] + 1) % engine.vocab_size
        if number == 1:
            logprobs[3] -= 0.01
        return tokens(told[:1], told[1:], logprobs=logprobs)

    with served(script) as url:
        report = serve.run(serve.ServePlan(load, up, url), quiet)
    _, undivided = report.sides
    assert undivided.answered == 5
    assert undivided.ttft_ms is not None
    assert undivided.itl_ms is not None
    answers = report.answers
    assert (answers.compared, answers.equal, answers.near_ties) == (5, 3, ())
    assert [text[: text.index(":")] for text in answers.wrong] == [
        "divided, request 1, token 3",
        "divided, request 3, token 2",
    ]
    assert [(one.side, one.equal) for one in answers.sides] == [("divided", 3), ("undivided", 5)]
    assert answers.rounding is not None
    assert answers.rounding.tokens == 20
    assert answers.rounding.token_margin < 1e-2, "of float32"
    shown = serve.table(report)
    assert "answers, undivided: 5 of 5 equal" in shown
    assert "WRONG: divided, request 3, token 2" in shown
    both, _ = engine.run(load, questions, quiet, replicas=2)
    expected = [one.token_ids for one in alone[:5]]
    assert [one.tokens for one in both] == expected, "two engines' shares are put together in the questions' order"
