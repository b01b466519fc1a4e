"""Which process a peer is, and whether it still lives: mapped memory does not tell, it outlives its maker."""

import os
import select
from pathlib import Path

import msgspec

from pdkv.errors import TransportError


class ProcessHome(msgspec.Struct, frozen=True, array_like=True):
    """Where a process lives, and which of all that ever bore its number it is."""

    boot_id: str
    """Of the running kernel: equal on one host and on no other."""
    pid: int
    started: int
    """Clock ticks from the kernel's start to the process's: tells it from a later one of the same number."""
    pid_space: int
    """The process namespace that ``pid`` is a number of."""

    @staticmethod
    def of(pid: int) -> "ProcessHome":
        """A process of this namespace. Raises ``ProcessLookupError`` when there is none."""
        return ProcessHome(_boot_id(), pid, _started(pid), namespace("pid"))

    def is_visible_from(self, here: "ProcessHome") -> bool:
        """Whether ``pid`` means the same process to ``here``."""
        return (self.boot_id, self.pid_space) == (here.boot_id, here.pid_space)


class Life:
    """The life of another process, seen through its pidfd. Owned by one thread; ``has_ended`` may be asked from any."""

    def __init__(self, home: ProcessHome) -> None:
        """``fd`` is readable once the process has ended, -1 if it had before. Raises ``TransportError`` when the
        system lets nobody watch it."""
        self.fd = -1
        try:
            self.fd = os.pidfd_open(home.pid)
            if _started(home.pid) != home.started:
                self.close()
        except ProcessLookupError:
            self.close()
        except (OSError, OverflowError) as error:
            self.close()
            raise TransportError(f"the peer's process cannot be watched: {error}") from error

    @property
    def has_ended(self) -> bool:
        if self.fd < 0:
            return True
        poll = select.poll()  # takes descriptors that select cannot
        poll.register(self.fd, select.POLLIN)
        return bool(poll.poll(0))

    def give_away(self) -> int:
        """``fd``, which is the caller's to close from here on; ``has_ended`` is of no use any more."""
        fd, self.fd = self.fd, -1
        return fd

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def namespace(kind: str) -> int:
    """The number of this process's namespace of that kind, such as "pid"."""
    return os.stat(f"/proc/self/ns/{kind}").st_ino  # noqa: PTH116  # follows a link that is no path


def _boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()


def _started(pid: int) -> int:
    """Raises ``ProcessLookupError`` when there is no such process."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        raise ProcessLookupError(pid) from None
    return int(stat.rpartition(")")[2].split()[19])  # the name before may hold anything
