"""Typed access to one JSON object of a config, with errors that name a field as the file does."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from pdkv.errors import ModelError

_Number = TypeVar("_Number", int, float)
_Said = TypeVar("_Said")


@dataclass(frozen=True)
class Fields:
    """The fields of one object; ``null`` counts as absent. ``where`` leads their names in messages."""

    values: Mapping[str, object]
    where: str = ""

    def has(self, name: str) -> bool:
        return self.values.get(name) is not None

    def named(self, name: str) -> str:
        return self.where + name

    def number(self, name: str, kind: type[_Number], default: _Number | None = None) -> _Number:
        """A number, whole where ``kind`` is int. Raises ``ModelError`` when it is absent and has no default."""
        value = self.values.get(name)
        if value is None:
            if default is None:
                raise ModelError(f"{self.named(name)} is missing")
            return default
        if isinstance(value, bool) or not isinstance(value, int | kind):
            raise ModelError(
                f"{self.named(name)} is {value!r}, must be {'a whole number' if kind is int else 'a number'}"
            )
        return kind(value)

    def flag(self, name: str, default: bool) -> bool:
        value = self.values.get(name)
        if value is None:
            return default
        if value not in (0, 1):
            raise ModelError(f"{self.named(name)} is {value!r}, must be true or false")
        return bool(value)

    def flags(self, name: str) -> tuple[bool, ...]:
        """A list of 0 or 1, one a layer."""
        value = self.values.get(name)
        if not isinstance(value, list) or any(item not in (0, 1) for item in value):
            raise ModelError(f"{self.named(name)} is {value!r}, must be a list of 0 or 1, one a layer")
        return tuple(map(bool, value))

    def kinds(self, name: str, kinds: Mapping[str, bool]) -> tuple[bool, ...]:
        """A list of names, one a layer, each standing for a flag."""
        names = self.values.get(name)
        if not isinstance(names, list):
            raise ModelError(f"{self.named(name)} is {names!r}, must be a list with one kind a layer")
        unknown = sorted({str(kind) for kind in names if kind not in kinds})
        if unknown:
            raise ModelError(f"{self.named(name)} has {', '.join(unknown)}; implemented are {', '.join(kinds)}")
        return tuple(kinds[kind] for kind in names)

    def token_ids(self, name: str) -> tuple[int, ...]:
        """One token id, a list of them, or none."""
        value = self.values.get(name)
        ids = [] if value is None else value if isinstance(value, list) else [value]
        if any(isinstance(i, bool) or not isinstance(i, int) for i in ids):
            raise ModelError(f"{self.named(name)} is {value!r}, must be a token id or a list of them")
        return tuple(ids)

    def inner(self, name: str) -> "Fields":
        """A nested object; without fields where it is absent."""
        value = self.values.get(name)
        if value is not None and not isinstance(value, dict):
            raise ModelError(f"{self.named(name)} is {value!r}, must be an object")
        return Fields(value or {}, f"{self.named(name)}.")


def agreed(what: str, said: Mapping[str, _Said], default: _Said | None = None) -> _Said:
    """The one value that several fields give, by their names. Raises ``ModelError`` when two differ or none is given
    and there is no default."""
    values = list(said.values())
    if any(value != values[0] for value in values):
        listed = ", ".join(f"{name} says {value}" for name, value in said.items())
        raise ModelError(f"{what} is ambiguous: {listed}")
    if values:
        return values[0]
    if default is None:
        raise ModelError(f"{what} is missing")
    return default


def read_json_object(path: Path) -> dict[str, Any]:
    """A file that must hold one JSON object. Raises ``FileNotFoundError`` or ``ModelError``."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except FileNotFoundError:
        raise
    except (OSError, msgspec.DecodeError) as error:
        raise ModelError(f"{path} cannot be read as a JSON object: {error}") from error
