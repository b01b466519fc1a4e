"""The settings of an engine process without a front. Those of a worker that serves are made of its configuration, in
``front``."""

import os
from pathlib import Path

from pdkv.daemons.link import WorkerSettings


def worker_settings(
    role: str, model_dir: Path, max_model_len: int, num_pages: int, prefill_chunk: int
) -> WorkerSettings:
    """A worker of one rank on this machine's CPU, for one request at a time, over ``inproc``, without a front: what is
    verified, measured or looked at by itself. Whoever wants more of it replaces fields."""
    return WorkerSettings(
        role=role,
        model_dir=str(model_dir),
        name=f"{role}-{os.getpid()}",
        control_listen="tcp://127.0.0.1:0",
        advertise_host="127.0.0.1",
        num_pages=num_pages,
        max_model_len=max_model_len,
        max_batch=1,
        prefill_chunk=prefill_chunk,
        dtype="auto",
        device="cpu",
        num_threads=0,
        transport="inproc",
        ucx_tls=None,
        ucx_library=None,
        require_transport=None,
        lease_ttl_s=60.0,
        insecure=False,
        log_level="warning",
        prefix_cache=False,  # what is compared must have been computed there and have travelled here
    )
