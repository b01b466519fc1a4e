"""Request bodies are read strictly, and what is not implemented is refused by name."""

import json

import pytest

from pdkv.daemons import openai_api
from pdkv.daemons.openai_api import ApiError, CompletionRequest, parse_completion
from pdkv.errors import RequestError


def _parse(**fields: object) -> CompletionRequest:
    return parse_completion(json.dumps(fields).encode())


def _refusal(**fields: object) -> RequestError:
    with pytest.raises(RequestError) as refused:
        _parse(**fields)
    return refused.value


def test_defaults_are_openais() -> None:
    assert _parse(prompt="hi") == CompletionRequest(
        prompt="hi", model=None, max_tokens=16, temperature=1.0, seed=None, stream=False
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
        user="somebody",
    )
    assert parsed == CompletionRequest([1, 2], "m", 3, 0.0, -5, True, True, True, True)


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
        ("prompt", ["a", "b"]),
        ("prompt", [[1], [2]]),
        ("prompt", [1, "a"]),
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
        ("n", 1, 2),
        ("best_of", 1, 3),
        ("echo", False, True),
        ("frequency_penalty", 0, 0.5),
        ("presence_penalty", 0.0, -1),
        ("logit_bias", {}, {"5": 1}),
        ("logprobs", None, 0),
        ("stop", [], ["x"]),
        ("suffix", "", "x"),
        ("top_p", 1, 0.9),
    ],
)
def test_what_is_not_implemented_may_be_off_and_nothing_else(field: str, off: object, on: object) -> None:
    assert _parse(**{"prompt": "hi", field: off}) == _parse(prompt="hi")
    refused = _refusal(**{"prompt": "hi", field: on})
    assert (refused.param, refused.code) == (field, "unsupported_parameter")


def test_true_is_not_one_when_a_field_is_off() -> None:
    assert _refusal(prompt="hi", n=True).param == "n"
    assert _refusal(prompt="hi", echo=0).param == "echo"


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


def test_lists_of_prompts_are_refused_as_such() -> None:
    assert "one prompt a request" in str(_refusal(prompt=["a"]))
    assert "one prompt a request" in str(_refusal(prompt=[[1, 2]]))
    assert "empty" in str(_refused_ids([]))


@pytest.mark.parametrize("ids", [[5, -1], [10], [0, 1, 2**40]])
def test_ids_outside_the_vocabulary_are_refused_with_their_position(ids: list[int]) -> None:
    refused = _refused_ids(ids)
    assert refused.param == "prompt"
    assert f"position {len(ids) - 1}" in str(refused)


def _refused_ids(ids: list[int]) -> RequestError:
    with pytest.raises(RequestError) as refused:
        openai_api.check_token_ids(ids, 10)
    return refused.value


def test_length_counts_prompt_and_answer() -> None:
    openai_api.check_length(90, 10, 100)
    with pytest.raises(RequestError) as refused:
        openai_api.check_length(90, 11, 100)
    assert (refused.value.code, refused.value.param) == ("context_length_exceeded", "max_tokens")
    with pytest.raises(RequestError) as refused:
        openai_api.check_length(100, 1, 100)
    assert refused.value.param == "prompt"


def test_models_are_known_by_name_or_not_at_all() -> None:
    openai_api.check_model(_parse(prompt="hi"), ("m",))
    openai_api.check_model(_parse(prompt="hi", model="/path/m"), ("m", "/path/m"))
    with pytest.raises(RequestError) as refused:
        openai_api.check_model(_parse(prompt="hi", model="x"), ("m",))
    assert (refused.value.status, refused.value.code) == (404, "model_not_found")


def test_errors_survive_the_way_through_the_router() -> None:
    error = ApiError.of(429, "full", code="no_capacity", param="p", retry_after_s=2)
    assert error.body.type == "rate_limit_error"
    again = ApiError.decode(429, error.encode(), "2")
    assert (again.status, again.body, again.retry_after_s) == (429, error.body, 2)
    assert ApiError.decode(500, b"oops", None).status == 502
