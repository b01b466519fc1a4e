"""Memory that is there for the arena: the machine's, or what a container's limit leaves."""

from pathlib import Path

import msgspec
import pytest

from pdkv.daemons.gpu_sizing import activation_bytes, gathered_bytes
from pdkv.daemons.sizing import GpuRoom, choose_num_pages, memory_available_bytes
from pdkv.errors import CapacityError
from pdkv.m3.config import load_config
from pdkv.memory.row import RowLayout
from pdkv.verify.m3_shapes import write_config
from pdkv.verify.pair import worker_settings
from tests.layouts import make_layout

MIB = 1 << 20


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """64 GiB are available."""
    _write(tmp_path / "proc/meminfo", "MemTotal: 134217728 kB\nMemAvailable: 67108864 kB\n")
    return tmp_path


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def _group(folder: Path, limit: str, used: int, cache: int) -> None:
    _write(folder / "memory.max", f"{limit}\n")
    _write(folder / "memory.current", f"{used}\n")
    _write(folder / "memory.stat", f"anon 5\ninactive_file {cache}\n")


def test_a_machine_without_limits_offers_what_it_has(machine: Path) -> None:
    assert memory_available_bytes(machine) == 64 << 30
    _write(machine / "proc/self/cgroup", "0::/\n")
    assert memory_available_bytes(machine) == 64 << 30


def test_a_container_offers_what_its_limit_leaves(machine: Path) -> None:
    _write(machine / "proc/self/cgroup", "0::/\n")
    _group(machine / "sys/fs/cgroup", str(2048 * MIB), 600 * MIB, 100 * MIB)
    assert memory_available_bytes(machine) == (2048 - 600 + 100) * MIB
    _group(machine / "sys/fs/cgroup", "max", 600 * MIB, 100 * MIB)
    assert memory_available_bytes(machine) == 64 << 30


def test_the_tightest_of_nested_groups_counts(machine: Path) -> None:
    _write(machine / "proc/self/cgroup", "0::/pods/one\n")
    _group(machine / "sys/fs/cgroup/pods/one", "max", 10 * MIB, 0)
    _group(machine / "sys/fs/cgroup/pods", str(512 * MIB), 12 * MIB, 0)
    assert memory_available_bytes(machine) == 500 * MIB


def test_version_one_of_control_groups_counts_too(machine: Path) -> None:
    _write(machine / "proc/self/cgroup", "5:devices:/x\n4:memory:/kubepods/of-the-host\n0::/\n")
    group = machine / "sys/fs/cgroup/memory"
    _write(group / "memory.limit_in_bytes", f"{512 * MIB}\n")
    _write(group / "memory.usage_in_bytes", f"{600 * MIB}\n")
    _write(group / "memory.stat", f"total_inactive_file {80 * MIB}\n")
    assert memory_available_bytes(machine) == 0
    _write(group / "memory.usage_in_bytes", f"{500 * MIB}\n")
    assert memory_available_bytes(machine) == 92 * MIB


def test_this_machine_can_be_read() -> None:
    assert memory_available_bytes() > 0


def test_a_gpu_gives_what_it_has_room_for_or_says_what_it_lacks() -> None:
    settings = msgspec.structs.replace(
        worker_settings("decode", Path("m"), 1000, 0, 512), device="cuda", gpu_memory_utilization=0.5
    )
    rows = RowLayout.of(make_layout(num_layers=3, num_dense=1))
    room = GpuRoom(for_pages=100 * rows.pitch + 5, reserve=7, total=2000 * rows.pitch, free=900, utilization=0.5)
    assert choose_num_pages(settings, rows, room) == 100
    crowded = msgspec.structs.replace(room, for_pages=9 * rows.pitch)  # eight blocks, and two pages for the probe
    with pytest.raises(CapacityError, match=f"--gpu-memory-utilization 0.5 .* {rows.pitch:,} bytes too few. Lower"):
        choose_num_pages(settings, rows, crowded)
    assert choose_num_pages(msgspec.structs.replace(settings, num_pages=11), rows, crowded) == 11


def test_chunks_of_the_released_model_fit_their_share_of_a_gpu(tmp_path: Path) -> None:
    write_config(tmp_path, 60, 3)
    config = load_config(tmp_path)
    a_token = activation_bytes(config, 2)
    assert 4 * 3072 * 2 * 2 < a_token < 1 << 20, "four experts' gates and ups at least, and below a megabyte"
    assert gathered_bytes(config, 2) == 4 * 128 * 12
