"""What an operator asks of a running daemon's admin port: is it well, and will it take no more requests?"""

import time
from collections.abc import Callable
from typing import TypeVar

import httpx
import msgspec

from pdkv.daemons.admin import DRAIN_PATH, LIVE_PATH, READY_PATH, DrainState, Verdict
from pdkv.errors import PdkvError

PING_SCHEMA, DRAIN_SCHEMA = "pdkv.ping/v1", "pdkv.drain/v1"
_TIMEOUT_S = 10.0
_POLL_S = 0.2
Answer = TypeVar("Answer")


class Ping(msgspec.Struct, frozen=True):
    schema: str
    url: str
    asked: str
    """``live`` or ``ready``."""
    seconds: float
    verdict: Verdict


class Drained(msgspec.Struct, frozen=True):
    schema: str
    url: str
    seconds: float
    in_flight: int
    """Requests that still ran when the last answer came."""


def ping(url: str, *, ready: bool) -> Ping:
    """Ask for liveness, or readiness. Raises ``PdkvError`` where no daemon's admin port answers at ``url``."""
    began = time.monotonic()
    verdict = _ask("GET", url, READY_PATH if ready else LIVE_PATH, Verdict)
    return Ping(PING_SCHEMA, url.rstrip("/"), "ready" if ready else "live", time.monotonic() - began, verdict)


def told(answer: Ping) -> str:
    """For people: one line, and one for each condition that does not hold."""
    verdict = answer.verdict
    state = answer.asked if verdict.ok else f"not {answer.asked}"
    first = f"{verdict.role} at {answer.url} is {state} ({answer.seconds * 1e3:.0f} ms)"
    return "\n".join([first, *(f"  {c.name}: {c.message}" for c in verdict.conditions if not c.ok)])


def drain(url: str, wait_s: float, tell: Callable[[str], None]) -> Drained:
    """Have the daemon take no more requests; it goes on running. Idempotent.

    Waits up to ``wait_s`` seconds for those that run, and ``tell``s how many are left whenever that changes. Raises
    ``PdkvError`` where no daemon's admin port answers.
    """
    began = time.monotonic()
    left = -1
    while True:
        state = _ask("POST", url, DRAIN_PATH, DrainState)
        passed = time.monotonic() - began
        if state.in_flight and wait_s and state.in_flight != left:
            left = state.in_flight
            tell(f"{left} request{'s' if left > 1 else ''} left after {passed:.1f} s")
        if state.in_flight == 0 or passed >= wait_s:
            return Drained(DRAIN_SCHEMA, url.rstrip("/"), passed, state.in_flight)
        time.sleep(min(_POLL_S, wait_s - passed))


def _ask(method: str, url: str, path: str, kind: type[Answer]) -> Answer:
    try:
        answer = httpx.request(method, url.rstrip("/") + path, timeout=_TIMEOUT_S, trust_env=False)
    except (httpx.HTTPError, httpx.InvalidURL) as exc:
        raise PdkvError(f"no daemon's admin port answers at {url}: {exc}") from exc
    try:
        return msgspec.json.decode(answer.content, type=kind)
    except msgspec.MsgspecError as exc:
        said = f"{method} {path} was answered with {answer.status_code}"
        raise PdkvError(f"what answers at {url} is no admin port ({said}); see --admin-listen") from exc
