"""How many pages a worker's arena gets."""

import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec

from pdkv.daemons.link import WorkerSettings
from pdkv.errors import CapacityError, ConfigError
from pdkv.memory.row import RowLayout

PROBE_PAGES = 2
_SHARE_OF_AVAILABLE = 0.3
"""Of the memory available at start; a worker of each role and their models fit one machine then."""


class GpuRoom(msgspec.Struct, frozen=True):
    """How much of one GPU is there for pages, and how that came about. Bytes."""

    for_pages: int
    reserve: int
    total: int
    free: int
    """Before pages were allocated, weights loaded."""
    utilization: float

    @property
    def told(self) -> str:
        return (
            f"--gpu-memory-utilization {self.utilization:g} of {self.total:,} bytes, {self.free:,} of them free, "
            f"leaves {max(0, self.for_pages):,} for pages beside the weights and a reserve of {self.reserve:,}"
        )


def choose_num_pages(settings: WorkerSettings, layout: RowLayout, room: GpuRoom | None = None) -> int:
    """What ``num_pages`` says. Else, on a GPU, all that it has ``room`` for; on a CPU enough for ``max_batch`` requests
    of ``max_model_len`` within a share of memory.

    Raises ``ConfigError`` when not even one request of ``max_model_len`` fits, ``CapacityError`` when memory lacks.
    """
    one = -(-settings.max_model_len // layout.kv.block_size)
    if settings.num_pages:
        if settings.num_pages < one + PROBE_PAGES:
            raise ConfigError(
                f"--num-pages {settings.num_pages} cannot hold one request of --max-model-len "
                f"{settings.max_model_len}: {one + PROBE_PAGES} pages are needed"
            )
        return settings.num_pages
    if room is not None:
        return _pages_on_gpu(settings, layout, room)
    available = memory_available_bytes()
    page_bytes = layout.pitch * settings.tp_size  # the ranks of a worker share one machine's memory
    affordable = int(available * _SHARE_OF_AVAILABLE) // page_bytes
    if affordable < one + PROBE_PAGES:
        raise CapacityError(
            f"one request of --max-model-len {settings.max_model_len} needs {(one + PROBE_PAGES) * page_bytes:,} "
            f"bytes of pages; {_SHARE_OF_AVAILABLE:.0%} of {available:,} available are not enough. Lower "
            "--max-model-len, or set --num-pages to take more"
        )
    return min(one * settings.max_batch + PROBE_PAGES, affordable)


def _pages_on_gpu(settings: WorkerSettings, layout: RowLayout, room: GpuRoom) -> int:
    needed = (-(-settings.max_model_len // layout.kv.block_size) + PROBE_PAGES) * layout.pitch
    if room.for_pages < needed:
        raise CapacityError(
            f"one request of --max-model-len {settings.max_model_len} needs {needed:,} bytes of pages: {room.told}. "
            f"That is {needed - room.for_pages:,} bytes too few. Lower --max-model-len or --prefill-chunk, raise "
            "--gpu-memory-utilization, or divide the model among more ranks (--tp)"
        )
    return room.for_pages // layout.pitch


def memory_available_bytes(root: Path = Path("/")) -> int:
    """What this process may still take: the machine's MemAvailable, or less where its control group has a limit.

    A container sees the whole machine in /proc/meminfo, and is killed at its own limit. ``root``: where /proc and
    /sys are.
    """
    return min((_of_machine(root), *(_room(*group) for group in _control_groups(root))))


def _of_machine(root: Path) -> int:
    for line in (root / "proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise CapacityError("/proc/meminfo has no MemAvailable; set --num-pages")


def _control_groups(root: Path) -> Iterator[tuple[Path, str]]:
    """The folders of our control group and of all above it, with the version that names its files."""
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        top = root / "sys/fs/cgroup" / controllers
        group = top / path.lstrip("/")  # where a container is shown its host's path, only ``top`` exists, and is ours
        for folder in (group, *group.parents):
            yield folder, "v1" if controllers else "v2"
            if folder == top:
                break


def _room(group: Path, version: str) -> int:
    """Bytes below the group's limit; file pages that the kernel can drop count as free."""
    limit_file, used_file, cache = {
        "v1": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        "v2": ("memory.max", "memory.current", "inactive_file"),
    }[version]
    try:
        limit = (group / limit_file).read_text(encoding="ascii").strip()
        if limit == "max":
            return sys.maxsize
        used = int((group / used_file).read_text(encoding="ascii"))
        stat = dict(line.split() for line in (group / "memory.stat").read_text(encoding="ascii").splitlines())
    except OSError:  # the root of all groups has no such files
        return sys.maxsize
    return max(0, int(limit) - used + int(stat.get(cache, 0)))
