"""Renders conversations with a checkpoint's chat template, in the dialect that such templates are written in.

A template is a program that came with the weights, so it runs in a sandbox. P and D render the same conversation each
for itself and must get the same text: a template has no randomness, and its clock is the request's.
"""

import json
import secrets
from datetime import UTC, datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from pdkv.daemons.conversation import Conversation
from pdkv.daemons.tokenizer_config import DEFAULT_TEMPLATE, TOOL_TEMPLATE, TokenizerConfig
from pdkv.errors import RequestError

_HOW_TO_MEND = (
    "put one beside the weights as chat_template.jinja, or into tokenizer_config.json as 'chat_template'; "
    "or send the prompt as text to /v1/completions"
)


class ChatTemplates:
    """A checkpoint's templates, compiled. Safe to share between threads."""

    def __init__(self, config: TokenizerConfig) -> None:
        self._special_tokens = config.special_tokens()
        environment = _environment()
        self._templates = {name: _compile(environment, source) for name, source in config.templates.items()}

    def render(self, conversation: Conversation, at: float) -> str:
        """The prompt as text, special tokens in it by name. ``at``: the request's time, in seconds since 1970.

        Raises RequestError when there is no template, or when it fails or refuses the conversation.
        """
        template = self._choose(conversation)
        mark = secrets.token_hex(16) if conversation.continue_final_message else ""
        moment = datetime.fromtimestamp(at, UTC)
        values: dict[str, Any] = {
            **self._special_tokens,
            **conversation.template_kwargs,
            "messages": conversation.marked(f"{mark} ") if mark else conversation.messages,
            "tools": conversation.tools,
            "documents": conversation.documents,
            "add_generation_prompt": conversation.add_generation_prompt,
            "strftime_now": moment.strftime,
        }
        try:
            text = template.render(values)
        except _RefusedError as exc:
            raise RequestError(f"the chat template refuses this conversation: {exc}", param="messages") from exc
        except Exception as exc:  # noqa: BLE001  a foreign program may raise anything
            told = f"the chat template fails on this conversation: {type(exc).__name__}: {exc}"
            raise RequestError(told, param="messages") from exc
        return _cut(text, mark) if mark else text

    def _choose(self, conversation: Conversation) -> jinja2.Template:
        name = TOOL_TEMPLATE if conversation.tools and TOOL_TEMPLATE in self._templates else DEFAULT_TEMPLATE
        if name not in self._templates:
            others = f" called {DEFAULT_TEMPLATE!r}, only {sorted(self._templates)}" if self._templates else ""
            told = f"this checkpoint has no chat template{others}: {_HOW_TO_MEND}"
            raise RequestError(told, param="messages", code="no_chat_template")
        template = self._templates[name]
        if isinstance(template, jinja2.TemplateSyntaxError):
            told = f"this checkpoint's chat template does not compile (line {template.lineno}: {template.message})"
            raise RequestError(f"{told}; mend it, or {_HOW_TO_MEND}", param="messages", code="no_chat_template")
        return template


class _RefusedError(jinja2.TemplateError):
    """The template itself says no."""


def _compile(environment: jinja2.Environment, source: str) -> jinja2.Template | jinja2.TemplateSyntaxError:
    """A template with an error is no reason not to serve completions: whoever needs it is told."""
    try:
        return environment.from_string(source)
    except jinja2.TemplateSyntaxError as exc:
        return exc


def _environment() -> ImmutableSandboxedEnvironment:
    extensions: list[str | type[Extension]] = [_GenerationBlock, "jinja2.ext.loopcontrols"]
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    environment.filters["tojson"] = _to_json
    del environment.filters["random"]
    del environment.globals["lipsum"]
    environment.globals.update(raise_exception=_raise_exception, dict=_dict, namespace=_PublicNamespace)
    return environment


def _raise_exception(message: str) -> None:
    raise _RefusedError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """jinja's own filter escapes for HTML, which is not what models were trained on."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _dict(*args: Any, **kwargs: Any) -> dict[str, Any]:
    """``dict`` as a function: the class itself would be a way to all other classes."""
    return dict(*args, **kwargs)


class _PublicNamespace(Namespace):
    """A template's variables; names with an underscore in front are Python's own."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # noqa: N805  "self" may be a variable's name
        Namespace.__init__(*args, **kwargs)
        for name in dict(*args[1:], **kwargs):
            _refuse_private(name)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_private(name)
        super().__setitem__(name, value)


def _refuse_private(name: object) -> None:
    if str(name).startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a template may not set {name!r}")


class _GenerationBlock(Extension):
    """``{% generation %}`` tells trainers which text is the model's; to us it is what stands in it."""

    tags = {"generation"}  # noqa: RUF012  the base class's own form

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _cut(text: str, mark: str) -> str:
    """The text up to the mark, which stands behind the final message with a space behind it.

    A template that trims messages has removed that space: it would have trimmed the message's own end as well.
    """
    found = text.rfind(mark)
    if found < 0:
        told = "the chat template does not show the final message, so there is nothing to continue"
        raise RequestError(told, param="continue_final_message")
    before = text[:found]
    return before if text.startswith(f"{mark} ", found) else before.rstrip()
