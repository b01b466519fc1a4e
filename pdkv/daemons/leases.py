"""What ``pdkv lease`` asks of a prefill worker's admin port."""

import msgspec

from pdkv.daemons.daemon_client import RefusedError, ask
from pdkv.daemons.lease_desk import LEASES_PATH, RELEASE_PATH, Leases, Release
from pdkv.daemons.link import LeaseStatus
from pdkv.errors import PdkvError

LIST_SCHEMA, RELEASE_SCHEMA = "pdkv.leases/v1", "pdkv.lease-release/v1"
_COLUMNS = ("transfer", "decode worker", "state", "pages", "age", "ends in")


class LeaseList(msgspec.Struct, frozen=True):
    schema: str
    url: str
    leases: list[LeaseStatus]
    """The oldest first."""


class Released(msgspec.Struct, frozen=True):
    schema: str
    url: str
    lease: LeaseStatus
    """As it was."""


def list_leases(url: str) -> LeaseList:
    """Raises ``PdkvError`` where no prefill worker's admin port answers."""
    try:
        found = ask("GET", url, LEASES_PATH, Leases)
    except RefusedError as exc:
        if exc.status == 404:
            told = f"{url} grants no leases; name the admin port of a prefill worker (--admin-listen)"
            raise PdkvError(told) from exc
        raise
    return LeaseList(LIST_SCHEMA, url.rstrip("/"), found.leases)


def release_lease(url: str, transfer: str) -> Released:
    """``transfer``: its id, or as many of its first digits as tell it from the others.

    Raises ``PdkvError`` where that is no lease, or several.
    """
    found = [lease.transfer for lease in list_leases(url).leases if lease.transfer.startswith(transfer.lower())]
    if len(found) != 1:
        what = f"{len(found)} leases begin" if found else "no lease begins"
        raise PdkvError(f"{what} with {transfer!r} at {url}; pdkv lease ls {url} shows them all")
    lease = ask("POST", url, RELEASE_PATH, LeaseStatus, Release(found[0]))
    return Released(RELEASE_SCHEMA, url.rstrip("/"), lease)


def told(found: LeaseList) -> str:
    """For people: a table."""
    if not found.leases:
        return f"{found.url} has granted no lease that is still active"
    rows = [
        (e.transfer, e.peer, e.state, f"{e.num_pages:,}", f"{e.age_s:.1f} s", f"{e.left_s:.1f} s") for e in found.leases
    ]
    widths = [max(map(len, column)) for column in zip(_COLUMNS, *rows, strict=True)]
    padded = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in (_COLUMNS, *rows)]
    return "\n".join("  ".join(row).rstrip() for row in padded)
