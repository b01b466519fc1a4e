"""Chat templates give the text that transformers gives, and nothing that two workers could see differently."""

import json
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest
import tokenizers
from tokenizers import models
from transformers import PreTrainedTokenizerFast

from pdkv.daemons.chat_template import ChatTemplates
from pdkv.daemons.conversation import CONVERSATION, Conversation
from pdkv.daemons.request_fields import read_fields, read_values
from pdkv.daemons.tokenizer_config import TokenizerConfig
from pdkv.errors import ModelError, RequestError

CHATML = """\
{% for message in messages %}
    {%- if loop.first and message.role != 'system' %}
        {{- '<|im_start|>system\\nBe brief.<|im_end|>\\n' }}
    {%- endif %}
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{% endfor %}
{% if add_generation_prompt %}
{{ '<|im_start|>assistant\\n' }}
{%- endif %}
"""
TRIMMING = """\
{{ bos_token }}{% for m in messages %}[{{ m.role | upper }}] {{ m.content | trim }} {{ eos_token }}
{% endfor %}
{% if add_generation_prompt %}[ASSISTANT]{% endif %}"""
TIGHT = """\
    {% for m in messages %}
    {{ m.role }}:{{ m.content | trim }}|
    {% endfor %}
"""
TOOLS = """\
{%- macro say(role, text) -%}
<{{ role }}>{{ text }}</{{ role }}>
{% endmacro -%}
{%- set ns = namespace(turns=0, last=none) %}
{%- if tools %}
{{ say("tools", tools | tojson(indent=2)) }}
{%- for tool in tools %}
{{ tool.function.name }}({{ tool.function.parameters.properties | default({}) | dictsort | map("first") | join(", ") }})
{%- endfor %}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == "developer" %}{% continue %}{% endif %}
    {%- if message.tool_calls %}
        {%- for call in message.tool_calls %}
            {%- generation %}
{{ say("call", {"name": call.function.name, "arguments": call.function.arguments} | tojson) }}
            {%- endgeneration %}
        {%- endfor %}
    {%- else %}
{{ say(message.role, message.content) }}
    {%- endif %}
    {%- set ns.turns = ns.turns + 1 %}
    {%- set ns.last = message.role %}
{%- endfor %}
{{ ns.turns }} turns, last {{ ns.last }}; thinking {{ enable_thinking | default(true) }}
{%- for document in documents or [] %} {{ document.title }}{% endfor %}
{%- if add_generation_prompt %} <assistant>{% endif %}"""
PICKY = """\
{% if messages[0].role != "user" %}{{ raise_exception("begin with the user, not with " + messages[0].role) }}{% endif %}
{{ dict(a=1).a }}{{ messages[-1].content }}"""

TALK = [
    {"role": "user", "content": "  Grüße & <b>n1</b> \n"},
    {"role": "assistant", "content": "n2 "},
    {"role": "user", "content": "and then?", "name": "somebody"},
]
CALLS = [
    {"role": "system", "content": "s"},
    {"role": "developer", "content": "d"},
    {"role": "user", "content": "weather?"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": "1", "type": "function", "function": {"name": "w", "arguments": {"städte": ["Köln"]}}}],
    },
    {"role": "tool", "content": "rain", "tool_call_id": "1"},
]
WEATHER = {"type": "function", "function": {"name": "w", "parameters": {"properties": {"städte": {}, "b": {"x": "<"}}}}}


def config(template: object, **named: object) -> TokenizerConfig:
    values = {"bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": False}, **named}
    templates = {"default": template} if isinstance(template, str) else template
    return TokenizerConfig(values, templates)  # type: ignore[arg-type]


def conversation(**fields: object) -> Conversation:
    """As it is read from a request."""
    return Conversation.of(read_values(read_fields(json.dumps(fields).encode()), CONVERSATION))


def transformers_text(template: str, fields: dict[str, object]) -> str:
    words = tokenizers.Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2}, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>")
    named = {"conversation": fields["messages"], "add_generation_prompt": True, **fields}
    more = named.pop("chat_template_kwargs", {})
    del named["messages"]
    return tokenizer.apply_chat_template(chat_template=template, tokenize=False, **named, **more)  # type: ignore


@pytest.mark.parametrize(
    ("template", "fields"),
    [
        (CHATML, {"messages": TALK}),
        (CHATML, {"messages": TALK, "add_generation_prompt": False}),
        (CHATML, {"messages": [{"role": "system", "content": "x"}, *TALK]}),
        (CHATML, {"messages": TALK, "continue_final_message": True, "add_generation_prompt": False}),
        (CHATML, {"messages": TALK[:1], "continue_final_message": True, "add_generation_prompt": False}),
        (TRIMMING, {"messages": TALK}),
        (TRIMMING, {"messages": TALK[:2], "continue_final_message": True, "add_generation_prompt": False}),
        (TOOLS, {"messages": CALLS}),
        (TOOLS, {"messages": CALLS, "tools": [WEATHER], "chat_template_kwargs": {"enable_thinking": False}}),
        (TOOLS, {"messages": TALK, "documents": [{"title": "t", "text": "x"}]}),
        (TIGHT, {"messages": TALK}),
        (TIGHT, {"messages": TALK[:2], "continue_final_message": True, "add_generation_prompt": False}),
        (PICKY, {"messages": TALK}),
        ("{{ messages | length }}{{ pad_token }}{{ eos_token }}\n", {"messages": TALK}),
    ],
)
def test_the_text_is_that_of_transformers(template: str, fields: dict[str, object]) -> None:
    assert ChatTemplates(config(template)).render(conversation(**fields), 0) == transformers_text(template, fields)


def test_arguments_of_calls_may_come_as_text_as_openai_has_them() -> None:
    as_text = json.loads(json.dumps(CALLS))
    function = as_text[3]["tool_calls"][0]["function"]
    function["arguments"] = json.dumps(function["arguments"])
    templates = ChatTemplates(config(TOOLS))
    assert templates.render(conversation(messages=as_text), 0) == templates.render(conversation(messages=CALLS), 0)


def test_the_clock_is_the_requests_also_inside_a_macro() -> None:
    template = "{% macro day() %}{{ strftime_now('%d %b %Y %H:%M:%S') }}{% endmacro %}{{ day() }}"
    at = datetime(2026, 2, 3, 4, 5, 6, tzinfo=UTC).timestamp()
    assert ChatTemplates(config(template)).render(conversation(messages=TALK), at) == "03 Feb 2026 04:05:06"


def refusal(act: Callable[[], object]) -> RequestError:
    with pytest.raises(RequestError) as refused:
        act()
    assert refused.value.status == 400
    return refused.value


@pytest.mark.parametrize(
    ("template", "told"),
    [
        ("{{ raise_exception('no such thing') }}", "refuses this conversation: no such thing"),
        ("{{ messages[0].content + 1 }}", "fails on this conversation: TypeError"),
        ("{{ messages.nothing.more }}", "fails on this conversation: UndefinedError"),
        ("{{ messages.append(1) }}", "fails on this conversation: SecurityError"),
        ("{{ ''.__class__.__mro__ }}", "fails on this conversation: SecurityError"),
        ("{{ dict.__subclasses__() }}", "fails on this conversation: "),
        ("{{ namespace(__class__=1) }}", "fails on this conversation: SecurityError"),
        ("{% set n = namespace() %}{% set n._x = 1 %}", "fails on this conversation: SecurityError"),
        ("{% for x in range(10 ** 9) %}{% endfor %}", "fails on this conversation: OverflowError"),
        ("\n{% for %}", "does not compile (line 2: "),
        ("{{ messages | random }}", "does not compile (line 1: "),
    ],
)
def test_a_template_that_fails_or_refuses_is_a_400_with_its_words(template: str, told: str) -> None:
    refused = refusal(lambda: ChatTemplates(config(template)).render(conversation(messages=TALK), 0))
    assert told in str(refused)
    assert refused.param == "messages"


def test_the_templates_own_refusal_reaches_the_client() -> None:
    talk = conversation(messages=[{"role": "system", "content": "x"}])
    assert "begin with the user, not with system" in str(refusal(lambda: ChatTemplates(config(PICKY)).render(talk, 0)))


def test_without_a_template_the_error_says_how_to_mend_it() -> None:
    refused = refusal(lambda: ChatTemplates(config({})).render(conversation(messages=TALK), 0))
    assert refused.code == "no_chat_template"
    assert "chat_template.jinja" in str(refused)
    others = refusal(lambda: ChatTemplates(config({"rag": "x"})).render(conversation(messages=TALK), 0))
    assert "['rag']" in str(others)


def test_a_final_message_that_is_not_shown_cannot_be_continued() -> None:
    talk = conversation(messages=TALK, continue_final_message=True)
    refused = refusal(lambda: ChatTemplates(config("nothing")).render(talk, 0))
    assert refused.param == "continue_final_message"


def test_tools_have_a_template_of_their_own_where_there_is_one() -> None:
    templates = ChatTemplates(config({"default": "plain", "tool_use": "{{ tools | length }} tools"}))
    assert templates.render(conversation(messages=TALK), 0) == "plain"
    assert templates.render(conversation(messages=TALK, tools=[]), 0) == "plain"
    assert templates.render(conversation(messages=TALK, tools=[WEATHER]), 0) == "1 tools"


def test_templates_are_found_wherever_checkpoints_keep_them(tmp_path: Path) -> None:
    assert TokenizerConfig.load(tmp_path) == TokenizerConfig()
    named = [{"name": "default", "template": "a"}, {"name": "tool_use", "template": "b"}]
    content = {"chat_template": named, "bos_token": None, "add_bos_token": True, "eos_token": {"content": "</s>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**content, "extra_special_tokens": {"x_token": "<x>"}}))
    loaded = TokenizerConfig.load(tmp_path)
    assert loaded.templates == {"default": "a", "tool_use": "b"}
    assert loaded.special_tokens() == {"eos_token": "</s>", "x_token": "<x>"}
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "c"}))
    assert TokenizerConfig.load(tmp_path).templates["default"] == "c"
    (tmp_path / "chat_template.jinja").write_text("d")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "rag.jinja").write_text("e")
    assert TokenizerConfig.load(tmp_path).templates == {"default": "d", "tool_use": "b", "rag": "e"}


@pytest.mark.parametrize("content", ["{", "[]", '{"chat_template": 5}', '{"chat_template": [{"name": "default"}]}'])
def test_a_broken_tokenizer_config_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer_config.json").write_text(content)
    with pytest.raises(ModelError, match=r"tokenizer_config\.json"):
        TokenizerConfig.load(tmp_path)
