"""Memory that is there for the arena: the machine's, or what a container's limit leaves."""

from pathlib import Path

import pytest

from pdkv.daemons.sizing import memory_available_bytes

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
