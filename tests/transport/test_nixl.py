"""NIXL as a transport: the conformance kit where it is installed, and what it decides around NIXL everywhere."""

import logging
import os
import select

import msgspec
import numpy as np
import pytest

from pdkv.errors import TransportError
from pdkv.schema import LocalMemory, ReadBatch
from pdkv.transport import nixl_agent
from pdkv.transport.base import Completion, ReadId, ReadStatus
from pdkv.transport.conformance import run_check
from pdkv.transport.conformance_rig import Rig
from pdkv.transport.conformance_target import SharedArray, TransportSpec
from pdkv.transport.nixl import NixlOptions, NixlTransport
from pdkv.transport.nixl_agent import NixlMemory, NixlSide, installed_nixl, load_nixl
from pdkv.transport.nixl_path import ChosenPath
from pdkv.transport.nixl_reader import CompletionBox, NixlRead
from pdkv.transport.ucx import UcxTransport, path_of
from tests.transport.forked import ForkedTarget

KIT = "pdkv.transport.conformance"

SPECS = {
    "chosen": TransportSpec(factory=f"{KIT}:make_nixl"),  # cma where the kernel lets it, else TCP
    "tcp": TransportSpec(factory=f"{KIT}:make_nixl", argument="tcp", path="tcp"),
}

IN_SHORT = {
    "chosen": (
        "reads_scattered_odd_spans",
        "refuses_bad_ranges",
        "fails_when_killed_during",
        "closes_during_read",
        "closes_stopped_peer",
        "fails_reads_of_closed_peer",
        "tells_its_path",
    ),
    "tcp": ("closes_during_read", "fails_when_killed_during", "tells_its_path"),
}
"""The checks for which CI has time; tests/long runs all."""

needs_nixl = pytest.mark.skipif(not installed_nixl(), reason=f"NIXL is not installed: {nixl_agent.HOW_TO_INSTALL}")


def kit_cases():
    for label, spec in SPECS.items():
        for name in IN_SHORT[label]:
            yield pytest.param(spec, name, id=f"{label}-{name}")


@needs_nixl
@pytest.mark.parametrize(("spec", "name"), list(kit_cases()))
def test_conforms(spec: TransportSpec, name: str):
    run_check(spec, name, ForkedTarget)


@needs_nixl
def test_a_stopped_peer_of_many_spans_holds_nobody_up():
    with Rig(SPECS["tcp"], ForkedTarget) as rig:
        target = rig.spawn()
        peer = rig.connect(target)
        rig.read_well(peer, target, rig.span(0, 0, 0, 64))
        target.stop()
        many = np.arange(4_000)
        reads = [rig.submit(peer, rig.batch(many * 0, many * 4_096, many * 8_192, many * 0 + 4_096)) for _ in range(3)]
        rig.reader.close_peer(peer)
        assert {completion.status for completion in rig.wait(*reads)} == {ReadStatus.CANCELLED}
        target.kill()


@needs_nixl
def test_stands_beside_our_own_ucx():
    """NIXL brings another UCX into the process; both read the same memory by turns."""
    with Rig(SPECS["tcp"], ForkedTarget) as rig, Rig(TransportSpec(f"{KIT}:make_ucx", "tcp"), ForkedTarget) as ours:
        assert isinstance(ours.reader, UcxTransport)
        pairs = [(each, each.target()) for each in (rig, ours)]
        peers = [each.connect(target) for each, target in pairs]
        for turn in range(3):
            for (each, target), peer in zip(pairs, peers, strict=True):
                each.read_well(peer, target, each.span(0, turn, turn * 1_000_003, 1_000_000))
        assert [each.reader.path(peer) for (each, _), peer in zip(pairs, peers, strict=True)] == ["tcp", "tcp"]
        assert rig.reader.note(peers[0]).startswith("NIXL's UCX: software emulation tcp/")


@needs_nixl
def test_an_idle_peers_death_is_told_at_the_next_read():
    with Rig(SPECS["chosen"], ForkedTarget) as rig:
        target = rig.spawn()
        peer = rig.connect(target)
        rig.read_well(peer, target, rig.span(0, 0, 0, 64))
        target.kill()
        completion = rig.wait(rig.submit(peer, rig.span(0, 0, 0, 64)))[0]
        assert (completion.status, completion.error) == (ReadStatus.FAILED, "the peer's process has ended")


@needs_nixl
def test_refuses_what_it_cannot_carry():
    transport = NixlTransport()
    try:
        memory = SharedArray(4_096).memory
        for strange, reason in (
            (LocalMemory(memory.address, 4_096, device="emulated"), "not of emulated"),
            (LocalMemory(memory.address, 0), "cannot register 0 bytes"),
        ):
            with pytest.raises(TransportError, match=reason):
                transport.register(strange)
        transport.register(memory)
        with pytest.raises(TransportError, match="memory of one place"):
            transport.register(LocalMemory(memory.address, 4_096, device="cuda:0"))
        address = transport.address()
        far = msgspec.structs.replace(address.memories[0], address=1 << 63)
        outside = msgspec.structs.replace(address, memories=(far,))
        with pytest.raises(TransportError, match="outside its address space"):
            transport.connect(outside)
        peer, two = transport.connect(address), np.zeros(2, np.int64)
        torn = ReadBatch(two, two, two, np.zeros(1, np.int64))
        with pytest.raises(TransportError, match="a batch that is none"):
            transport.submit(peer, torn)
    finally:
        transport.close()
    with pytest.raises(TransportError, match="is closed"):
        transport.address()


@needs_nixl
def test_metadata_of_nobody_is_a_failed_read(monkeypatch: pytest.MonkeyPatch):
    """What is sealed by us and not NIXL's shows where it is read: NIXL alone can tell."""
    monkeypatch.setattr(nixl_agent.NixlAgent, "metadata", lambda self: b"nobody's")
    one, two = NixlTransport(), NixlTransport()
    try:
        arrays = [SharedArray(4_096), SharedArray(4_096)]
        one.register(arrays[0].memory)
        two.register(arrays[1].memory)
        peer = two.connect(one.address())
        zero = np.zeros(1, np.int64)
        read = two.submit(peer, ReadBatch(zero, zero, zero + arrays[1].memory.address, zero + 8))
        assert select.select([two.fileno()], [], [], 30)[0]
        (completion,) = two.poll()
        assert (completion.read, completion.status) == (read, ReadStatus.FAILED)
        assert "cannot take the peer's metadata" in completion.error
    finally:
        two.close()
        one.close()


@needs_nixl
def test_loading_nixl_leaves_the_process_as_it_was():
    load_nixl.cache_clear()
    before = dict(os.environ)
    package = load_nixl()
    assert dict(os.environ) == before
    assert logging.raiseExceptions
    assert package.version.split(".")[0].isdigit()
    assert package.name == installed_nixl()


def test_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(nixl_agent.importlib.util, "find_spec", lambda name: None)
    load_nixl.cache_clear()
    try:
        with pytest.raises(TransportError, match=r"NIXL is not installed: pip install 'pdkv\[nixl\]'"):
            NixlTransport()
    finally:
        load_nixl.cache_clear()


@pytest.mark.parametrize(
    ("builds", "driver", "chosen"),
    [
        ((), 13_000, ""),
        (("nixl_cu12",), 13_000, "nixl-cu12"),
        (("nixl_cu13",), 12_080, "nixl-cu13"),
        (("nixl_cu12", "nixl_cu13"), 12_080, "nixl-cu12"),
        (("nixl_cu12", "nixl_cu13"), 13_000, "nixl-cu13"),
    ],
)
def test_build_for_the_driver(monkeypatch: pytest.MonkeyPatch, builds, driver: int, chosen: str):
    monkeypatch.setattr(nixl_agent.importlib.util, "find_spec", lambda name: name if name in builds else None)
    monkeypatch.setattr(nixl_agent, "_driver_cuda", lambda: driver)
    assert installed_nixl() == chosen


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (NixlOptions(tls="tcp,self"), "set UCX_TLS in the environment"),
        (NixlOptions(tls="posix"), "can hang for good when a peer dies"),
        (NixlOptions(window_spans=-1), "must not be negative"),
        (NixlOptions(window_bytes=-1), "must not be negative"),
    ],
)
def test_refuses_bad_options(options: NixlOptions, reason: str):
    with pytest.raises(TransportError, match=reason):
        NixlTransport(options)


@needs_nixl
@pytest.mark.parametrize(("inherited", "warned"), [("rc,sm,self", True), ("tcp", False), ("^mm", False)])
def test_warns_of_an_environment_that_jams(monkeypatch, caplog, inherited: str, warned: bool):
    monkeypatch.setenv("UCX_TLS", inherited)
    NixlTransport().close()
    assert (f"UCX_TLS={inherited} is inherited" in caplog.text) == warned


def test_where_memory_lies():
    assert NixlMemory.of(LocalMemory(64, 64)) == NixlMemory(on_gpu=False, device=0)
    assert NixlMemory.of(LocalMemory(64, 64, device="cuda:3")) == NixlMemory(on_gpu=True, device=3)
    for device in ("cuda", "rocm:0", "cuda:one"):
        with pytest.raises(TransportError, match=f"not of {device}"):
            NixlMemory.of(LocalMemory(64, 64, device=device))


def test_a_read_goes_in_parts():
    lengths = np.array([3, 3, 10, 1, 1, 1])
    side = NixlSide(on_gpu=False, table=np.zeros((6, 3), np.int64))
    read = NixlRead(ReadId(1), side, side, np.cumsum(lengths))
    parts = []
    while not read.is_posted:
        part = read.next_part(2, 6)
        read.posted = part.stop
        parts.append((part.start, part.stop))
    assert parts == [(0, 2), (2, 3), (3, 5), (5, 6)], "two spans, or six bytes, or one span that is longer"


def test_box_is_readable_while_it_holds_something():
    box = CompletionBox()
    try:

        def readable() -> bool:
            return bool(select.select([box.fileno], [], [], 0)[0])

        box.put()
        assert not readable()
        first, second = (Completion(ReadId(number), ReadStatus.OK) for number in (1, 2))
        box.put(first)
        box.put(second)
        assert readable()
        assert box.take() == [first, second]
        assert not readable()
        assert box.take() == []
    finally:
        box.close()


def choice(*lanes: str) -> str:
    """A file of UCX's."""
    label = "\\n".join(lanes)
    return f'digraph {{\n\tnode0 [label="{label}" shape=box style=rounded]\n\tnode1 [label="not this one"];\n}}\n'


def test_path_is_what_ucx_wrote_down(tmp_path):
    chosen = ChosenPath()
    folder = chosen.settings["PROTO_INFO_DIR"]
    files = {
        "me_intra_node_cfg_1_get_multi_into_host_memory_from_host_0_inf.dot": choice("zero-copy", "tcp/lo"),
        "me_inter_node_cfg_2_get_multi_into_host_memory_from_host_0_0.dot": choice("software emulation", "tcp/eth0"),
        "me_inter_node_cfg_2_get_multi_into_host_memory_from_host_1_8220.dot": choice("copy-out", "rc_mlx5/mlx5_0:1"),
        "me_inter_node_cfg_2_get_multi_into_host_memory_from_host_8221_inf.dot": choice(
            "zero-copy", "rc_mlx5/mlx5_0:1"
        ),
        "me_inter_node_cfg_3_put_from_host_memory_to_host_1_inf.dot": choice("zero-copy", "tcp/eth0"),
    }
    for name, text in files.items():
        with open(os.path.join(folder, name), "w") as file:
            file.write(text)
    words = chosen.read()
    assert words == "zero-copy rc_mlx5/mlx5_0:1; copy-out rc_mlx5/mlx5_0:1"
    assert path_of(words) == "rdma"
    chosen.close()
    chosen.close()
    assert not os.path.exists(folder)
    assert chosen.read() == "", "nothing written is nothing known"


def test_what_cannot_be_read_is_not_known():
    """Somebody clears away old temporary files: reads go on."""
    chosen = ChosenPath()
    os.rmdir(chosen.settings["PROTO_INFO_DIR"])
    assert (chosen.read(), path_of(chosen.read())) == ("", "unknown")
    chosen.close()


def test_path_is_unknown_where_nothing_can_be_written(monkeypatch: pytest.MonkeyPatch):
    def full(**_: object):
        raise OSError("no space left")

    monkeypatch.setattr("pdkv.transport.nixl_path.tempfile.TemporaryDirectory", full)
    chosen = ChosenPath()
    assert (chosen.settings, path_of(chosen.read())) == ({}, "unknown")
    chosen.close()
