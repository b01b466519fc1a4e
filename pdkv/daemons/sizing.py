"""How many pages a worker's arena gets."""

from pathlib import Path

from pdkv.daemons.link import WorkerSettings
from pdkv.errors import CapacityError, ConfigError
from pdkv.memory.row import RowLayout

PROBE_PAGES = 2
_SHARE_OF_AVAILABLE = 0.3
"""Of the memory available at start; a worker of each role and their models fit one machine then."""


def choose_num_pages(settings: WorkerSettings, layout: RowLayout) -> int:
    """What ``num_pages`` says, else enough for ``max_batch`` requests of ``max_model_len`` within a share of memory.

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
    available = memory_available_bytes()
    affordable = int(available * _SHARE_OF_AVAILABLE) // layout.pitch
    if affordable < one + PROBE_PAGES:
        raise CapacityError(
            f"one request of --max-model-len {settings.max_model_len} needs {(one + PROBE_PAGES) * layout.pitch:,} "
            f"bytes of pages; {_SHARE_OF_AVAILABLE:.0%} of {available:,} available are not enough. Lower "
            "--max-model-len, or set --num-pages to take more"
        )
    return min(one * settings.max_batch + PROBE_PAGES, affordable)


def memory_available_bytes() -> int:
    """MemAvailable of /proc/meminfo."""
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise CapacityError("/proc/meminfo has no MemAvailable; set --num-pages")
