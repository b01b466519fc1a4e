"""Request bodies are read strictly, and what is not implemented is refused by name."""

import json

import pytest

from pdkv.daemons import generation
from pdkv.daemons.completion_request import CompletionRequest, parse_completion
from pdkv.daemons.generation import Options
from pdkv.daemons.request_fields import MAX_STOPS
from pdkv.errors import RequestError


def _parse(**fields: object) -> CompletionRequest:
    return parse_completion(json.dumps(fields).encode())


def _refusal(**fields: object) -> RequestError:
    with pytest.raises(RequestError) as refused:
        _parse(**fields)
    return refused.value


def test_defaults_are_openais() -> None:
    assert _parse(prompt="hi") == CompletionRequest(
        ["hi"], 16, Options(model=None, temperature=1.0, top_p=1.0, seed=None, stream=False, n=1)
    )


def test_every_field_is_read() -> None:
    parsed = _parse(
        model="m",
        prompt=[1, 2],
        max_tokens=3,
        temperature=0,
        seed=-5,
        stream=True,
        stream_options={"include_usage": True},
        ignore_eos=True,
        return_token_ids=True,
        top_p=0.5,
        stop=["a", "b"],
        logprobs=5,
        echo=True,
        user="somebody",
        n=2,
    )
    options = Options(
        model="m",
        temperature=0.0,
        seed=-5,
        stream=True,
        include_usage=True,
        ignore_eos=True,
        return_token_ids=True,
        top_p=0.5,
        stop=("a", "b"),
        logprobs=5,
        echo=True,
        user="somebody",
        n=2,
    )
    assert parsed == CompletionRequest([[1, 2]], 3, options)
    assert options.prompt_logprobs == 5


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("a", ["a"]),
        (["a"], ["a"]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [[1, 2]]),
        ([[1, 2], [3]], [[1, 2], [3]]),
        ([[]], [[]]),
        ([], [[]]),
    ],
)
def test_a_prompt_is_one_or_a_list_of_a_kind(prompt: object, prompts: list[object]) -> None:
    assert _parse(prompt=prompt).prompts == prompts


@pytest.mark.parametrize(("stop", "stops"), [("", ()), ([], ()), ("x", ("x",)), (["x", "\n\n"], ("x", "\n\n"))])
def test_stop_is_one_text_or_several(stop: object, stops: tuple[str, ...]) -> None:
    assert _parse(prompt="hi", stop=stop).options.stop == stops


def test_the_prompt_is_scored_only_when_it_is_echoed() -> None:
    assert _parse(prompt="hi", logprobs=0).options.prompt_logprobs is None
    assert _parse(prompt="hi", echo=True).options.prompt_logprobs is None
    assert _parse(prompt="hi", echo=True, logprobs=0).options.prompt_logprobs == 0
    assert _parse(prompt="hi", echo=True, max_tokens=0).max_tokens == 0


def test_null_is_the_default() -> None:
    fields = (
        "model",
        "max_tokens",
        "temperature",
        "seed",
        "stream",
        "stream_options",
        "stop",
        "logprobs",
        "n",
        "suffix",
    )
    assert _parse(prompt="hi", **dict.fromkeys(fields)) == _parse(prompt="hi")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", True),
        ("max_tokens", "5"),
        ("max_tokens", 5.0),
        ("max_tokens", 0),
        ("max_tokens", -1),
        ("max_tokens", 10**30),
        ("temperature", "0"),
        ("temperature", True),
        ("temperature", -0.1),
        ("temperature", 2.1),
        ("seed", 1.5),
        ("seed", 2**64),
        ("stream", 1),
        ("stream", "true"),
        ("ignore_eos", 0),
        ("return_token_ids", "yes"),
        ("model", 3),
        ("prompt", 5),
        ("prompt", None),
        ("prompt", {}),
        ("prompt", True),
        ("prompt", [1, True]),
        ("prompt", [1.0]),
        ("prompt", ["a", 1]),
        ("prompt", ["a", [1]]),
        ("prompt", [[1], "a"]),
        ("prompt", [[1], [True]]),
        ("prompt", [1, "a"]),
        ("top_p", -0.1),
        ("top_p", 1.1),
        ("top_p", "1"),
        ("stop", 5),
        ("stop", [1]),
        ("stop", ["a", ""]),
        ("stop", ["a"] * (MAX_STOPS + 1)),
        ("stop", "a" * 2000),
        ("logprobs", -1),
        ("logprobs", 21),
        ("logprobs", True),
        ("logprobs", 1.5),
        ("echo", 1),
        ("user", 5),
        ("n", 0),
        ("n", True),
        ("n", 129),
        ("stream_options", []),
    ],
)
def test_wrong_types_and_ranges_name_the_field(field: str, value: object) -> None:
    refused = _refusal(**{"prompt": "hi", field: value})
    assert (refused.status, refused.param) == (400, field)
    assert field in str(refused)


@pytest.mark.parametrize(
    ("field", "off", "on"),
    [
        ("best_of", 1, 3),
        ("frequency_penalty", 0, 0.5),
        ("presence_penalty", 0.0, -1),
        ("logit_bias", {}, {"5": 1}),
        ("suffix", "", "x"),
    ],
)
def test_what_is_not_implemented_may_be_off_and_nothing_else(field: str, off: object, on: object) -> None:
    assert _parse(**{"prompt": "hi", field: off}) == _parse(prompt="hi")
    refused = _refusal(**{"prompt": "hi", field: on})
    assert (refused.param, refused.code) == (field, "unsupported_parameter")


def test_true_is_not_one_when_a_field_is_off() -> None:
    assert _refusal(prompt="hi", best_of=True).param == "best_of"


def test_unknown_fields_are_refused() -> None:
    assert _refusal(prompt="hi", top_k=3).param == "top_k"
    assert _refusal(prompt="hi", stream=True, stream_options={"fast": True}).param == "stream_options"
    assert _refusal(prompt="hi", stream_options={"include_usage": True}).param == "stream_options"
    assert _refusal(max_tokens=3).param == "prompt"


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'"x"', b"null", b"\xff\xfe", b'{"prompt": "\xff"}', b"{1:2}"])
def test_what_is_no_json_object_is_a_400(body: bytes) -> None:
    with pytest.raises(RequestError) as refused:
        parse_completion(body)
    assert refused.value.status == 400


def test_long_lists_and_empty_prompts_are_refused() -> None:
    generation.check_num_choices(5, 1, 5)
    with pytest.raises(RequestError, match="at most 4") as refused:
        generation.check_num_choices(5, 1, 4)
    assert refused.value.param == "prompt"
    generation.check_num_choices(2, 3, 6)
    with pytest.raises(RequestError, match="6 choices; at most 5") as refused:
        generation.check_num_choices(2, 3, 5)
    assert refused.value.param == "n"
    assert "empty" in str(_refused_ids([]))


def test_scored_prompts_are_bounded_by_what_one_message_holds() -> None:
    asked = _parse(prompt="a", echo=True, logprobs=5).options
    generation.check_prompt_logprobs(asked, 100_000)
    generation.check_prompt_logprobs(_parse(prompt="a", echo=True).options, 10**9)
    with pytest.raises(RequestError, match="up to 142987 prompt tokens") as refused:
        generation.check_prompt_logprobs(asked, 142_988)
    assert refused.value.param == "logprobs"


@pytest.mark.parametrize("ids", [[5, -1], [10], [0, 1, 2**40]])
def test_ids_outside_the_vocabulary_are_refused_with_their_position(ids: list[int]) -> None:
    refused = _refused_ids(ids)
    assert refused.param == "prompt"
    assert f"position {len(ids) - 1}" in str(refused)


def _refused_ids(ids: list[int]) -> RequestError:
    with pytest.raises(RequestError) as refused:
        generation.check_token_ids(ids, 10)
    return refused.value


def test_length_counts_prompt_and_answer() -> None:
    generation.check_length(90, 10, 100)
    with pytest.raises(RequestError) as refused:
        generation.check_length(90, 11, 100)
    assert (refused.value.code, refused.value.param) == ("context_length_exceeded", "max_tokens")
    with pytest.raises(RequestError) as refused:
        generation.check_length(100, 1, 100)
    assert refused.value.param == "prompt"


def test_models_are_known_by_name_or_not_at_all() -> None:
    generation.check_model(None, ("m",))
    generation.check_model("/path/m", ("m", "/path/m"))
    with pytest.raises(RequestError) as refused:
        generation.check_model("x", ("m",))
    assert (refused.value.status, refused.value.code) == (404, "model_not_found")
