"""Completions over real HTTP, above scripted engines: lists, stop strings, logprobs, echo, and their failures."""

import json
import secrets
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from pdkv.daemons.job_routes import transfer_of_choice
from pdkv.verify.link_chasing import link_token
from tests.daemons.conftest import Daemon, Fleet, wait_until
from tests.daemons.scripted_engine import FIRST_NODE, Script
from tests.http import HTTP

MODEL = "link-chasing"


@pytest.fixture(scope="module")
def prefill(shared_fleet: Fleet, checkpoint: Path) -> Daemon:
    return shared_fleet.worker("prefill", checkpoint, ready=True)


@pytest.fixture(scope="module")
def decode(shared_fleet: Fleet, checkpoint: Path) -> Daemon:
    return shared_fleet.worker("decode", checkpoint, ready=True)


@pytest.fixture(scope="module")
def router(shared_fleet: Fleet, prefill: Daemon, decode: Daemon) -> Daemon:
    return shared_fleet.router([prefill], [decode])


@pytest.fixture
def client(router: Daemon) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=router.url + "/v1", api_key="none", max_retries=0) as client:
        yield client


def create(client: openai.OpenAI, prompt: object, script: Script = Script.ANSWER, **fields: object) -> object:
    body = {"model": MODEL, "max_tokens": 4, "seed": int(script), **fields}
    return client.completions.create(prompt=prompt, **body)  # type: ignore[call-overload]


def status(worker: Daemon) -> dict:
    return HTTP.get(worker.url + "/pdkv/v1/status").json()


def idle(*workers: Daemon) -> bool:
    return all(status(worker)["pages_free"] == 10 for worker in workers)


def test_each_prompt_of_a_list_has_its_choice(client: openai.OpenAI) -> None:
    for prompt in (["n1", "n1 n2", "n3"], [[64], [64, 65], [66]]):
        answer = create(client, prompt)
        assert [(choice.index, choice.text, choice.finish_reason) for choice in answer.choices] == [
            (index, "n0 n1 n2 n3", "length") for index in range(3)
        ]
        assert answer.usage.model_dump(include={"prompt_tokens", "completion_tokens", "total_tokens"}) == {
            "prompt_tokens": 4,
            "completion_tokens": 12,
            "total_tokens": 16,
        }


def test_a_prompt_may_have_several_choices(client: openai.OpenAI) -> None:
    answer = create(client, ["n1 n2", "n3"], n=2, max_tokens=2)
    assert [(choice.index, choice.text) for choice in answer.choices] == [(index, "n0 n1") for index in range(4)]
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (3, 8)
    with pytest.raises(openai.BadRequestError) as refused:
        create(client, ["n1"] * 65, n=2)
    assert refused.value.param == "n"


def test_choices_of_a_stream_are_told_apart_by_their_index(client: openai.OpenAI) -> None:
    stream = create(client, ["n1", "n2"], stream=True, stream_options={"include_usage": True})
    *chunks, last = list(stream)
    texts = ["", ""]
    for chunk in chunks:
        (choice,) = chunk.choices
        texts[choice.index] += choice.text
        assert chunk.usage is None
    assert texts == ["n0 n1 n2 n3"] * 2
    assert last.choices == []
    assert last.usage.completion_tokens == 8


def test_choices_have_transfers_of_their_own_that_both_roles_derive() -> None:
    transfer = secrets.token_bytes(16)
    ids = [transfer_of_choice(transfer, index) for index in range(300)]
    assert ids[0] == transfer
    assert len(set(ids)) == 300
    assert {len(one) for one in ids} == {16}
    assert ids == [transfer_of_choice(transfer, index) for index in range(300)]


@pytest.mark.parametrize("stream", [False, True])
def test_one_prompt_that_fails_on_decode_fails_them_all_and_frees_them(
    decode: Daemon, prefill: Daemon, stream: bool
) -> None:
    headers = {
        "x-pdkv-transfer": secrets.token_hex(16),
        "x-pdkv-deadline": "30",
        "x-pdkv-prefill-control": "tcp://127.0.0.1:9",
        "x-pdkv-prefill-incarnation": "00",
    }
    body = {"prompt": [[1], [1] * 7, [2]], "seed": int(Script.ONE_OF_SEVEN_FAILS), "stream": stream}
    answer = HTTP.post(decode.url + "/v1/completions", json=body, headers=headers, timeout=60)
    wait_until(lambda: idle(decode, prefill))
    if stream:
        events = answer.text.split("\n\n")
        assert json.loads(events[-2].removeprefix("data: "))["error"]["code"] == "internal"
        assert "[DONE]" not in answer.text
    else:
        assert (answer.status_code, answer.json()["error"]["code"]) == (500, "internal")


def test_one_prompt_that_fails_on_prefill_fails_them_all_and_frees_them(
    router: Daemon, decode: Daemon, prefill: Daemon
) -> None:
    body = {"prompt": [[1], [1] * 7, [2]], "seed": int(Script.ONE_OF_SEVEN_FAILS)}
    answer = HTTP.post(router.url + "/v1/completions", json=body, timeout=60)
    assert answer.status_code == 500
    wait_until(lambda: idle(decode, prefill))


def test_a_client_that_leaves_a_list_frees_all_of_it(router: Daemon, decode: Daemon, prefill: Daemon) -> None:
    body = {"prompt": [[1], [2], [3]], "seed": int(Script.HANG_AFTER_TWO), "stream": True}
    with HTTP.stream("POST", router.url + "/v1/completions", json=body, timeout=60) as answer:
        lines = answer.iter_lines()
        next(lines)
        wait_until(lambda: status(decode)["requests_running"] == 3)
    wait_until(lambda: idle(decode, prefill))


def test_a_stop_string_ends_its_choice_and_frees_its_job(client: openai.OpenAI, decode: Daemon) -> None:
    answer = create(client, [[1], [2, 3]], Script.HANG_AFTER_TWO, stop=["nothing", "n1"])
    assert [(choice.text, choice.finish_reason) for choice in answer.choices] == [("n0 ", "stop")] * 2
    assert answer.usage.completion_tokens == 4
    assert idle(decode), "the pages are free before the client has its answer"


def test_a_stream_never_shows_a_stop_string(client: openai.OpenAI, decode: Daemon) -> None:
    chunks = list(create(client, [1], Script.HANG_AFTER_TWO, stop="0 n1", stream=True))
    assert [(chunk.choices[0].text, chunk.choices[0].finish_reason) for chunk in chunks] == [("n", None), ("", "stop")]
    assert idle(decode)
    ended = list(create(client, [1], Script.ANSWER, stop=" n3 n", stream=True))
    assert "".join(chunk.choices[0].text for chunk in ended) == "n0 n1 n2 n3"
    assert ended[-1].choices[0].finish_reason == "length"


def test_logprobs_have_openais_legacy_form(client: openai.OpenAI) -> None:
    (choice,) = create(client, [1, 2], logprobs=1, max_tokens=2).choices
    rival = "<lost>"
    assert choice.logprobs.model_dump() == {
        "text_offset": [0, 2],
        "token_logprobs": [-0.5, -1.0],
        "tokens": [" n0", " n1"],
        "top_logprobs": [{" " + rival: -0.25, " n0": -0.5}, {" " + rival: -0.25, " n1": -1.0}],
    }
    assert create(client, [1, 2]).choices[0].logprobs is None
    bare = create(client, [1, 2], logprobs=0, max_tokens=1).choices[0].logprobs
    assert bare.top_logprobs == [{" n0": -0.5}]
    chunks = [chunk.choices[0] for chunk in create(client, [1, 2], logprobs=1, max_tokens=2, stream=True)]
    assert [lp for chunk in chunks for lp in chunk.logprobs.token_logprobs] == [-0.5, -1.0]
    assert [offset for chunk in chunks for offset in chunk.logprobs.text_offset] == [0, 2]


@pytest.mark.parametrize("prompt", ["n1  n2 n3", [65, 66, 67]])
def test_an_echo_brings_the_prompt_and_what_the_model_thought_of_it(client: openai.OpenAI, prompt: object) -> None:
    (choice,) = create(client, prompt, echo=True, logprobs=1, max_tokens=1).choices
    text = prompt if isinstance(prompt, str) else "n1 n2 n3"
    assert choice.text == text + " n0"
    assert choice.logprobs.tokens == [" n1", " n2", " n3", " n0"]
    assert choice.logprobs.token_logprobs == [None, 0.0, -1.0, -0.5]
    assert choice.logprobs.top_logprobs[:2] == [None, {" <lost>": -0.125, " n2": 0.0}]
    starts = [text.index("n2"), text.index("n3")] if isinstance(prompt, str) else [2, 5]
    assert choice.logprobs.text_offset == [0, *starts, len(text)]


def test_an_echo_alone_needs_no_tokens_and_no_logprobs(client: openai.OpenAI) -> None:
    answer = create(client, ["n1 n2", "n3"], echo=True, max_tokens=0)
    assert [(choice.text, choice.finish_reason) for choice in answer.choices] == [("n1 n2", "length"), ("n3", "length")]
    assert answer.usage.completion_tokens == 0
    chunks = list(create(client, "n1", echo=True, max_tokens=2, stream=True))
    assert [chunk.choices[0].text for chunk in chunks] == ["n1", " n0", " n1", ""]


def test_what_is_asked_of_a_list_is_told_of_each(router: Daemon) -> None:
    body = {"prompt": [[1], [2]], "seed": 1, "max_tokens": 1, "return_token_ids": True}
    answer = HTTP.post(router.url + "/v1/completions", json=body, headers={"X-Pdkv-Debug": "1"}).json()
    assert [choice["token_ids"] for choice in answer["choices"]] == [[FIRST_NODE]] * 2
    assert len(answer["pdkv"]["transfers"]) == 2


def test_text_becomes_ids_and_ids_become_text(router: Daemon, decode: Daemon, prefill: Daemon) -> None:
    for daemon in (router, decode, prefill):
        tokens = HTTP.post(daemon.url + "/tokenize", json={"model": MODEL, "prompt": "n1>n2 n1"})
        assert tokens.json() == {"tokens": [link_token(1, 2), 65], "count": 2, "max_model_len": 512, "token_strs": None}
        text = HTTP.post(daemon.url + "/detokenize", json={"tokens": [1, link_token(1, 2), 65, 2]})
        assert text.json() == {"prompt": "<bos> n1>n2 n1 <eos>"}
        info = HTTP.get(daemon.url + "/tokenizer_info").json()
        assert (info["bos_token"], info["eos_token"]) == ("<bos>", "<eos>")
    asked = {"prompt": "n1", "add_special_tokens": False, "return_token_strs": True}
    assert HTTP.post(router.url + "/tokenize", json=asked).json()["token_strs"] == [" n1"]


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": [1]}, "prompt"),
        ("/tokenize", {"messages": []}, "messages"),
        ("/tokenize", {"prompt": "a", "add_special_tokens": 1}, "add_special_tokens"),
        ("/detokenize", {"tokens": "a"}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens"),
        ("/detokenize", {}, "tokens"),
    ],
)
def test_wrong_questions_about_text_name_the_field(router: Daemon, path: str, body: dict, param: str) -> None:
    answer = HTTP.post(router.url + path, json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
    assert HTTP.post(router.url + path, json={"model": "nope", **body}).status_code in (400, 404)


def test_without_workers_nobody_tokenizes(fleet: Fleet, prefill: Daemon) -> None:
    nobody = Daemon.__new__(Daemon)
    nobody.url = "http://127.0.0.1:1"
    router = fleet.router([nobody], [nobody], ready=False)
    answer = HTTP.post(router.url + "/tokenize", json={"prompt": "n1"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "not_ready")
