"""An overview as tables for people: who serves and how fast, and what of their pages and transfers is amiss."""

from collections.abc import Callable, Iterable
from typing import TextIO

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from pdkv.daemons.overview import Figures, Overview, RouterRow, WorkerRow

_NONE = "-"
_BAD, _DOUBTFUL, _GOOD = "bold red", "yellow", "green"
_STYLES = {
    "ready": _GOOD,
    "closed": _GOOD,
    "draining": _DOUBTFUL,
    "slow": _DOUBTFUL,
    "not ready": _BAD,
    "open": _BAD,
    "unreachable": _BAD,
}
_PLAIN_WIDTH = 10_000
"""Of what is not written to a terminal: so much that no line is cut or broken."""
_NARROW = 100
_SIZES = ("B", "kB", "MB", "GB")
Number = Callable[[Figures], Text]


def console(out: TextIO, *, plain: bool) -> Console:
    """For tables that go to ``out``; ``plain``: without colours and whatever else only a terminal understands."""
    if plain:
        return Console(file=out, force_terminal=False, color_system=None, highlight=False, width=_PLAIN_WIDTH)
    return Console(file=out, highlight=False)


def tables(seen: Overview, width: int = _PLAIN_WIDTH) -> Group:
    """The whole of one look, closer together where fewer than 100 columns are to be had."""
    gap = 1 if width < _NARROW else 2
    workers = (Text(), _serving(seen.workers, gap), Text(), _moving(seen.workers, gap)) if seen.workers else ()
    return Group(Text(_headline(seen)), *workers, *_problems(seen))


def _headline(seen: Overview) -> str:
    over = "rates after the second look" if seen.seconds is None else f"rates over {seen.seconds:.1f} s"
    count = f"{len(seen.workers)} worker{'s' if len(seen.workers) != 1 else ''}"
    if seen.router is None:
        return f"{count}, {over}"
    return f"router {_short(seen.router.url)} {_router_state(seen.router)}, {count}, {over}"


def _router_state(router: RouterRow) -> str:
    if not router.answers:
        return "unreachable"
    return "ready" if router.ready else "not ready"


def _serving(workers: Iterable[WorkerRow], gap: int) -> Table:
    columns: dict[str, Number] = {
        "running": lambda f: _count(f.requests_in_flight),
        "queued": lambda f: _count(f.requests_queued, _DOUBTFUL),
        "tok/s": lambda f: _number(f.tokens_per_s, "{:,.0f}"),
        "TTFT p50": lambda f: _duration(f.first_token_p50_s),
        "p99": lambda f: _duration(f.first_token_p99_s),
    }
    table = _table("worker", "role", "state", "circuit", numbers=columns, gap=gap)
    for row in workers:
        told = (_short(row.url), row.role or _NONE, _state(row.state), _state(row.circuit))
        table.add_row(*told, *(show(row.figures) for show in columns.values()))
    return table


def _moving(workers: Iterable[WorkerRow], gap: int) -> Table:
    columns: dict[str, Number] = {
        "pages": _pages,
        "leases": lambda f: _count(f.leases),
        "oldest": lambda f: _duration(f.oldest_lease_s if f.leases else None),
        "stranded": lambda f: _count(f.pages_stranded, _DOUBTFUL),
        "moved/s": lambda f: _size(f.bytes_per_s),
        "failed": _failures,
        "peers": lambda f: _count(f.peers),
        "silence": lambda f: _duration(f.longest_silence_s if f.peers else None),
    }
    table = _table("worker", numbers=columns, gap=gap)
    for row in workers:
        table.add_row(_short(row.url), *(show(row.figures) for show in columns.values()))
    return table


def _problems(seen: Overview) -> list[Text]:
    """A line each, behind an empty one."""
    rows = [(seen.router.url, seen.router.problem)] if seen.router and seen.router.problem else []
    for row in seen.workers:
        rows += [(row.url, "was started anew; rates are since then")] if row.restarted else []
        rows += [(row.url, row.problem)] if row.problem else []
    return [Text(), *(Text(f"{_short(url)}: {problem}") for url, problem in rows)] if rows else []


def _table(*names: str, numbers: Iterable[str], gap: int) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, gap, 0, 0), header_style="bold")
    for name in names:
        table.add_column(name, no_wrap=True)
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _short(url: str) -> str:
    return url.removeprefix("http://")


def _state(state: str) -> Text:
    return Text(state or _NONE, _STYLES.get(state, ""))


def _number(value: float | None, form: str, style: str = "") -> Text:
    return Text(_NONE) if value is None else Text(form.format(value), style if value else "")


def _count(value: int | None, style: str = "") -> Text:
    """``style``: where it is not 0."""
    return _number(value, "{:,}", style)


def _pages(told: Figures) -> Text:
    return Text(_NONE) if told.pages_total is None else Text(f"{told.pages_used or 0:,}/{told.pages_total:,}")


def _failures(told: Figures) -> Text:
    """Since it was started; what is new since the look before with a plus."""
    new = told.new_transfer_failures
    return Text(f"{told.transfer_failures:,} +{new:,}", _BAD) if new else _count(told.transfer_failures)


def _duration(seconds: float | None) -> Text:
    if seconds is None:
        return Text(_NONE)
    if seconds >= 120:
        return Text(f"{seconds / 60:,.0f} min")
    return Text(f"{seconds:.1f} s" if seconds >= 1 else f"{seconds * 1e3:.0f} ms")


def _size(count: float | None) -> Text:
    """Bytes; ``GB`` are 10^9, as everywhere here."""
    if count is None:
        return Text(_NONE)
    power = 0
    while count >= 1000 and power < len(_SIZES) - 1:
        count, power = count / 1000, power + 1
    return Text(f"{count:,.1f} {_SIZES[power]}" if power else f"{count:,.0f} B")
