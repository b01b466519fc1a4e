"""What ``tokenizer_config.json`` and the files beside it say: special tokens by name, and chat templates."""

import json
from pathlib import Path
from typing import Any

import msgspec

from pdkv.errors import ModelError

_CONFIG = "tokenizer_config.json"
_TEMPLATE = "chat_template"
DEFAULT_TEMPLATE = "default"
TOOL_TEMPLATE = "tool_use"


class TokenizerConfig(msgspec.Struct, frozen=True):
    """Empty for a checkpoint that has no such files."""

    values: dict[str, Any] = {}
    """The file's content, as it stands there."""
    templates: dict[str, str] = {}
    """Sources of chat templates by name; the only one is "default"."""

    @classmethod
    def load(cls, model_dir: Path) -> "TokenizerConfig":
        """Read the files. A template file goes before what the config says. Raises ModelError."""
        values = _read_object(model_dir / _CONFIG)
        templates = _named_templates(values.get(_TEMPLATE), model_dir / _CONFIG)
        in_json = _read_object(model_dir / f"{_TEMPLATE}.json")
        templates |= _named_templates(in_json.get(_TEMPLATE), model_dir / f"{_TEMPLATE}.json")
        for path in sorted((model_dir / "additional_chat_templates").glob("*.jinja")):
            templates[path.stem] = _read(path)
        if (path := model_dir / f"{_TEMPLATE}.jinja").exists():
            templates[DEFAULT_TEMPLATE] = _read(path)
        return cls(values, templates)

    def special_tokens(self) -> dict[str, str]:
        """Every token that the config names, as text: ``bos_token``, ``eos_token`` and what else there is."""
        extra = self.values.get("extra_special_tokens")
        named = {**self.values, **(extra if isinstance(extra, dict) else {})}
        found = {name: _text(value) for name, value in named.items() if name.endswith("_token")}
        return {name: text for name, text in found.items() if text is not None}


def _text(value: Any) -> str | None:
    """A token as text: it stands there as such, or as an object that also says how it is matched."""
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) else None


def _named_templates(value: Any, path: Path) -> dict[str, str]:
    """One template, or a list of named ones."""
    if value is None:
        return {}
    if isinstance(value, str):
        return {DEFAULT_TEMPLATE: value}
    try:
        return {one.name: one.template for one in msgspec.convert(value, list[_NamedTemplate])}
    except msgspec.ValidationError as exc:
        told = f"{path}: 'chat_template' must be text or a list of objects with 'name' and 'template': {exc}"
        raise ModelError(told) from exc


class _NamedTemplate(msgspec.Struct, frozen=True):
    name: str
    template: str


def _read_object(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        value = json.loads(_read(path))
    except ValueError as exc:
        raise ModelError(f"{path} is not JSON: {exc}") from exc
    if not isinstance(value, dict):
        raise ModelError(f"{path} must hold a JSON object")
    return value


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as exc:
        raise ModelError(f"{path} cannot be read as text: {exc}") from exc
