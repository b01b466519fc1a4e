"""NIXL over its UCX backend, as engines use it: descriptor lists prepared once, transfers made of indices into them."""

import time
from typing import Any

import numpy as np

from pdkv.bench.mover import READER, Memory, MoveError, Mover, Role, SpanTable, Timing

_PATIENCE_S = 300.0


class NixlMover(Mover):
    needs_tools = True

    def __init__(self, role: Role, memory: Memory) -> None:
        super().__init__(role, memory)
        from nixl_cu12 import nixl_agent, nixl_agent_config  # noqa: PLC0415

        self._agent: Any = nixl_agent(f"bench-{role.side}", nixl_agent_config(backends=["UCX"]))
        self._registered = self._agent.register_memory([(memory.address, memory.bytes.size, 0, "")], "DRAM")
        self._initiates = (role.side == READER) == (role.operation == "read")
        self._peer = ""
        self._peer_base = 0
        self._sides: tuple[Any, Any] | None = None
        self._all = np.empty(0, np.int32)

    def address(self) -> bytes:
        metadata: bytes = self._agent.get_agent_metadata()
        return self.memory.address.to_bytes(8, "little") + metadata

    def meet(self, address: bytes) -> None:
        self._peer_base = int.from_bytes(address[:8], "little")
        if self._initiates:
            named = self._agent.add_remote_agent(address[8:])
            self._peer = named.decode() if isinstance(named, bytes) else named
            self._agent.make_connection(self._peer)

    def load(self, spans: SpanTable) -> None:
        if not self._initiates:
            return
        remote, local, length = spans
        mine, theirs = (local, remote) if self.role.side == READER else (remote, local)
        self._sides = (
            self._prepare("NIXL_INIT_AGENT", mine + self.memory.address, length),
            self._prepare(self._peer, theirs + self._peer_base, length),
        )
        self._all = np.arange(length.size, dtype=np.int32)

    def _prepare(self, agent: str, addresses: Any, lengths: Any) -> Any:
        table = np.stack([addresses, lengths, np.zeros_like(lengths)], axis=1).astype(np.uint64)
        from_list = self._agent.get_xfer_descs(np.ascontiguousarray(table), "DRAM")
        return self._agent.prep_xfer_dlist("" if agent == "NIXL_INIT_AGENT" else agent, from_list)

    def move(self) -> Timing:
        assert self._sides is not None, "loaded before it moves"
        agent = self._agent
        began = time.perf_counter()
        mine, theirs = self._sides
        handle = agent.make_prepped_xfer(self.role.operation.upper(), mine, self._all, theirs, self._all)
        state = agent.transfer(handle)
        posted = time.perf_counter()
        while state == "PROC":
            state = agent.check_xfer_state(handle)
            if time.perf_counter() - posted > _PATIENCE_S:
                raise MoveError(f"not done in {_PATIENCE_S:.0f} s")
        done = time.perf_counter()
        agent.release_xfer_handle(handle)
        if state != "DONE":
            raise MoveError(f"the transfer ended as {state}")
        return Timing(posted - began, done - posted)

    def close(self) -> None:
        self._sides = None
