"""pdkv's own transports as contestants, exactly as workers use them."""

import select
import time

import msgspec
import numpy as np

from pdkv.bench.memories import Memory
from pdkv.bench.mover import READER, MoveError, Mover, Role, SpanTable, Timing
from pdkv.schema import LocalMemory, ReadBatch, TransportAddress
from pdkv.transport.base import PeerId, ReadStatus, Transport
from pdkv.transport.shm import ShmTransport
from pdkv.transport.sockets import SocketOptions, SocketTransport
from pdkv.transport.ucx import UcxOptions, UcxTransport

_PATIENCE_S = 300.0


class PdkvMover(Mover):
    """What ``--transport auto`` takes for the path."""

    def __init__(self, role: Role, memory: Memory) -> None:
        super().__init__(role, memory)
        self._transport = self._make()
        self._transport.register(LocalMemory(memory.address, memory.num_bytes, memory.device, memory.fd))
        self._peer = PeerId(-1)
        self._batch: ReadBatch | None = None

    def _make(self) -> Transport:
        if self.role.path == "cuda_ipc":
            from pdkv.transport.nvlink import NvlinkTransport  # noqa: PLC0415  it wants a driver

            return NvlinkTransport()
        if self.role.path == "shm":
            return ShmTransport()
        return SocketTransport(SocketOptions(listen=self.role.host))

    def address(self) -> bytes:
        return msgspec.json.encode(self._transport.address())

    def meet(self, address: bytes) -> None:
        if self.role.side == READER:
            self._peer = self._transport.connect(msgspec.json.decode(address, type=TransportAddress))

    def load(self, spans: SpanTable) -> None:
        remote, local, length = (np.ascontiguousarray(row) for row in spans)
        self._batch = ReadBatch(np.zeros_like(length), remote, local + self.memory.address, length)

    def move(self) -> Timing:
        assert self._batch is not None, "loaded before it moves"
        began = time.perf_counter()
        self._transport.submit(self._peer, self._batch)
        posted = time.perf_counter()
        ended = self._transport.poll()
        while not ended:
            if not select.select([self._transport.fileno()], [], [], _PATIENCE_S)[0]:
                raise MoveError(f"nothing completed in {_PATIENCE_S:.0f} s")
            ended = self._transport.poll()
        done = time.perf_counter()
        if ended[0].status is not ReadStatus.OK:
            raise MoveError(ended[0].error or ended[0].status.value)
        path = self._transport.path(self._peer)
        if path != self.role.path:
            raise MoveError(f"travelled over {path}, not {self.role.path}")
        return Timing(posted - began, done - posted)

    def close(self) -> None:
        self._transport.close()


class UcxMover(PdkvMover):
    """pdkv over UCX, on a path that it usually leaves to others."""

    def _make(self) -> Transport:
        if self.role.path == "cuda_ipc":
            return UcxTransport(UcxOptions(cuda=True))
        return UcxTransport(UcxOptions(tls="posix,self" if self.role.path == "shm" else "tcp"))
