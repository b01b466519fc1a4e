"""One rank's part of a worker, whichever rank it is: its share of the model, its arena, and what it offers to peers."""

import os
from pathlib import Path

import msgspec
import torch

from pdkv.daemons.link import WorkerSettings
from pdkv.daemons.model_settings import layout_of, schedule_of
from pdkv.errors import ConfigError
from pdkv.m3.config import M3Config
from pdkv.m3.model import M3Model, load_model
from pdkv.m3.parallel import Group
from pdkv.memory.arena import Arena
from pdkv.memory.manifest import build_manifest
from pdkv.memory.probe import ProbePages
from pdkv.memory.row import RowLayout
from pdkv.memory.touch import TouchAhead
from pdkv.schema import Incarnation, KvLayout
from pdkv.transport.base import Transport
from pdkv.wire.messages import RankOffer


class RankShare(msgspec.Struct, frozen=True):
    """A rank's share of the model, and the rows that go with it."""

    model: M3Model
    layout: RowLayout


class ArenaOrder(msgspec.Struct, frozen=True):
    """What rank 0 decides for all ranks once each has loaded its share."""

    num_pages: int
    incarnation: int
    fingerprint: str
    """Of the model; its files are hashed once a worker."""


class RankMemory(msgspec.Struct, frozen=True):
    """A rank's pages, registered. ``offer`` is what peers are told of them."""

    arena: Arena
    probe: ProbePages
    offer: RankOffer
    touching: TouchAhead | None = None

    def stop_touching(self) -> None:
        """Before the process ends."""
        if self.touching is not None:
            self.touching.stop()


def load_share(settings: WorkerSettings, group: Group) -> RankShare:
    """Load what this rank computes with; the worker's threads are shared out among its ranks.

    Raises whatever ``PdkvError`` keeps the model from being served so.
    """
    torch.set_num_threads(threads_per_rank(settings))
    use_device(device_of(settings, group.rank))
    model = load_model(
        Path(settings.model_dir),
        device=device_of(settings, group.rank),
        dtype=settings.dtype,
        schedule=schedule_of(settings),
        group=group,
        expert_parallel=settings.expert_parallel,
        load_format=settings.load_format,
    )
    return RankShare(model, RowLayout.of(cache_layout(settings, model.config), group.rank, group.size))


def cache_layout(settings: WorkerSettings, config: M3Config) -> KvLayout:
    """What a token leaves behind in a worker's pages. ``config``: with ``dtype`` as the worker serves it."""
    return layout_of(settings, config)


def device_of(settings: WorkerSettings, rank: int) -> str:
    """A rank's device: ranks take GPUs in the order in which CUDA_VISIBLE_DEVICES has them."""
    return f"cuda:{rank}" if settings.device == "cuda" else settings.device


def use_device(device: str) -> None:
    """Make the calling thread, which is the one that computes, launch on ``device``.

    Raises ``ConfigError`` for a GPU that is not there.
    """
    if torch.device(device).type != "cuda":
        return
    index, count = torch.device(device).index, torch.cuda.device_count()
    if index >= count:
        raise ConfigError(f"rank {index} needs {device}, and torch sees {count} GPUs; use fewer ranks, or --device cpu")
    torch.cuda.set_device(index)
    # Partial sums of bfloat16 products are added in float32, whatever it costs.
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False


def threads_per_rank(settings: WorkerSettings) -> int:
    """``num_threads`` are the whole worker's; every rank gets the same share, and at least one."""
    return max(1, (settings.num_threads or os.cpu_count() or 1) // settings.tp_size)


def furnish(settings: WorkerSettings, layout: RowLayout, transport: Transport, order: ArenaOrder) -> RankMemory:
    """Allocate a rank's arena and make it readable; a prefill worker's reserved pages get their pattern."""
    arena = Arena.allocate(layout, order.num_pages, device_of(settings, layout.tp_rank))
    transport.register(arena.memory)
    probe = ProbePages(arena)
    touching = None
    if settings.role == "prefill":
        probe.fill(Incarnation(order.incarnation))
    elif arena.memory.device == "cpu":
        touching = TouchAhead(arena)  # what prefill computes it writes itself; what decode reads has to land somewhere
    manifest = build_manifest(arena, layout.kv, order.fingerprint)
    return RankMemory(arena, probe, RankOffer(manifest, transport.address()), touching)
