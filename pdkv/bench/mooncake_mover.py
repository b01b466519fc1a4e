"""Mooncake's transfer engine over its TCP transport; it has no other for host memory without RDMA."""

import time
from typing import Any

from pdkv.bench.memories import Memory
from pdkv.bench.mover import READER, MoveError, Mover, Role, SpanTable, Timing

_MOST_BLOCKS = 1024
"""Of one call: a call with 16,384 returns an error and moves nothing."""


class MooncakeMover(Mover):
    needs_tools = True

    def __init__(self, role: Role, memory: Memory) -> None:
        super().__init__(role, memory)
        from mooncake.engine import TransferEngine  # noqa: PLC0415

        self._engine: Any = TransferEngine()
        if self._engine.initialize(role.host, "P2PHANDSHAKE", "tcp", "") != 0:
            raise MoveError("the engine does not start")
        if self._engine.register_memory(memory.address, memory.num_bytes) != 0:
            raise MoveError("the memory cannot be registered")
        self._initiates = (role.side == READER) == (role.operation == "read")
        self._peer = ""
        self._peer_base = 0
        self._calls: list[tuple[list[int], list[int], list[int]]] = []

    def address(self) -> bytes:
        return self.memory.address.to_bytes(8, "little") + f"{self.role.host}:{self._engine.get_rpc_port()}".encode()

    def meet(self, address: bytes) -> None:
        self._peer_base = int.from_bytes(address[:8], "little")
        self._peer = address[8:].decode()

    def load(self, spans: SpanTable) -> None:
        remote, local, length = spans
        mine, theirs = (local, remote) if self.role.side == READER else (remote, local)
        mine, theirs = mine + self.memory.address, theirs + self._peer_base
        self._calls = [
            tuple(row[i : i + _MOST_BLOCKS].tolist() for row in (mine, theirs, length))
            for i in range(0, length.size, _MOST_BLOCKS)
        ]

    def move(self) -> Timing:
        call = (
            self._engine.batch_transfer_sync_read
            if self.role.operation == "read"
            else self._engine.batch_transfer_sync_write
        )
        began = time.perf_counter()
        for mine, theirs, length in self._calls:
            if (status := call(self._peer, mine, theirs, length)) != 0:
                raise MoveError(f"a call with {len(length)} blocks returned {status}")
        return Timing(0.0, time.perf_counter() - began)

    def close(self) -> None:
        self._calls = []
