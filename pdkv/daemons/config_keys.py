"""What one setting means, in every role that has it: for ``pdkv config explain``."""

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
from pydantic_core import PydanticUndefined

from pdkv.daemons.config import ENV_PREFIX, RoleConfig, flag_name, flag_of
from pdkv.errors import ConfigError

SCHEMA = "pdkv.config-explain/v1"


class Meaning(msgspec.Struct, frozen=True):
    """Of a setting, where it is the same for all of ``roles``."""

    roles: list[str]
    name: str
    """The YAML key."""
    flag: str
    variable: str
    description: str
    values: str
    """In words."""
    default: msgspec.Raw
    """JSON; null where there is none."""
    required: bool
    advanced: bool
    """Its flag is shown by ``--help-all`` only."""


class Explanation(msgspec.Struct, frozen=True):
    schema: str
    key: str
    meanings: list[Meaning]


def explain_key(key: str, roles: Sequence[tuple[str, type[RoleConfig]]]) -> Explanation:
    """``key``: a YAML key, a flag or a ``PDKV_*`` variable. Raises ``ConfigError`` for one that no role has."""
    wanted = key.strip().removeprefix("--").removeprefix(ENV_PREFIX).replace("-", "_").lower()
    found: list[Meaning] = []
    known: set[str] = set()
    for role, schema in roles:
        for field in schema.model_fields:
            names = {field, flag_name(schema, field).removeprefix("--").replace("-", "_")}
            if flag_of(schema, field).hidden:
                continue
            known |= names
            if wanted in names:
                _add(found, _meaning(role, schema, field))
    if not found:
        close = difflib.get_close_matches(wanted, known, n=1, cutoff=0.5)
        raise ConfigError(f"no role has a setting {key!r}" + (f"; did you mean {close[0]}?" if close else ""))
    return Explanation(SCHEMA, key, found)


def told(found: Explanation) -> str:
    """For people."""
    return "\n\n".join(_told(meaning) for meaning in found.meanings)


def _add(found: list[Meaning], new: Meaning) -> None:
    """To the roles for which it is the same, if there are such."""
    for place, other in enumerate(found):
        if msgspec.structs.replace(other, roles=new.roles) == new:
            found[place] = msgspec.structs.replace(other, roles=[*other.roles, *new.roles])
            return
    found.append(new)


def _meaning(role: str, schema: type[RoleConfig], field: str) -> Meaning:
    info, flag = schema.model_fields[field], flag_of(schema, field)
    required = info.default is PydanticUndefined
    return Meaning(
        roles=[role],
        name=field,
        flag=flag_name(schema, field),
        variable=ENV_PREFIX + field.upper(),
        description=info.description or "",
        values=_values(schema.model_json_schema()["properties"][field]),
        default=msgspec.Raw(msgspec.json.encode(None if required else info.default, enc_hook=str)),
        required=required,
        advanced=flag.advanced,
    )


_WORDS = {
    "string": "text",
    "boolean": "true | false",
    "null": "nothing",
    "integer": "a whole number",
    "number": "a number",
}
_BOUNDS = {
    "minimum": "at least",
    "exclusiveMinimum": "more than",
    "maximum": "at most",
    "exclusiveMaximum": "less than",
}


def _values(described: Mapping[str, Any]) -> str:
    """Of a property of a JSON Schema."""
    if "anyOf" in described:
        return " or ".join(_values(each) for each in described["anyOf"])
    if "enum" in described:
        return " | ".join(map(str, described["enum"]))
    if described["type"] == "array":
        return f"a list of {_values(described['items'])}"
    bounds = [f", {word} {described[name]:g}" for name, word in _BOUNDS.items() if name in described]
    return "".join(["a path" if described.get("format") == "path" else _WORDS[described["type"]], *bounds])


def _told(meaning: Meaning) -> str:
    default = "none: it must be set" if meaning.required else bytes(meaning.default).decode()
    rows = {
        "role": ", ".join(meaning.roles),
        "values": meaning.values,
        "default": default,
        "flag": meaning.flag + (" (see --help-all)" if meaning.advanced else ""),
        "variable": meaning.variable,
        "file": f"{meaning.name}:",
    }
    return "\n".join(
        [f"{meaning.name}: {meaning.description}", *(f"  {name:<8}  {text}" for name, text in rows.items())]
    )
