"""Which sparse layers select blocks themselves, and which reuse what the layers before them selected in the step."""

from collections.abc import Sequence

import msgspec

from pdkv.errors import ModelError
from pdkv.m3.config_fields import Fields

USE, FREQ, PATTERN, OFFSET = "use_index_cache", "index_topk_freq", "index_topk_pattern", "index_skip_topk_offset"

NO_SCHEDULE: dict[str, tuple[object, ...]] = {USE: (False,), FREQ: (0, 1), PATTERN: ("",), OFFSET: (0,)}
"""Fields of a config.json that say which layers select, with the values that let all of them do it."""

_REUSES = "S"
_SELECTS = "FC"
"""Letters of a pattern for a layer that selects: "full" or "compute"."""


class IndexScheduleOverride(msgspec.Struct, frozen=True):
    """A schedule given when serving; the fields are those of config.json, and what is given goes before what it says.

    A frequency (1 too: every layer selects) or a pattern is a whole schedule and switches it on; an offset alone
    changes the config's own.
    """

    topk_freq: int = 0
    """0: not given."""
    topk_pattern: str = ""
    skip_topk_offset: int = 0

    @property
    def given(self) -> bool:
        return bool(self.topk_freq or self.topk_pattern)


def reusing_layers(
    text: Fields, sparse_layers: Sequence[bool], override: IndexScheduleOverride | None = None
) -> tuple[int, ...]:
    """Global ids of the sparse layers that reuse a selection. Raises ``ModelError`` naming a field that is wrong.

    Sparse layers are counted from 0. A pattern's letter S lets a layer reuse, and layers beyond its end select; else,
    with a frequency f and an offset b, layer o reuses where max(o - b, 0) is no multiple of f. The first sparse layer
    must select: there is nothing yet that it could reuse.
    """
    given = override or IndexScheduleOverride()
    layers = [layer for layer, sparse in enumerate(sparse_layers) if sparse]
    if given.given:
        pattern, freq, offset = given.topk_pattern, given.topk_freq or 1, given.skip_topk_offset
        named = {name: f"{name}, given when serving," for name in (FREQ, PATTERN, OFFSET)}
    else:
        on = text.flag(USE, False)
        if given.skip_topk_offset and not on:
            raise ModelError(f"{OFFSET}, given when serving, has no effect without {FREQ}")
        pattern, freq = _text(text, PATTERN), text.number(FREQ, int, 1) or 1
        offset = given.skip_topk_offset or text.number(OFFSET, int, 0)
        if not on:
            pattern, freq = "", 1
        named = {name: text.named(name) for name in (FREQ, PATTERN, OFFSET)}
    for name, value in ((FREQ, freq), (OFFSET, offset)):
        if value < 0:
            raise ModelError(f"{named[name]} is {value}, cannot be negative")
    if pattern:
        return _by_pattern(pattern, named[PATTERN], layers)
    return tuple(layer for ordinal, layer in enumerate(layers) if max(ordinal - offset, 0) % freq)


def schedule_in_words(sparse_layers: Sequence[bool], reusing: Sequence[int]) -> str:
    """ "all", or which layers select: two schedules are the same exactly when their words are."""
    if not reusing:
        return "all"
    selecting = [layer for layer, sparse in enumerate(sparse_layers) if sparse and layer not in reusing]
    return f"layers {', '.join(map(str, selecting))} select"


def _by_pattern(pattern: str, named: str, layers: Sequence[int]) -> tuple[int, ...]:
    unknown = sorted(set(pattern) - {*_REUSES, *_SELECTS})
    if unknown:
        raise ModelError(
            f"{named} has {', '.join(map(repr, unknown))}; a letter is S (reuse the selection) or F (select)"
        )
    if len(pattern) > len(layers):
        raise ModelError(f"{named} has {len(pattern)} letters for {len(layers)} sparse layers")
    if pattern[0] == _REUSES:
        raise ModelError(f"{named} begins with S: the first sparse layer has no selection to reuse")
    return tuple(layer for letter, layer in zip(pattern, layers, strict=False) if letter == _REUSES)


def _text(fields: Fields, name: str) -> str:
    value = fields.values.get(name)
    if value is not None and not isinstance(value, str):
        raise ModelError(f"{fields.named(name)} is {value!r}, must be a text of letters, one a sparse layer")
    return value or ""
