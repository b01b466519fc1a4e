"""What a worker's settings say of its model: which layers select, and how state is stored. No torch here."""

from pathlib import Path

import msgspec

from pdkv.daemons.link import WorkerSettings
from pdkv.m3.config import IndexScheduleOverride, M3Config, kv_layout, load_config
from pdkv.schema import KvLayout


def schedule_of(settings: WorkerSettings) -> IndexScheduleOverride:
    """The schedule given by flags; empty where the checkpoint's own counts."""
    return IndexScheduleOverride(
        topk_freq=settings.index_topk_freq,
        topk_pattern=settings.index_topk_pattern,
        skip_topk_offset=settings.index_skip_topk_offset,
    )


def config_of(settings: WorkerSettings) -> M3Config:
    """The model as this worker serves it: the one whose fingerprint its peers must have, too."""
    config = load_config(Path(settings.model_dir), schedule_of(settings))
    return config if settings.dtype == "auto" else msgspec.structs.replace(config, dtype=settings.dtype)


def layout_of(settings: WorkerSettings, config: M3Config) -> KvLayout:
    """What a token leaves behind in this worker's pages. ``config`` as ``config_of`` gives it."""
    return kv_layout(config, settings.kv_dtype, settings.index_dtype)
