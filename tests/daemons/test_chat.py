"""Chat completions over real HTTP, above scripted engines: whole answers, streams, logprobs, refusals, failures."""

import json
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from pdkv.verify.link_chasing import link_token
from pdkv.verify.link_chasing_checkpoint import CHAT_TEMPLATE
from tests.daemons.conftest import Daemon, Fleet, wait_until
from tests.daemons.scripted_engine import FIRST_NODE, Script
from tests.http import HTTP

MODEL = "link-chasing"
TALK = [{"role": "system", "content": "n1>n2"}, {"role": "user", "content": "n1"}]


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


def create(client: openai.OpenAI, script: Script = Script.ANSWER, **fields: object):
    body = {"model": MODEL, "messages": TALK, "max_tokens": 4, "seed": int(script), **fields}
    return client.chat.completions.create(**body)  # type: ignore[call-overload]


def events(text: str) -> list[dict]:
    found = [event.removeprefix("data: ") for event in text.split("\n\n") if event]
    return [json.loads(event) for event in found if event != "[DONE]"]


def idle(*workers: Daemon) -> bool:
    return all(HTTP.get(worker.url + "/pdkv/v1/status").json()["pages_free"] == 10 for worker in workers)


def test_a_whole_answer(client: openai.OpenAI) -> None:
    answer = create(client)
    (choice,) = answer.choices
    assert (choice.message.role, choice.message.content) == ("assistant", "n0 n1 n2 n3")
    assert (choice.finish_reason, choice.logprobs) == ("length", None)
    assert (answer.object, answer.model) == ("chat.completion", MODEL)
    assert answer.usage.model_dump(exclude={"completion_tokens_details"}) == {
        "prompt_tokens": 3,
        "completion_tokens": 4,
        "total_tokens": 7,
        "prompt_tokens_details": {
            **answer.usage.prompt_tokens_details.model_dump(exclude={"cached_tokens"}),
            "cached_tokens": 2,
        },
    }


def test_a_stream_begins_with_the_role_and_ends_with_the_reason(router: Daemon) -> None:
    body = {"messages": TALK, "max_tokens": 3, "seed": 1, "stream": True, "stream_options": {"include_usage": True}}
    answer = HTTP.post(router.url + "/v1/chat/completions", json=body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.text.endswith("data: [DONE]\n\n")
    *chunks, last = events(answer.text)
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in [*chunks, last]}) == 1
    assert [(chunk["choices"][0]["delta"], chunk["choices"][0]["finish_reason"]) for chunk in chunks] == [
        ({"role": "assistant", "content": ""}, None),
        ({"content": "n0"}, None),
        ({"content": " n1"}, None),
        ({"content": " n2"}, None),
        ({}, "length"),
    ]
    assert all(chunk["usage"] is None for chunk in chunks)
    assert (last["choices"], last["usage"]["completion_tokens"]) == ([], 3)


def test_the_openai_client_reads_the_stream(client: openai.OpenAI) -> None:
    chunks = list(create(client, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "n0 n1 n2 n3"
    assert [chunk.choices[0].finish_reason for chunk in chunks][-1] == "length"


def test_logprobs_have_the_form_of_chat(client: openai.OpenAI) -> None:
    (choice,) = create(client, logprobs=True, top_logprobs=1, max_tokens=2).choices
    rival = {"token": " <lost>", "logprob": -0.25, "bytes": list(b" <lost>")}
    assert choice.logprobs.model_dump(exclude={"refusal"}) == {
        "content": [
            {"token": " n0", "logprob": -0.5, "bytes": list(b" n0"), "top_logprobs": [rival]},
            {"token": " n1", "logprob": -1.0, "bytes": list(b" n1"), "top_logprobs": [rival]},
        ]
    }
    bare = create(client, logprobs=True, max_tokens=1).choices[0].logprobs
    assert bare.content[0].top_logprobs == []
    chunks = list(create(client, logprobs=True, max_tokens=2, stream=True))
    told = [chunk.choices[0].logprobs for chunk in chunks if chunk.choices[0].logprobs]
    assert [token.logprob for one in told for token in one.content] == [-0.5, -1.0]


def test_several_choices_are_told_apart(client: openai.OpenAI) -> None:
    answer = create(client, n=3, max_tokens=2)
    assert [(choice.index, choice.message.content) for choice in answer.choices] == [(i, "n0 n1") for i in range(3)]
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (3, 6)
    texts, roles = ["", ""], [0, 0]
    for chunk in create(client, n=2, max_tokens=2, stream=True):
        (choice,) = chunk.choices
        texts[choice.index] += choice.delta.content or ""
        roles[choice.index] += choice.delta.role is not None
    assert (texts, roles) == (["n0 n1"] * 2, [1, 1])


def test_a_stop_string_ends_the_answer_and_frees_its_job(client: openai.OpenAI, decode: Daemon) -> None:
    (choice,) = create(client, Script.HANG_AFTER_TWO, stop=["n1"]).choices
    assert (choice.message.content, choice.finish_reason) == ("n0 ", "stop")
    assert idle(decode)


def test_without_a_number_of_tokens_the_context_is_filled(client: openai.OpenAI) -> None:
    answer = create(client, max_tokens=None)
    assert answer.usage.total_tokens == 512
    assert answer.choices[0].finish_reason == "length"


def test_extensions_are_those_of_completions(router: Daemon) -> None:
    body = {"messages": TALK, "seed": 1, "max_tokens": 2, "return_token_ids": True}
    answer = HTTP.post(router.url + "/v1/chat/completions", json=body, headers={"X-Pdkv-Debug": "1"}).json()
    assert answer["choices"][0]["token_ids"] == [FIRST_NODE, FIRST_NODE + 1]
    assert answer["pdkv"]["transfer"]["num_bytes"] == 128
    stream = HTTP.post(
        router.url + "/v1/chat/completions", json={**body, "stream": True}, headers={"X-Pdkv-Debug": "1"}
    )
    chunks = events(stream.text)
    ids = [token for chunk in chunks for token in chunk["choices"][0].get("token_ids", [])]
    assert ids == [FIRST_NODE, FIRST_NODE + 1]
    assert [bool(chunk.get("pdkv")) for chunk in chunks] == [False] * (len(chunks) - 1) + [True]


@pytest.mark.parametrize(
    ("fields", "status", "param", "code"),
    [
        ({"model": "nope"}, 404, "model", "model_not_found"),
        ({"messages": []}, 400, "messages", None),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "messages", None),
        ({"messages": [{"role": "user", "content": "n1 " * 600}]}, 400, "messages", "context_length_exceeded"),
        ({"max_tokens": 510}, 400, "max_tokens", "context_length_exceeded"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]}]}, 400, "messages", None),
        ({"tool_choice": "required"}, 400, "tool_choice", "unsupported_parameter"),
        ({"response_format": {"type": "json_object"}}, 400, "response_format", "unsupported_parameter"),
        ({"prompt": "n1"}, 400, "prompt", "unknown_parameter"),
        ({"seed": int(Script.FULL)}, 503, None, "no_capacity"),
        ({"seed": int(Script.PREFILL_FAILS)}, 500, None, "internal"),
        ({"seed": int(Script.FAIL_AFTER_TWO)}, 500, None, "internal"),
    ],
)
def test_refusals(router: Daemon, fields: dict, status: int, param: str | None, code: str | None) -> None:
    body = {"messages": TALK, "max_tokens": 4, "seed": 1, **fields}
    answer = HTTP.post(router.url + "/v1/chat/completions", json=body, timeout=60)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"], error["code"]) == (status, param, code)


def test_a_failure_in_a_stream_is_an_event_and_no_done(router: Daemon) -> None:
    body = {"messages": TALK, "seed": int(Script.FAIL_AFTER_TWO), "stream": True}
    answer = HTTP.post(router.url + "/v1/chat/completions", json=body)
    *chunks, last = events(answer.text)
    assert last["error"]["code"] == "internal"
    assert "[DONE]" not in answer.text
    assert "".join(chunk["choices"][0]["delta"]["content"] for chunk in chunks) == "n0 n1"


def test_a_client_that_leaves_frees_both_workers(router: Daemon, decode: Daemon, prefill: Daemon) -> None:
    body = {"messages": TALK, "seed": int(Script.HANG_AFTER_TWO), "stream": True, "n": 2}
    with HTTP.stream("POST", router.url + "/v1/chat/completions", json=body, timeout=60) as answer:
        next(answer.iter_lines())
    wait_until(lambda: idle(decode, prefill))


def test_a_conversation_becomes_ids_on_every_daemon(router: Daemon, decode: Daemon, prefill: Daemon) -> None:
    for daemon in (router, decode, prefill):
        tokens = HTTP.post(daemon.url + "/tokenize", json={"model": MODEL, "messages": TALK}).json()
        assert tokens["tokens"] == [1, link_token(1, 2), 65], "one <bos>, from the template"
        info = HTTP.get(daemon.url + "/tokenizer_info").json()
        assert info == {
            "bos_token": "<bos>",
            "eos_token": "<eos>",
            "pad_token": None,
            "chat_template": CHAT_TEMPLATE,
            "tokenizer_class": "PreTrainedTokenizerFast",
            "max_model_len": 512,
        }
    strings = HTTP.post(router.url + "/tokenize", json={"messages": TALK[1:], "return_token_strs": True}).json()
    assert strings["token_strs"] == [" <bos>", " n1"]
    both = HTTP.post(router.url + "/tokenize", json={"messages": TALK, "prompt": "n1"})
    assert (both.status_code, both.json()["error"]["param"]) == (400, "prompt")


def test_both_workers_render_with_the_routers_clock(fleet: Fleet, checkpoint: Path, tmp_path: Path) -> None:
    model = tmp_path / "clock"
    model.mkdir()
    for path in checkpoint.iterdir():
        (model / path.name).symlink_to(path)
    (model / "chat_template.jinja").write_text("{{ strftime_now('%Y') | replace('1970', 'n7 n8') }}")
    decode = fleet.worker("decode", model, ready=True)
    headers = {
        "x-pdkv-transfer": "00" * 16,
        "x-pdkv-deadline": "30",
        "x-pdkv-prefill-control": "tcp://127.0.0.1:9",
        "x-pdkv-prefill-incarnation": "00",
    }
    body = {"messages": TALK, "seed": 1, "max_tokens": 1}
    for at, num_tokens in (("5.5", 2), ("1e9", 1)):
        headers["x-pdkv-asked-at"] = at
        answer = HTTP.post(decode.url + "/v1/chat/completions", json=body, headers=headers)
        assert answer.json()["usage"]["prompt_tokens"] == num_tokens
    headers["x-pdkv-asked-at"] = "yesterday"
    refused = HTTP.post(decode.url + "/v1/chat/completions", json=body, headers=headers)
    assert (refused.status_code, "x-pdkv-asked-at" in refused.text) == (400, True)


def test_without_a_template_or_a_tokenizer_the_error_says_how_to_mend_it(
    fleet: Fleet, checkpoint: Path, bare_checkpoint: Path, tmp_path: Path
) -> None:
    model = tmp_path / "plain"
    model.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (model / name).symlink_to(checkpoint / name)
    for folder, told in ((model, "chat_template.jinja"), (bare_checkpoint, "tokenizer.json")):
        worker = fleet.worker("decode", folder, ready=True)
        answer = HTTP.post(worker.url + "/tokenize", json={"messages": TALK})
        assert answer.status_code == 400
        assert told in answer.json()["error"]["message"]
