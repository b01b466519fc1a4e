"""A run as a table of text or Markdown, and as bars in SVG."""

from collections.abc import Sequence
from pathlib import Path
from xml.sax.saxutils import escape

import msgspec

from pdkv.bench.lane import CEILING
from pdkv.bench.race import Report, Result
from pdkv.errors import ConfigError

_COLOURS = {"pdkv": "#1f6f8b", CEILING: "#b8b8b8"}
_OTHER = "#d98e04"
_WIDTH, _LABEL, _BAR, _GAP = 760, 190, 18, 6


_HEAD = (
    "path",
    "layout",
    "contestant",
    "GB/s",
    "min-max",
    "of ceiling",
    "ours is",
    "spans",
    "post ms",
    "wire ms",
    "CPU s",
)


def read(file: Path) -> Report:
    """What ``pdkv bench xfer --json`` printed. Raises ``ConfigError`` for a file that is something else."""
    try:
        return msgspec.json.decode(file.read_bytes(), type=Report)
    except (OSError, msgspec.DecodeError) as error:
        raise ConfigError(f"{file} is no report of `pdkv bench xfer --json`: {error}") from error


def title(report: Report) -> str:
    """What was moved, in one line."""
    load = report.workload
    return f"{load.tokens:,} tokens, one rank of {load.tp}, {load.kv_dtype}: GB/s, median and spread"


def table(report: Report) -> str:
    """One line a result: share of the ceiling of the same layout and path's run, and how often ours is as fast."""
    rows = [_HEAD, *_rows(report)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(_HEAD))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([*lines, *_notes(report)])


def markdown(report: Report) -> str:
    """The same for a document."""
    rows = [_HEAD, ("---",) * len(_HEAD), *_rows(report)]
    return "\n".join(["| " + " | ".join(row) + " |" for row in rows] + ["", *(f"- {note}" for note in _notes(report))])


def _rows(report: Report) -> list[tuple[str, ...]]:
    rows = []
    for group in _groups(report.results):
        ceiling, ours = _median(group, CEILING), _median(group, "pdkv")
        rows += [_row(result, ceiling, ours) for result in group]
    return rows


def _notes(report: Report) -> list[str]:
    notes = [f"{r.contestant} over {r.path}, {r.layout}: {r.error}" for r in report.results if r.error]
    notes += [f"left out: {why}" for why in report.left_out]
    notes += [f"from {report.gpus[0]} to {report.gpus[1]}"] if report.gpus else []
    moved = f"{report.num_bytes / 1e6:,.0f} MB a move"
    return [*notes, f"{moved}, {report.cores} cores, load {report.load[0]}-{report.load[1]}"]


def svg(report: Report) -> str:
    """Medians as bars, with a line from the slowest to the fastest move."""
    top = max((result.gbps.max for result in report.results), default=0.0) or 1.0
    scale = (_WIDTH - _LABEL - 70) / top
    parts: list[str] = []
    y = 40
    for group in _groups(report.results):
        parts.append(_text(10, y + 12, f"{_path(group)}, {group[0].layout}, {_ours(group).spans:,} spans", bold=True))
        y += 22
        for result in group:
            parts += _bar(result, y, scale)
            y += _BAR + _GAP
        y += 14
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{y + 10}" '
        f'font-family="sans-serif" font-size="12"><rect width="100%" height="100%" fill="white"/>'
        f"{_text(10, 22, title(report), bold=True)}{''.join(parts)}</svg>\n"
    )


def _bar(result: Result, y: int, scale: float) -> list[str]:
    width = max(1.0, result.gbps.median * scale)
    colour = _COLOURS.get(result.contestant, _OTHER)
    told = f"{result.gbps.median:.1f} GB/s" if result.correct else "failed"
    low, high = (_LABEL + value * scale for value in (result.gbps.min, result.gbps.max))
    middle = y + _BAR / 2
    return [
        _text(20, y + 13, result.contestant + (" (write)" if result.operation == "write" else "")),
        f'<rect x="{_LABEL}" y="{y}" width="{width:.1f}" height="{_BAR}" fill="{colour}"/>',
        f'<path d="M{low:.1f} {middle}H{high:.1f}" stroke="black"/>',
        _text(int(max(high, _LABEL + width)) + 6, y + 13, told),
    ]


def _text(x: int, y: int, text: str, *, bold: bool = False) -> str:
    weight = ' font-weight="bold"' if bold else ""
    return f'<text x="{x}" y="{y}"{weight}>{escape(text)}</text>'


def _groups(results: Sequence[Result]) -> list[list[Result]]:
    """Results of one path and layout together, the ceiling (which has no path) with those it was raced beside."""
    groups: list[list[Result]] = []
    for result in results:
        new = not groups or result.layout != groups[-1][0].layout
        if new or any(other.contestant == result.contestant for other in groups[-1]):
            groups.append([])
        groups[-1].append(result)
    return groups


def _path(group: Sequence[Result]) -> str:
    return next((result.path for result in group if result.contestant != CEILING), "memcpy")


def _ours(group: Sequence[Result]) -> Result:
    return next((result for result in group if result.contestant == "pdkv"), group[0])


def _median(group: Sequence[Result], contestant: str) -> float:
    return next((result.gbps.median for result in group if result.contestant == contestant), 0.0)


def _row(result: Result, ceiling: float, ours: float) -> tuple[str, ...]:
    name = result.contestant + (" (write)" if result.operation == "write" else "")
    if not result.correct:
        return (result.path, result.layout, name, "failed", *[""] * 7)
    speed = result.gbps
    return (
        result.path,
        result.layout,
        name,
        f"{speed.median:.2f}",
        f"{speed.min:.2f}-{speed.max:.2f}",
        f"{speed.median / ceiling:.0%}" if ceiling else "",
        f"{ours / speed.median:.2f} x" if ours and result.contestant != "pdkv" else "",
        f"{result.spans:,}",
        f"{result.post_ms:.2f}",
        f"{result.wire_ms:.1f}",
        f"{result.cpu_s:.2f}",
    )
