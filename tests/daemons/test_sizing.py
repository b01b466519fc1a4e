"""Memory that is there for the arena: the machine's, or what a container's limit leaves."""

from pathlib import Path

import msgspec
import pytest

from pdkv.daemons.gpu_sizing import GpuMemory, activation_bytes, chunk_in, gathered_bytes, room_in
from pdkv.daemons.link import WorkerSettings
from pdkv.daemons.sizing import GpuRoom, choose_num_pages, memory_available_bytes
from pdkv.daemons.worker_settings import worker_settings
from pdkv.errors import CapacityError
from pdkv.m3.config import M3Config, load_config
from pdkv.memory.row import RowLayout
from pdkv.verify.m3_shapes import write_config
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


GIB = 1 << 30
H200, H100 = 141 * GIB, 80 * GIB


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> M3Config:
    folder = tmp_path_factory.mktemp("released")
    write_config(folder, 60, 3)
    return load_config(folder)


def _asks(**changes: object) -> WorkerSettings:
    plain = worker_settings("prefill", Path("m"), 1000, 0, 0)
    return msgspec.structs.replace(plain, device="cuda", gpu_memory_utilization=0.9, **changes)


def test_what_one_token_takes_counts_its_experts(released: M3Config) -> None:
    a_token = activation_bytes(released, 2)
    assert a_token == 4 * (2 * 3072 + 6144) * (2 + 12) + 24 * 6144
    assert gathered_bytes(released, 2) == 4 * 128 * 12


@pytest.mark.parametrize(("total", "chunk"), [(H200, 8192), (H100, 4096), (24 * GIB, 1024), (6 * GIB, 512), (GIB, 512)])
def test_a_chunk_takes_a_small_share_of_a_gpu(released: M3Config, total: int, chunk: int) -> None:
    """The largest that does; the smallest in any case."""
    assert chunk_in(total, _asks(), released, 2) == chunk
    a_token = activation_bytes(released, 2)
    assert chunk == 512 or chunk * a_token <= 0.06 * total < 0.1 * total
    assert chunk == 8192 or 2 * chunk * a_token > 0.06 * total
    assert chunk_in(total, _asks(prefill_chunk=777), released, 2) == 777


def test_pages_get_what_is_left_beside_weights_and_reserve(released: M3Config) -> None:
    weights = 40 * GIB
    room = room_in(GpuMemory(H200, H200 - weights - GIB, weights), _asks(), released, 2)
    logits = _asks().max_batch * released.vocab_size * 2
    assert room.reserve == 2 * GIB + 8192 * activation_bytes(released, 2) + logits
    assert room.for_pages == int(0.9 * H200) - weights - room.reserve
    smaller = room_in(GpuMemory(H200, H200 - weights - GIB, weights), _asks(prefill_chunk=512), released, 2)
    assert smaller.for_pages - room.for_pages == (8192 - 512) * activation_bytes(released, 2)


def test_pages_get_no_more_than_others_have_left(released: M3Config) -> None:
    crowded = GpuMemory(H200, 20 * GIB, 40 * GIB)
    room = room_in(crowded, _asks(), released, 2)
    assert room.for_pages == 20 * GIB - room.reserve
    assert f"{20 * GIB:,} of them free" in room.told
    full = room_in(GpuMemory(H200, GIB, 40 * GIB), _asks(), released, 2)
    assert full.for_pages < 0
    with pytest.raises(CapacityError, match="leaves 0 for pages"):
        choose_num_pages(_asks(), RowLayout.of(make_layout(num_layers=3, num_dense=1)), full)


def test_float32_keeps_room_for_the_longest_request(released: M3Config) -> None:
    exact = msgspec.structs.replace(released, dtype="float32")
    memory = GpuMemory(H200, H200, 0)
    short, long = (room_in(memory, _asks(max_model_len=length), exact, 4) for length in (1000, 101_000))
    assert long.reserve - short.reserve == 100_000 * gathered_bytes(exact, 4)
