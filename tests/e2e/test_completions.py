"""All of completions through prefill and decode with OpenAI's client: lists, top_p, stops, logprobs, echo, tokens."""

import asyncio
import math
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from pdkv.m3.model import M3Model, load_model
from pdkv.m3.sampling import SamplingParams
from pdkv.verify.link_chasing import make_prompt, text_of
from pdkv.verify.undivided import complete_with
from tests.e2e.deployment import Trio, wait_until
from tests.http import HTTP

MODEL = "link-chasing"


@pytest.fixture
def client(three: Trio) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{three.router.url}/v1", api_key="none", max_retries=0, timeout=120) as client:
        yield client


@pytest.fixture(scope="module")
def model(link_chasing_model: Path) -> M3Model:
    return load_model(link_chasing_model)


def all_free(three: Trio) -> None:
    wait_until(lambda: three.prefill.holds_nothing() and three.decode.holds_nothing(), "every page is free")


def test_a_list_is_answered_prompt_by_prompt(client: openai.OpenAI, three: Trio) -> None:
    prompts = [make_prompt(seed, 200 + 150 * seed) for seed in range(5)]
    expected = [text_of(prompt.expected(9)) for prompt in prompts]
    for form in ([prompt.text for prompt in prompts], [list(prompt.token_ids) for prompt in prompts]):
        answer = client.completions.create(model=MODEL, prompt=form, max_tokens=9, temperature=0)
        assert [choice.text for choice in answer.choices] == expected
        assert [choice.index for choice in answer.choices] == list(range(5))
        assert answer.usage
        assert answer.usage.prompt_tokens == sum(len(prompt.token_ids) for prompt in prompts)
        assert answer.usage.completion_tokens == 45
    all_free(three)


def test_a_list_streams_in_choices_that_mingle(three: Trio) -> None:
    prompts = [make_prompt(seed, 300) for seed in range(3)]

    async def read() -> list[str]:
        texts = [""] * 3
        async with openai.AsyncOpenAI(base_url=f"{three.router.url}/v1", api_key="none", max_retries=0) as client:
            stream = await client.completions.create(
                model=MODEL,
                prompt=[list(prompt.token_ids) for prompt in prompts],
                max_tokens=40,
                temperature=0,
                stream=True,
            )
            async for chunk in stream:
                order.append(chunk.choices[0].index)
                texts[chunk.choices[0].index] += chunk.choices[0].text
        return texts

    order: list[int] = []
    assert asyncio.run(read()) == [text_of(prompt.expected(40)) for prompt in prompts]
    assert order != sorted(order), "no choice waited for another to end"


def test_more_than_there_are_pages_for_is_answered_one_after_another(client: openai.OpenAI, three: Trio) -> None:
    """Each prompt reserves pages for an answer of 4,000 tokens, and its stop string gives them back."""
    prompts = [make_prompt(seed, 130) for seed in range(24)]
    assert int(str(three.decode.status()["pages_usable"])) < 24 * (4130 // 128)
    answer = client.completions.create(
        model=MODEL,
        prompt=[list(prompt.token_ids) for prompt in prompts],
        max_tokens=4000,
        temperature=0,
        stop=" ",
        extra_body={"ignore_eos": True},
    )
    assert [choice.text for choice in answer.choices] == [text_of(prompt.expected(1)) for prompt in prompts]
    assert {choice.finish_reason for choice in answer.choices} == {"stop"}
    all_free(three)


def test_a_list_with_one_prompt_too_long_is_refused_whole(client: openai.OpenAI, three: Trio) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(model=MODEL, prompt=[[5], [5] * 8192], max_tokens=1)
    assert refused.value.code == "context_length_exceeded"
    all_free(three)


def test_a_client_that_leaves_a_list_frees_every_page(client: openai.OpenAI, three: Trio) -> None:
    prompts = [list(make_prompt(seed, 400).token_ids) for seed in range(6)]
    with client.completions.create(
        model=MODEL, prompt=prompts, max_tokens=4000, temperature=0, stream=True, extra_body={"ignore_eos": True}
    ) as stream:
        next(iter(stream))
    all_free(three)


@pytest.mark.parametrize("top_p", [1.0, 0.7, 0.2])
def test_a_seed_and_a_nucleus_draw_what_one_undivided_engine_draws(
    client: openai.OpenAI, model: M3Model, top_p: float
) -> None:
    """The checkpoint is so sure that its answers hardly vary; a prompt that leads nowhere leaves it undecided."""
    prompt = (1, *range(3, 60))
    sampling = SamplingParams(temperature=2.0, seed=11, top_p=top_p)
    expected = complete_with(model, prompt, 16, sampling, ignore_eos=True)
    assert len(set(expected.token_ids)) > 3
    answer = client.completions.create(
        model=MODEL,
        prompt=list(prompt),
        max_tokens=16,
        temperature=2,
        seed=11,
        top_p=top_p,
        logprobs=1,
        extra_body={"return_token_ids": True, "ignore_eos": True},
    )
    assert answer.choices[0].model_extra
    assert tuple(answer.choices[0].model_extra["token_ids"]) == expected.token_ids
    assert answer.choices[0].logprobs
    assert answer.choices[0].logprobs.token_logprobs == pytest.approx(expected.logprobs, abs=1e-3)


def test_a_stop_string_across_tokens_ends_the_answer_and_frees_both_sides(client: openai.OpenAI, three: Trio) -> None:
    prompt = make_prompt(5, 400)
    whole = text_of(prompt.expected(40))
    words = whole.split(" ")
    stop = words[4][-1] + " " + words[5]
    cut = whole.index(stop)
    fields = {"model": MODEL, "prompt": list(prompt.token_ids), "max_tokens": 4000, "temperature": 0}
    ignoring = {"ignore_eos": True, "return_token_ids": True}
    answer = client.completions.create(**fields, stop=["no such", stop], extra_body=ignoring)
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == (whole[:cut], "stop")
    all_free(three)
    chunks = list(client.completions.create(**fields, stop=stop, stream=True, extra_body=ignoring))
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole[:cut]
    assert chunks[-1].choices[0].finish_reason == "stop"
    all_free(three)


def test_echoed_prompts_are_scored_as_the_undivided_model_scores_them(client: openai.OpenAI, model: M3Model) -> None:
    """A chain that is written out in the prompt is what the model would have said itself; a filler is not."""
    prompt = make_prompt(6, 700)
    told = [*prompt.token_ids, *prompt.expected(6), 3]
    answer = client.completions.create(
        model=MODEL, prompt=told, max_tokens=1, echo=True, logprobs=2, temperature=0, seed=1234
    )
    scores = answer.choices[0].logprobs
    assert scores
    assert scores.tokens
    assert scores.token_logprobs
    assert scores.top_logprobs
    assert len(scores.tokens) == len(scores.token_logprobs) == len(scores.text_offset or []) == len(told) + 1
    assert scores.token_logprobs[0] is None
    chain = range(len(prompt.token_ids), len(told) - 1)
    for i in chain:
        assert scores.token_logprobs[i] == max(scores.top_logprobs[i].values()), "greedy would have said it"
    unlikely = len(told) - 1
    assert scores.token_logprobs[unlikely] < max(scores.top_logprobs[unlikely].values()) - 1
    undivided = complete_with(model, prompt.token_ids, 6)
    assert [scores.token_logprobs[i] for i in chain] == pytest.approx(undivided.logprobs, abs=1e-3)
    for i in (1, 300, unlikely):
        assert sum(map(math.exp, scores.top_logprobs[i].values())) <= 1 + 1e-6


def test_echo_keeps_the_prompts_own_text(client: openai.OpenAI) -> None:
    prompt = make_prompt(7, 200)
    text = prompt.text.replace(" ", "  ", 3)
    answer = client.completions.create(model=MODEL, prompt=text, max_tokens=4, echo=True, temperature=0)
    assert answer.choices[0].text == f"{text} {text_of(prompt.expected(4))}"
    alone = client.completions.create(model=MODEL, prompt=[text, "n1"], max_tokens=0, echo=True)
    assert [choice.text for choice in alone.choices] == [text, "n1"]
    assert alone.usage
    assert alone.usage.completion_tokens == 0


def test_a_prompt_too_long_to_score_is_refused_by_name(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(model=MODEL, prompt=[[5] * 8000] * 5, max_tokens=1, echo=True, logprobs=20)
    assert refused.value.param == "logprobs"
    assert "38362" in str(refused.value)


def test_the_router_tokenizes_as_the_workers_do(three: Trio) -> None:
    prompt = make_prompt(8, 150)
    tokens = HTTP.post(three.router.url + "/tokenize", json={"prompt": prompt.text}).json()
    assert tokens["tokens"] == list(prompt.token_ids)
    assert (tokens["count"], tokens["max_model_len"]) == (150, 8192)
    text = HTTP.post(three.router.url + "/detokenize", json={"tokens": tokens["tokens"]}).json()
    assert text == {"prompt": prompt.text}
