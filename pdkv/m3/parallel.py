"""The ranks of one worker: what they compute together, whether they are processes, threads, or only one."""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Protocol, TypeVar, cast

import torch
from torch import Tensor, distributed
from torch._C._distributed_c10d import Store, TCPStore  # torch.distributed has them too, but not for mypy

from pdkv.errors import ConfigError, RankLostError

LOOPBACK = "127.0.0.1"

_Result = TypeVar("_Result")


class Group(Protocol):
    """Ranks 0 to ``size`` - 1, each with its share of one model.

    Its methods are *collective*: every rank calls them in the same order with tensors of the same shape and dtype, and
    each waits for all. They raise ``RankLostError`` when another rank does not answer; the group is of no use then.
    """

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def sum(self, x: Tensor) -> Tensor:
        """The sum of all ranks' x, bit for bit the same on every rank. x is given up: it may be overwritten."""
        ...

    def gather_columns(self, x: Tensor) -> Tensor | None:
        """All ranks' x, joined along the last dimension in the order of ranks, on rank 0; ``None`` on the others."""
        ...


class _Solo:
    """One rank alone: nothing to wait for."""

    rank = 0
    size = 1

    def sum(self, x: Tensor) -> Tensor:
        return x

    def gather_columns(self, x: Tensor) -> Tensor | None:
        return x


SOLO: Group = _Solo()
"""The group of an undivided model."""


class _Backend(Protocol):
    """What gloo and NCCL have in common; torch's type stubs leave it out."""

    def allreduce(self, tensors: list[Tensor]) -> distributed.Work: ...

    def gather(
        self, outputs: list[list[Tensor]], inputs: list[Tensor], options: distributed.GatherOptions
    ) -> distributed.Work: ...

    def abort(self) -> None: ...


class DistributedGroup:
    """Ranks are processes; gloo joins them on CPUs, NCCL on NVIDIA GPUs. One thread of each process uses it.

    It is no default group of torch: nothing global is touched, and a process may be in several. Over NCCL a collective
    is only queued on the current stream: there a lost rank shows later, where the stream is waited for.
    """

    def __init__(self, backend: _Backend, rank: int, size: int) -> None:
        self._backend: _Backend | None = backend
        self.rank = rank
        self.size = size

    def sum(self, x: Tensor) -> Tensor:
        x = x.contiguous()
        with _losses(f"rank {self.rank} of {self.size} lost another rank in a sum"):
            self._open().allreduce([x]).wait()
        return x

    def gather_columns(self, x: Tensor) -> Tensor | None:
        x = x.contiguous()
        outputs = [[torch.empty_like(x) for _ in range(self.size)]] if self.rank == 0 else []
        options = distributed.GatherOptions()
        options.rootRank = 0
        with _losses(f"rank {self.rank} of {self.size} lost another rank while logits were gathered"):
            self._open().gather(outputs, [x], options).wait()
        return torch.cat(outputs[0], dim=-1) if outputs else None

    def close(self) -> None:
        """Leave the group: whoever still waits for this rank gets an error. Idempotent."""
        if self._backend is not None:
            self._backend.abort()
        self._backend = None  # with the last reference its sockets are closed

    def _open(self) -> _Backend:
        if self._backend is None:
            raise RankLostError(f"rank {self.rank} of {self.size} has left its group")
        return self._backend


def open_store(host: str = LOOPBACK, port: int = 0, timeout_s: float = 60.0) -> TCPStore:
    """Where the ranks of one group find each other, served by this process as long as the store lives.

    Its ``port`` is a free one where 0 is asked for.
    """
    with _losses(f"cannot serve a store for ranks on {host}:{port}"):
        return TCPStore(host, port, None, True, timedelta(seconds=timeout_s), wait_for_workers=False)


def find_store(host: str, port: int, timeout_s: float = 60.0) -> TCPStore:
    """The store that another process opened."""
    with _losses(f"found no store for ranks on {host}:{port} in {timeout_s:g} s"):
        return TCPStore(host, port, None, False, timedelta(seconds=timeout_s), wait_for_workers=False)


def join_group(
    store: Store,
    rank: int,
    size: int,
    device: str = "cpu",
    *,
    host: str = LOOPBACK,
    timeout_s: float = 60.0,
) -> DistributedGroup:
    """Become one rank of a group; returns when all have come. Collective: every rank calls it.

    One store serves one group. ``host`` is this machine's address that the other ranks reach (gloo; NCCL finds its
    own way). ``timeout_s`` bounds the wait for all ranks, and later each collective. Raises ``RankLostError`` when a
    rank does not come in time.
    """
    if not 0 <= rank < size:
        raise ConfigError(f"rank {rank} is not below the size {size} of its group")
    kind = torch.device(device).type
    timeout = timedelta(seconds=timeout_s)
    with _losses(f"not all of {size} ranks came in {timeout_s:g} s (this is rank {rank})"):
        if kind == "cuda" and not distributed.is_nccl_available():
            raise ConfigError("this build of torch has no NCCL to join ranks on GPUs; install one with CUDA")
        if kind == "cuda":
            backend = _nccl(store, rank, size, timeout)
        elif kind == "cpu":
            backend = _gloo(store, rank, size, host, timeout)
        else:
            raise ConfigError(f"ranks on {kind} cannot be joined; cpu (gloo) and cuda (NCCL) can")
        group = DistributedGroup(backend, rank, size)
        group.sum(torch.zeros(1, device=device))  # NCCL connects with the first collective
    return group


def _gloo(store: Store, rank: int, size: int, host: str, timeout: timedelta) -> _Backend:
    """Bound to one address by its options: the variable GLOO_SOCKET_IFNAME and the host name's address play no part."""
    kind: Any = distributed.ProcessGroupGloo  # its options are missing from the stubs
    options = kind._Options()
    options._devices = [distributed.ProcessGroupGloo.create_device(hostname=host)]
    options._timeout = timeout
    options._threads = 1
    return cast("_Backend", kind(store, rank, size, options))


def _nccl(store: Store, rank: int, size: int, timeout: timedelta) -> _Backend:
    options = distributed.ProcessGroupNCCL.Options()
    options._timeout = timeout
    return cast("_Backend", distributed.ProcessGroupNCCL(store, rank, size, options))


@contextmanager
def _losses(what: str) -> Iterator[None]:
    """The one place where what torch.distributed raises becomes ours."""
    try:
        yield
    except RuntimeError as error:  # DistError is one too
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise RankLostError(f"{what}: {reason}") from error


class ThreadGroup:
    """Ranks are threads of one process. Sums are taken in the order of ranks, so they never depend on timing.

    Each thread uses its own; the slots behind are shared and guarded by a barrier.
    """

    def __init__(self, rank: int, slots: "_Slots") -> None:
        self._slots = slots
        self.rank = rank
        self.size = len(slots.held)

    def sum(self, x: Tensor) -> Tensor:
        def total(held: Sequence[Tensor]) -> Tensor:
            out = held[0].clone()
            for other in held[1:]:
                out += other
            return out

        return self._together(x, total)

    def gather_columns(self, x: Tensor) -> Tensor | None:
        return self._together(x, lambda held: torch.cat(tuple(held), dim=-1) if self.rank == 0 else None)

    def abort(self) -> None:
        """Every rank that waits, or will, gets a ``RankLostError``."""
        self._slots.barrier.abort()

    def _together(self, x: Tensor, compute: Callable[[Sequence[Tensor]], _Result]) -> _Result:
        """All put their x, all compute from all, and none goes on before all have."""
        self._slots.held[self.rank] = x
        self._wait()
        shapes = {(tuple(held.shape), held.dtype) for held in self._slots.tensors()}
        assert len(shapes) == 1, f"ranks called different collectives: {shapes}"
        result = compute(self._slots.tensors())
        self._wait()
        return result

    def _wait(self) -> None:
        try:
            self._slots.barrier.wait()
        except threading.BrokenBarrierError as error:
            raise RankLostError(
                f"rank {self.rank} of {self.size} lost another rank: it failed or never came"
            ) from error


class _Slots:
    """What the threads of one group hold out to each other. Each writes its own slot between two waits."""

    def __init__(self, size: int, timeout_s: float) -> None:
        self.held: list[Tensor | None] = [None] * size
        self.barrier = threading.Barrier(size, timeout=timeout_s)

    def tensors(self) -> list[Tensor]:
        return cast("list[Tensor]", self.held)


def thread_groups(size: int, timeout_s: float = 60.0) -> tuple[ThreadGroup, ...]:
    """The groups of ``size`` ranks that will run as threads, in the order of ranks."""
    slots = _Slots(size, timeout_s)
    return tuple(ThreadGroup(rank, slots) for rank in range(size))


def run_ranks(size: int, work: Callable[[Group], _Result], timeout_s: float = 60.0) -> list[_Result]:
    """Run ``work`` on every rank of a new group, each in a thread of its own; results in the order of ranks.

    When a rank fails, the others are stopped at their next collective, and its error is raised here once all have
    ended. ``timeout_s`` bounds each wait for the other ranks.
    """
    results: dict[int, _Result] = {}
    failures: list[BaseException] = []

    def run(group: ThreadGroup) -> None:
        try:
            results[group.rank] = work(group)
        except BaseException as error:  # noqa: BLE001  raised again in the caller's thread
            failures.append(error)
            group.abort()

    threads = [
        threading.Thread(target=run, args=(group,), name=f"rank-{group.rank}")
        for group in thread_groups(size, timeout_s)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise next((error for error in failures if not isinstance(error, RankLostError)), failures[0])
    return [results[rank] for rank in range(size)]
