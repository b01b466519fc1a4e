"""Chat requests are read as strictly as completions; what a template must not see never reaches it."""

import json

import pytest

from pdkv.daemons.chat_request import ChatRequest, parse_chat
from pdkv.daemons.conversation import Conversation
from pdkv.daemons.generation import Options
from pdkv.errors import RequestError

USER = {"role": "user", "content": "hi"}
TOOL = {"type": "function", "function": {"name": "f"}}


def parse(**fields: object) -> ChatRequest:
    return parse_chat(json.dumps({"messages": [USER], **fields}).encode())


def refusal(**fields: object) -> RequestError:
    with pytest.raises(RequestError) as refused:
        parse(**fields)
    assert refused.value.status == 400
    return refused.value


def test_defaults_are_openais() -> None:
    assert parse() == ChatRequest(Conversation(messages=[USER]), None, Options())


def test_every_field_is_read() -> None:
    parsed = parse(
        model="m",
        max_completion_tokens=3,
        temperature=0,
        top_p=0.5,
        seed=7,
        stop="x",
        n=2,
        stream=True,
        stream_options={"include_usage": True},
        logprobs=True,
        top_logprobs=4,
        ignore_eos=True,
        return_token_ids=True,
        user="u",
        tools=[TOOL],
        tool_choice="auto",
        parallel_tool_calls=True,
        response_format={"type": "text"},
        documents=[{"title": "t"}],
        chat_template_kwargs={"enable_thinking": False},
        add_generation_prompt=False,
        add_special_tokens=True,
    )
    options = Options(
        model="m",
        temperature=0.0,
        top_p=0.5,
        seed=7,
        stop=("x",),
        n=2,
        logprobs=4,
        stream=True,
        include_usage=True,
        ignore_eos=True,
        return_token_ids=True,
        user="u",
    )
    talk = Conversation(
        messages=[USER],
        tools=[TOOL],
        documents=[{"title": "t"}],
        template_kwargs={"enable_thinking": False},
        add_generation_prompt=False,
        add_special_tokens=True,
    )
    assert parsed == ChatRequest(talk, 3, options)


def test_the_number_of_tokens_has_two_names() -> None:
    assert parse(max_tokens=4).max_tokens == parse(max_completion_tokens=4).max_tokens == 4
    assert parse(max_tokens=4, max_completion_tokens=4).max_tokens == 4
    assert refusal(max_tokens=4, max_completion_tokens=5).param == "max_completion_tokens"


def test_logprobs_are_asked_for_in_two_steps() -> None:
    assert parse(logprobs=False).options.logprobs is None
    assert parse(logprobs=True).options.logprobs == 0
    assert refusal(top_logprobs=2).param == "top_logprobs"
    assert refusal(logprobs=False, top_logprobs=2).param == "top_logprobs"


def test_text_may_come_in_parts() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    (message,) = parse(messages=[{"role": "user", "content": parts, "type": "text"}]).conversation.messages
    assert message == {"role": "user", "content": "a\nb", "type": "text"}


def test_going_on_with_the_last_message_needs_no_beginning_of_another() -> None:
    assert not parse(continue_final_message=True).conversation.add_generation_prompt
    assert refusal(continue_final_message=True, add_generation_prompt=True).param == "continue_final_message"
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": ""}}]}
    assert parse(messages=[call]).conversation.messages[0]["tool_calls"][0]["function"]["arguments"] == {}
    assert refusal(messages=[call], continue_final_message=True).param == "continue_final_message"


@pytest.mark.parametrize(
    ("messages", "told"),
    [
        (5, "must be a list of messages"),
        ([], "is empty"),
        (["hi"], "each an object"),
        ([{"content": "x"}], "messages[0].role"),
        ([USER, {"role": "function", "content": "x"}], "messages[1].role"),
        ([{"role": "user"}], "messages[0].content"),
        ([{"role": "user", "content": None}], "messages[0].content"),
        ([{"role": "assistant", "content": None, "tool_calls": []}], "messages[0].content"),
        ([{"role": "user", "content": 5}], "messages[0].content"),
        ([{"role": "user", "content": ["x"]}], "messages[0].content[0]"),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0].text"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}], "serves text only"),
        ([{"role": "user", "content": [{"type": "input_audio"}]}], "serves text only"),
        ([{"role": "assistant", "tool_calls": 5}], "messages[0].tool_calls"),
        ([{"role": "assistant", "tool_calls": [{}]}], "messages[0].tool_calls[0]"),
        ([{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}], "arguments"),
        ([{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[]"}}]}], "arguments"),
    ],
)
def test_messages_that_are_none_are_named(messages: object, told: str) -> None:
    refused = refusal(messages=messages)
    assert refused.param == "messages"
    assert told in str(refused)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 0),
        ("max_completion_tokens", "3"),
        ("logprobs", 1),
        ("top_logprobs", 21),
        ("n", 0),
        ("stop", [5]),
        ("temperature", 3),
        ("stream_options", {"include_usage": True}),
        ("tools", [{"type": "function"}]),
        ("tools", [{"type": "web_search"}]),
        ("chat_template_kwargs", {"messages": []}),
        ("chat_template_kwargs", []),
        ("add_generation_prompt", 1),
        ("documents", ["x"]),
    ],
)
def test_wrong_types_and_ranges_name_the_field(field: str, value: object) -> None:
    assert refusal(**{field: value}).param == field


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("response_format", {"type": "json_object"}),
        ("response_format", {"type": "json_schema", "json_schema": {}}),
        ("tool_choice", "required"),
        ("tool_choice", {"type": "function", "function": {"name": "f"}}),
        ("functions", [{}]),
        ("presence_penalty", 1),
        ("logit_bias", {"5": 1}),
        ("modalities", ["text", "audio"]),
        ("audio", {"voice": "x"}),
        ("prediction", {"type": "content", "content": "x"}),
        ("reasoning_effort", "low"),
        ("chat_template", "{{ messages }}"),
        ("echo", True),
        ("best_of", 2),
        ("top_k", 3),
    ],
)
def test_what_is_not_honoured_is_refused_by_name(field: str, value: object) -> None:
    refused = refusal(**{field: value})
    assert (refused.param, refused.code) in [(field, "unsupported_parameter"), (field, "unknown_parameter")]


def test_off_is_no_request() -> None:
    off = {"frequency_penalty": 0, "logit_bias": {}, "modalities": ["text"], "store": False, "reasoning_effort": None}
    assert parse(**off) == parse()


def test_a_body_without_messages_says_so() -> None:
    with pytest.raises(RequestError) as refused:
        parse_chat(b'{"prompt": "x"}')
    assert refused.value.param in ("messages", "prompt")
    with pytest.raises(RequestError, match="'messages' is missing"):
        parse_chat(b"{}")
