"""The shm transport beyond the kit: what it refuses to share or to map, how it finds memory, and who may have it."""

import fcntl
import mmap
import os
import socket
import subprocess
import sys

import msgspec
import numpy as np
import pytest

from pdkv.errors import TransportError
from pdkv.schema import LocalMemory, TransportAddress
from pdkv.transport import shm
from pdkv.transport.base import ReadStatus
from pdkv.transport.sealed import seal, unseal
from pdkv.transport.shm import ShmTransport

from .reading import ended, filled, read, span

MAGIC = b"pdkvshm1"


@pytest.fixture
def ends():
    """A target that holds 100,000 sevens, and a reader with room for as many."""
    target, reader = ShmTransport(), ShmTransport()
    source, into = filled(100_000, 7), filled(100_000, 0)
    target.register(source.memory)
    reader.register(into.memory)
    yield target, reader, into
    reader.close()
    target.close()


def changed(address: TransportAddress, **changes) -> TransportAddress:
    """The address with some of its inner fields replaced, well sealed."""
    inner = msgspec.msgpack.decode(unseal(MAGIC, address.address, ""), type=shm._Address)
    inner = msgspec.structs.replace(inner, **changes)
    return msgspec.structs.replace(address, address=seal(MAGIC, msgspec.msgpack.encode(inner)))


def test_reads_what_the_target_writes_later(ends):
    target, reader, into = ends
    peer = reader.connect(target.address())
    assert read(reader, peer, into, 100_000).status is ReadStatus.OK
    assert (into.bytes == 7).all()


def test_another_host_is_refused_at_once(ends):
    target, reader, _ = ends
    with pytest.raises(TransportError, match="another host"):
        reader.connect(changed(target.address(), boot_id="elsewhere"))


def test_a_wrong_token_gets_no_memory(ends):
    target, reader, into = ends
    peer = reader.connect(changed(target.address(), token=bytes(32), pid=0))
    completion = read(reader, peer, into, 100)
    assert completion.status is ReadStatus.FAILED
    assert "cannot be had" in completion.error
    assert not into.bytes.any()


def test_finds_memory_by_proc_where_the_socket_is_out_of_reach(ends):
    """As from another network namespace: abstract sockets end at its border."""
    target, reader, into = ends
    peer = reader.connect(changed(target.address(), name=b"pdkv-nobody"))
    assert read(reader, peer, into, 100_000).status is ReadStatus.OK
    assert (into.bytes == 7).all()


def test_tells_why_memory_is_out_of_reach(ends):
    target, reader, into = ends
    peer = reader.connect(changed(target.address(), name=b"pdkv-nobody", pid_space=1))
    completion = read(reader, peer, into, 100)
    assert completion.status is ReadStatus.FAILED
    assert "refused; by /proc: it is in another process namespace" in completion.error


def test_memory_that_is_not_the_described_one_is_not_mapped(ends):
    target, reader, into = ends
    address = target.address()
    key = msgspec.msgpack.decode(unseal(MAGIC, address.memories[0].key, ""), type=shm._Key)
    other = seal(MAGIC, msgspec.msgpack.encode(msgspec.structs.replace(key, inode=key.inode + 1)))
    memory = msgspec.structs.replace(address.memories[0], key=other)
    peer = reader.connect(msgspec.structs.replace(address, memories=(memory,)))
    assert "is not the memory that it described" in read(reader, peer, into, 100).error


def test_memory_longer_than_its_file_is_not_mapped(ends):
    target, reader, into = ends
    address = target.address()
    memory = msgspec.structs.replace(address.memories[0], length=200_000)
    peer = reader.connect(msgspec.structs.replace(address, memories=(memory,)))
    assert "is shorter than it said" in read(reader, peer, into, 100).error


def test_shared_memory_can_neither_shrink_nor_be_written_by_readers(ends):
    target, _, _ = ends
    source = filled(5_000, 1)
    descriptor = target.register(source.memory)
    fd = msgspec.msgpack.decode(unseal(MAGIC, descriptor.key, ""), type=shm._Key).fd
    with pytest.raises(PermissionError):
        os.ftruncate(source.memory.memfd, 100)
    with pytest.raises(PermissionError):
        mmap.mmap(fd, 4096)
    assert fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY


def test_memory_that_is_no_memfd_is_read_into_and_not_read(ends):
    target, reader, _ = ends
    private = np.zeros(4096, dtype=np.uint8)
    reader.register(LocalMemory(private.ctypes.data, private.size))
    reader.submit(reader.connect(target.address()), span(0, private.ctypes.data, 4096))
    assert ended(reader).status is ReadStatus.OK
    assert (private == 7).all()
    with pytest.raises(TransportError, match="no memfd, and cannot be mapped"):
        target.connect(reader.address())


def test_memory_that_cannot_keep_its_size_is_refused():
    transport = ShmTransport()
    fd = os.memfd_create("pdkv-test")  # not sealable
    os.ftruncate(fd, 4096)
    mapping = mmap.mmap(fd, 4096)
    address = np.frombuffer(mapping, dtype=np.uint8).ctypes.data
    try:
        with pytest.raises(TransportError, match="cannot be shared"):
            transport.register(LocalMemory(address, 4096, memfd=fd))
    finally:
        os.close(fd)
        transport.close()


def test_strangers_are_shown_the_door(ends):
    """Whoever connects without the token gets nothing, and does not keep others out."""
    target, reader, into = ends
    name = msgspec.msgpack.decode(unseal(MAGIC, target.address().address, ""), type=shm._Address).name
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as stranger:
        stranger.connect(b"\0" + name)
        stranger.sendall(bytes(40))
        stranger.settimeout(60)
        assert stranger.recv(1) == b""
    peer = reader.connect(target.address())
    assert read(reader, peer, into, 10).status is ReadStatus.OK


def test_a_forked_child_leaves_the_parents_threads_alone():
    code = """
import os, sys
from pdkv.transport.shm import ShmTransport
transport = ShmTransport()
child = os.fork()
if child == 0:
    transport.close()
    os._exit(7)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
transport.close()
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, timeout=60)
