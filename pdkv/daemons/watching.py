"""Looks at a deployment in turn, and shows each look: in place on a terminal, else one behind the other."""

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from typing import NamedTuple

import msgspec
from rich.live import Live

from pdkv.daemons.overview import CONNECT_TIMEOUT_S, Observer, Overview
from pdkv.daemons.overview_table import console, tables
from pdkv.daemons.worker_client import WorkerClient
from pdkv.errors import PdkvError

_KEEP_S = 30.0
_TERMINATED = 128 + signal.SIGTERM
Show = Callable[[Overview], None]


class Watch(NamedTuple):
    router_url: str
    """Empty where none is to be asked."""
    worker_urls: tuple[str, ...]
    interval_s: float
    once: bool
    as_json: bool


def watch(wanted: Watch) -> int:
    """Until a signal, or once. Returns the exit code. Raises ``PdkvError`` where nothing answers from the start."""
    return asyncio.run(_watch(wanted))


async def _watch(wanted: Watch) -> int:
    task = asyncio.current_task()
    assert task, "runs in one"
    loop = asyncio.get_running_loop()
    terminated = asyncio.Event()

    def end() -> None:
        terminated.set()
        task.cancel()  # so that a terminal is left as it was

    loop.add_signal_handler(signal.SIGTERM, end)
    try:
        async with WorkerClient(CONNECT_TIMEOUT_S, _KEEP_S) as client:
            await _look_on(Observer(client, wanted.router_url, wanted.worker_urls), wanted)
    except asyncio.CancelledError:
        if not terminated.is_set():
            raise  # by Ctrl-C
        return _TERMINATED
    finally:
        loop.remove_signal_handler(signal.SIGTERM)
    return 0


async def _look_on(observer: Observer, wanted: Watch) -> None:
    seen = await observer.look()
    if wanted.once and seen.answered:
        await asyncio.sleep(wanted.interval_s)
        seen = await observer.look()
    if not seen.answered:
        if wanted.as_json:
            _print_json(seen)
        raise PdkvError(f"nothing answers ({seen.silence()}); name the router by --router, or workers by --worker")
    with _shown(wanted) as show:
        show(seen)
        while not wanted.once:
            await asyncio.sleep(wanted.interval_s)
            show(await observer.look())


@contextlib.contextmanager
def _shown(wanted: Watch) -> Iterator[Show]:
    """What shows a look, for as long as the block runs."""
    if wanted.as_json:
        yield _print_json
        return
    terminal = sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    page = console(sys.stdout, plain=not terminal)
    if wanted.once or not terminal:
        yield lambda seen: page.print(tables(seen), "")
        return
    with Live(console=page, screen=True, auto_refresh=False) as live:
        yield lambda seen: live.update(tables(seen, page.width), refresh=True)


def _print_json(seen: Overview) -> None:
    sys.stdout.write(msgspec.json.encode(seen).decode() + "\n")
    sys.stdout.flush()
