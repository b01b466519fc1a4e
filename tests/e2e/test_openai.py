"""OpenAI's own client against a running deployment: whole answers, streams, errors, many at once, and leaving early."""

import asyncio
from collections.abc import Iterator

import openai
import pytest

from pdkv.verify.link_chasing import make_prompt, text_of
from tests.e2e.deployment import Process
from tests.http import HTTP

MODEL = "link-chasing"


@pytest.fixture
def client(deployment: Process) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{deployment.url}/v1", api_key="none", max_retries=0, timeout=120) as client:
        yield client


def test_models_lists_what_is_served(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]


def test_text_and_ids_give_the_same_answer(client: openai.OpenAI) -> None:
    prompt = make_prompt(1, 300)
    expected = text_of(prompt.expected(12))
    for form in (prompt.text, list(prompt.token_ids)):
        answer = client.completions.create(model=MODEL, prompt=form, max_tokens=12, temperature=0)
        assert answer.choices[0].text == expected
        assert answer.choices[0].finish_reason == "length"
        assert answer.usage
        assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (300, 12)


def test_a_stream_joins_to_the_whole_answer(client: openai.OpenAI) -> None:
    prompt = make_prompt(2, 1000)
    stream = client.completions.create(
        model=MODEL,
        prompt=list(prompt.token_ids),
        max_tokens=20,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"return_token_ids": True},
    )
    *chunks, last = list(stream)
    assert "".join(chunk.choices[0].text for chunk in chunks) == text_of(prompt.expected(20))
    ids = [token for chunk in chunks for token in chunk.choices[0].model_extra["token_ids"]]
    assert ids == list(prompt.expected(20))
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices[0].finish_reason] == ["length"]
    assert last.choices == []
    assert last.usage.total_tokens == 1020


def test_a_chat_is_the_completion_of_what_its_template_makes(client: openai.OpenAI) -> None:
    prompt = make_prompt(6, 900)
    first, *_, question = words = prompt.text.split(" ")
    assert first == "<bos>"
    talk = [
        {"role": "system", "content": " ".join(words[1:500])},
        {"role": "user", "content": [{"type": "text", "text": " ".join(words[500:])}]},
    ]
    answer = client.chat.completions.create(model=MODEL, messages=talk, max_tokens=12, temperature=0)
    (choice,) = answer.choices
    assert choice.message.content == text_of(prompt.expected(12))
    assert (choice.finish_reason, choice.message.role) == ("length", "assistant")
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (900, 12)
    assert question.startswith("n")
    talk += [{"role": "assistant", "content": choice.message.content}]
    more = client.chat.completions.create(model=MODEL, messages=talk, max_tokens=12, temperature=0, n=2)
    assert [one.message.content for one in more.choices] == [text_of(prompt.expected(24)[12:])] * 2


def test_a_chats_stream_joins_to_the_whole_answer(client: openai.OpenAI) -> None:
    prompt = make_prompt(7, 400)
    stream = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": prompt.text.removeprefix("<bos> ")}],
        max_completion_tokens=20,
        temperature=0,
        logprobs=True,
        top_logprobs=2,
        stream=True,
        stream_options={"include_usage": True},
    )
    *chunks, last = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text_of(prompt.expected(20))
    told = [token for chunk in chunks if (block := chunk.choices[0].logprobs) for token in block.content]
    assert "".join(token.token for token in told).strip() == text_of(prompt.expected(20))
    assert all(token.top_logprobs[0].token == token.token and len(token.top_logprobs) == 2 for token in told)
    assert (chunks[-1].choices[0].finish_reason, last.choices) == ("length", [])
    assert last.usage.total_tokens == 420


def test_a_chat_ends_at_its_stop_string_and_refuses_as_completions_do(client: openai.OpenAI) -> None:
    prompt = make_prompt(8, 200)
    expected = text_of(prompt.expected(12))
    stop = " " + expected.split(" ")[5]
    talk = [{"role": "user", "content": prompt.text.removeprefix("<bos> ")}]
    answer = client.chat.completions.create(model=MODEL, messages=talk, max_tokens=12, temperature=0, stop=stop)
    assert answer.choices[0].message.content == expected[: expected.index(stop)]
    assert answer.choices[0].finish_reason == "stop"
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model=MODEL, messages=talk, max_tokens=8192)
    assert refused.value.code == "context_length_exceeded"


def test_sampling_is_repeatable_by_its_seed(client: openai.OpenAI) -> None:
    def ask(seed: int) -> str:
        answer = client.completions.create(model=MODEL, prompt="<bos> pad", max_tokens=8, temperature=2, seed=seed)
        return answer.choices[0].text

    assert ask(7) == ask(7)
    assert len({ask(seed) for seed in range(4)}) > 1


def test_many_at_once_through_the_async_client(deployment: Process) -> None:
    prompts = [make_prompt(seed, 200 + 64 * seed) for seed in range(12)]

    async def ask_all() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{deployment.url}/v1", api_key="none", max_retries=0) as client:
            calls = [
                client.completions.create(model=MODEL, prompt=list(p.token_ids), max_tokens=10, temperature=0)
                for p in prompts
            ]
            return [answer.choices[0].text for answer in await asyncio.gather(*calls)]

    assert asyncio.run(ask_all()) == [text_of(prompt.expected(10)) for prompt in prompts]


def test_an_async_stream(deployment: Process) -> None:
    prompt = make_prompt(3, 500)

    async def read() -> str:
        async with openai.AsyncOpenAI(base_url=f"{deployment.url}/v1", api_key="none", max_retries=0) as client:
            stream = await client.completions.create(
                model=MODEL, prompt=list(prompt.token_ids), max_tokens=10, temperature=0, stream=True
            )
            return "".join([chunk.choices[0].text async for chunk in stream])

    assert asyncio.run(read()) == text_of(prompt.expected(10))


def test_errors_are_the_clients_own(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as unknown:
        client.completions.create(model="nope", prompt="n1")
    assert unknown.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as too_long:
        client.completions.create(model=MODEL, prompt=[5] * 8192, max_tokens=1)
    assert too_long.value.code == "context_length_exceeded"
    wrong = {
        "logprobs": 21,
        "n": 129,
        "best_of": 2,
        "stop": [""],
        "max_tokens": "5",
        "prompt": [4224],
        "top_p": 2,
        "presence_penalty": 1,
        "frequency_penalty": 0.1,
        "logit_bias": {"5": 1},
        "suffix": "x",
    }
    for field, value in wrong.items():
        with pytest.raises(openai.BadRequestError) as refused:
            client.completions.create(**{"model": MODEL, "prompt": "n1", field: value})
        assert refused.value.param == field


def test_a_client_that_leaves_a_stream_does_no_harm(client: openai.OpenAI) -> None:
    prompt = make_prompt(4, 600)
    for _ in range(3):
        with client.completions.create(
            model=MODEL,
            prompt=list(prompt.token_ids),
            max_tokens=4000,
            temperature=0,
            stream=True,
            extra_body={"ignore_eos": True},
        ) as stream:
            next(iter(stream))
    answer = client.completions.create(model=MODEL, prompt=list(prompt.token_ids), max_tokens=8, temperature=0)
    assert answer.choices[0].text == text_of(prompt.expected(8))


def test_unknown_routes_have_openais_error_form(deployment: Process) -> None:
    answer = HTTP.get(f"{deployment.url}/v1/nothing")
    assert answer.status_code == 404
    assert answer.json()["error"]["type"] == "invalid_request_error"
