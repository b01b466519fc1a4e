"""NIXL over its UCX backend, as engines use it: descriptor lists prepared once, transfers made of indices into them."""

import importlib
import importlib.util
import time
from typing import Any

import numpy as np

from pdkv.bench.memories import Memory, make_current
from pdkv.bench.mover import READER, MoveError, Mover, Role, SpanTable, Timing

_PATIENCE_S = 300.0


def _package() -> Any:
    """The build that is installed: they differ in the CUDA that they want, and move host memory alike."""
    for name in ("nixl_cu13", "nixl_cu12"):
        if importlib.util.find_spec(name) is not None:
            return importlib.import_module(name)
    raise MoveError("neither nixl-cu13 nor nixl-cu12 is installed; run `make bench-tools`")


class NixlMover(Mover):
    needs_tools = True

    def __init__(self, role: Role, memory: Memory) -> None:
        super().__init__(role, memory)
        if memory.gpu >= 0:
            make_current(memory.gpu)  # its UCX takes the context that it finds
        self._kind, self._device = ("DRAM", 0) if memory.gpu < 0 else ("VRAM", memory.gpu)
        nixl = _package()
        self._agent: Any = nixl.nixl_agent(f"bench-{role.side}", nixl.nixl_agent_config(backends=["UCX"]))
        registered = [(memory.address, memory.num_bytes, self._device, "")]
        self._registered = self._agent.register_memory(registered, self._kind)
        self._initiates = (role.side == READER) == (role.operation == "read")
        self._peer = ""
        self._peer_base = 0
        self._peer_device = 0
        self._sides: tuple[Any, Any] | None = None
        self._all = np.empty(0, np.int32)

    def address(self) -> bytes:
        metadata: bytes = self._agent.get_agent_metadata()
        return self.memory.address.to_bytes(8, "little") + bytes([self._device]) + metadata

    def meet(self, address: bytes) -> None:
        self._peer_base, self._peer_device = int.from_bytes(address[:8], "little"), address[8]
        if self._initiates:
            named = self._agent.add_remote_agent(address[9:])
            self._peer = named.decode() if isinstance(named, bytes) else named
            self._agent.make_connection(self._peer)

    def load(self, spans: SpanTable) -> None:
        if not self._initiates:
            return
        remote, local, length = spans
        mine, theirs = (local, remote) if self.role.side == READER else (remote, local)
        self._sides = (
            self._prepare("NIXL_INIT_AGENT", mine + self.memory.address, length, self._device),
            self._prepare(self._peer, theirs + self._peer_base, length, self._peer_device),
        )
        self._all = np.arange(length.size, dtype=np.int32)

    def _prepare(self, agent: str, addresses: Any, lengths: Any, device: int) -> Any:
        table = np.stack([addresses, lengths, np.full_like(lengths, device)], axis=1).astype(np.uint64)
        from_list = self._agent.get_xfer_descs(np.ascontiguousarray(table), self._kind)
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
