"""``pdkv top`` against real fronts and a router: what each state of a worker looks like, and how the view ends."""

import asyncio
import io
import json
import os
import pty
import signal
import socket
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from pdkv.cli import app
from pdkv.daemons.config import Address
from pdkv.daemons.overview import Figures, Observer, Overview, RouterRow, WorkerRow, reachable
from pdkv.daemons.overview_table import console, tables
from pdkv.daemons.worker_client import WorkerClient
from pdkv.errors import PdkvError
from tests.daemons.conftest import Daemon, Fleet, wait_until
from tests.forkserver import FORKED
from tests.http import HTTP


def pdkv(*args: str) -> Result:
    return CliRunner().invoke(app, args)


@pytest.fixture(scope="module")
def trio(shared_fleet: Fleet, checkpoint: Path) -> tuple[Daemon, Daemon, Daemon]:
    """Prefill, decode, router."""
    prefill, decode = (shared_fleet.worker(role, checkpoint, ready=True) for role in ("prefill", "decode"))
    return prefill, decode, shared_fleet.router([prefill], [decode])


async def looks(*worker_urls: str, router_url: str = "", count: int = 2) -> Overview:
    async with WorkerClient(2.0, 30.0) as client:
        observer = Observer(client, router_url, worker_urls)
        for _ in range(count - 1):
            await observer.look()
        return await observer.look()


def test_a_worker_named_by_any_of_its_addresses_is_one_row(trio: tuple[Daemon, Daemon, Daemon]) -> None:
    prefill, decode, router = trio
    urls = (decode.admin, prefill.url + "/", prefill.admin, router.admin)
    seen = asyncio.run(looks(*urls, router_url=router.url))
    assert [(row.url, row.role) for row in seen.workers] == [
        (prefill.url, "prefill"),
        (decode.url, "decode"),
        (router.admin, "router"),
    ]
    assert {row.admin_url for row in seen.workers} == {prefill.admin, decode.admin, router.admin}
    assert [row.state for row in seen.workers] == ["ready"] * 3
    alone = asyncio.run(looks(decode.admin, count=1))
    assert (alone.router, alone.seconds) == (None, None)
    assert alone.workers[0].figures.bytes_per_s is None, "there is no look before"
    assert asyncio.run(looks(decode.admin)).workers[0].figures.bytes_per_s == 0


def test_draining_dead_and_foreign_ones_are_rows_that_say_so(
    fleet: Fleet, checkpoint: Path, trio: tuple[Daemon, Daemon, Daemon]
) -> None:
    draining, dead = (fleet.worker("prefill", checkpoint, ready=True) for _ in range(2))
    router = fleet.router([draining, dead], [trio[1]])
    HTTP.post(draining.admin + "/drain")
    dead.kill()
    wait_until(lambda: [w["ready"] for w in HTTP.get(router.url + "/health").json()["workers"]] == [False, False, True])
    seen = asyncio.run(looks(f"{router.url}/v1", router_url=router.url))
    assert [(row.state, row.circuit) for row in seen.workers] == [
        ("draining", "open"),
        ("unreachable", "open"),
        ("ready", "closed"),
        ("unreachable", ""),
    ]
    assert seen.router
    assert not seen.router.ready
    assert "no prefill worker is ready" in seen.router.problem
    assert seen.workers[0].problem == "draining"
    assert "cannot connect" in seen.workers[1].problem
    assert "is no admin port of a pdkv daemon" in seen.workers[3].problem


def test_what_does_not_answer_in_time_is_said_to() -> None:
    async def look(url: str) -> Overview:
        async with WorkerClient(2.0, 30.0) as client:
            return await Observer(client, url, [url], patience_s=0.05).look()

    with socket.create_server(("127.0.0.1", 0)) as silent:
        seen = asyncio.run(look(f"http://127.0.0.1:{silent.getsockname()[1]}"))
    assert seen.router
    assert {seen.router.problem, seen.workers[0].problem} == {"does not answer within 0.05 s"}
    assert not seen.answered


def test_the_command_fails_only_where_nothing_answers(trio: tuple[Daemon, Daemon, Daemon]) -> None:
    told = pdkv("top", "--router", "http://127.0.0.1:9", "--worker", trio[0].url, "--once", "--interval", "0.1")
    assert told.exit_code == 0, told.stderr
    assert told.stdout.startswith("router 127.0.0.1:9 unreachable, 1 worker, ")
    told = pdkv("top", "--worker", "http://127.0.0.1:9", "--once", "--json")
    assert told.exit_code == 1
    assert json.loads(told.stdout)["workers"][0]["state"] == "unreachable"
    assert "nothing answers (http://127.0.0.1:9: cannot connect" in told.stderr
    told = pdkv("top", "--router", trio[0].url, "--once")
    assert told.exit_code == 1
    assert f"what answers at {trio[0].url}/health is no router" in told.stderr
    assert pdkv("top", "--worker", "127.0.0.1:9").exit_code == 2


def _top_on_terminal(terminal: str, url: str) -> None:
    """In the child."""
    with open(terminal, "r+b", buffering=0) as both:
        for number in (0, 1, 2):
            os.dup2(both.fileno(), number)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in a shell's background
    os.environ["TERM"] = "xterm"
    os.environ.pop("NO_COLOR", None)
    sys.argv = ["pdkv", "top", "--worker", url, "--interval", "0.1"]
    from pdkv.__main__ import main

    main()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_view_and_leaves_the_terminal_as_it_was(
    trio: tuple[Daemon, Daemon, Daemon], number: signal.Signals, code: int
) -> None:
    ours, theirs = pty.openpty()
    process = FORKED.Process(target=_top_on_terminal, args=(os.ttyname(theirs), trio[1].url))
    process.start()
    shown = b""
    while b"rates over" not in shown:
        shown += os.read(ours, 4096)
    assert process.pid
    os.kill(process.pid, number)
    os.close(theirs)
    try:
        while more := os.read(ours, 4096):
            shown += more
    except OSError:  # how Linux tells that nobody has the terminal open any more
        pass
    process.join(30)
    os.close(ours)
    assert process.exitcode == code
    assert b"Traceback" not in shown
    for enter, leave in ((b"\x1b[?1049h", b"\x1b[?1049l"), (b"\x1b[?25l", b"\x1b[?25h")):
        assert shown.index(enter) < shown.rindex(leave)


def test_an_admin_port_is_reached_where_its_worker_is() -> None:
    worker = "http://10.0.0.3:8100"
    assert reachable(Address("0.0.0.0:8190"), worker) == "http://10.0.0.3:8190"
    assert reachable(Address("[::]:8190"), "http://[fd00::3]:8100") == "http://[fd00::3]:8190"
    assert reachable(Address("10.1.0.3:8190"), worker) == "http://10.1.0.3:8190"
    assert reachable(Address("127.0.0.1:8190"), "http://localhost:8100") == "http://127.0.0.1:8190"
    with pytest.raises(PdkvError, match="for its own machine only; see --admin-listen"):
        reachable(Address("127.0.0.1:8190"), worker)


PREFILL_ROW = WorkerRow(
    url="http://10.10.10.10:8100",
    role="prefill",
    state="ready",
    circuit="slow",
    problem=f"the router says: slow{', and so on' * 30}",
    restarted=True,
    figures=Figures(
        requests_in_flight=3,
        requests_queued=1,
        tokens_per_s=81234.5,
        pages_used=1200,
        pages_total=4096,
        leases=2,
        oldest_lease_s=1200.0,
        pages_stranded=7,
        peers=1,
        longest_silence_s=21.04,
    ),
)
DECODE_ROW = WorkerRow(
    url="http://10.10.10.11:8200",
    role="decode",
    state="ready",
    circuit="closed",
    figures=Figures(
        requests_in_flight=2,
        requests_queued=0,
        tokens_per_s=950.2,
        first_token_p50_s=0.0375,
        first_token_p99_s=1.25,
        pages_used=0,
        pages_total=4096,
        pages_stranded=0,
        bytes_per_s=12.34e9,
        transfer_failures=4,
        new_transfer_failures=1,
        peers=0,
        longest_silence_s=0.0,
    ),
)
VIEW = Overview(
    seconds=2.0,
    router=RouterRow(url="http://127.0.0.1:8000", answers=True, ready=True),
    workers=[PREFILL_ROW, DECODE_ROW],
)


def test_numbers_are_written_for_people() -> None:
    out = io.StringIO()
    console(out, plain=True).print(tables(VIEW))
    assert [" ".join(line.split()) for line in out.getvalue().splitlines()] == [
        "router 127.0.0.1:8000 ready, 2 workers, rates over 2.0 s",
        "",
        "worker role state circuit running queued tok/s TTFT p50 p99",
        "10.10.10.10:8100 prefill ready slow 3 1 81,234 - -",
        "10.10.10.11:8200 decode ready closed 2 0 950 38 ms 1.2 s",
        "",
        "worker pages leases oldest stranded moved/s failed peers silence",
        "10.10.10.10:8100 1,200/4,096 2 20 min 7 - - 1 21.0 s",
        "10.10.10.11:8200 0/4,096 - - 0 12.3 GB 4 +1 0 -",
        "",
        "10.10.10.10:8100: was started anew; rates are since then",
        f"10.10.10.10:8100: {PREFILL_ROW.problem}",
    ]


def test_the_tables_fit_80_columns() -> None:
    for width in (80, 100):
        out = io.StringIO()
        console(out, plain=True).print(tables(VIEW, width))
        table = out.getvalue().splitlines()[2:10]
        assert max(len(line.rstrip()) for line in table) <= width
