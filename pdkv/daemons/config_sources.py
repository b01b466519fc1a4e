"""Tells every setting of a role with its effective value and where that came from."""

import os
from collections.abc import Mapping
from pathlib import Path

import msgspec
from pydantic_core import PydanticUndefined

from pdkv.daemons.config import ENV_PREFIX, RoleConfig, config_path, flag_name, flag_of, load, read_yaml
from pdkv.errors import ConfigError

_REDACTED = "(secret)"


class Setting(msgspec.Struct, frozen=True):
    name: str
    """The YAML key."""
    value: msgspec.Raw
    """JSON; null when it is not set at all."""
    source: str
    """"flag", "env", "yaml", "default" or "missing"."""
    where: str
    """The flag, variable or file; empty for a default."""


class Explained(msgspec.Struct, frozen=True):
    """All settings of a role, and what is wrong with them."""

    settings: list[Setting]
    error: ConfigError | None


def explain(schema: type[RoleConfig], flags: Mapping[str, object], config_file: Path | None) -> Explained:
    """Values are the checked ones if all is right, else as they were given. Raises ConfigError only for a YAML file
    that cannot be read."""
    path = config_path(config_file)
    from_file = read_yaml(schema, path) if path is not None else {}
    loaded: RoleConfig | None = None
    error: ConfigError | None = None
    try:
        loaded = load(schema, flags, config_file)
    except ConfigError as exc:
        error = exc
    settings = []
    for field, info in schema.model_fields.items():
        if flag_of(schema, field).hidden:
            continue
        variable = ENV_PREFIX + field.upper()
        value: object
        if field in flags:
            value, source, where = flags[field], "flag", flag_name(schema, field)
        elif variable in os.environ:
            value, source, where = os.environ[variable], "env", variable
        elif field in from_file:
            value, source, where = from_file[field], "yaml", str(path)
        elif info.default is PydanticUndefined:
            value, source, where = None, "missing", ""
        else:
            value, source, where = info.default, "default", ""
        if loaded is not None:
            value = getattr(loaded, field)
        shown = _REDACTED if flag_of(schema, field).secret and value not in (None, "") else value
        settings.append(Setting(field, msgspec.Raw(msgspec.json.encode(shown, enc_hook=str)), source, where))
    return Explained(settings, error)
