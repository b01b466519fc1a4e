"""``pdkv prefill``, ``decode``, ``router`` and ``up``: the commands that run until they are told to end."""

import asyncio

from pdkv.cli.flags import role_command
from pdkv.cli.lazy import command_module
from pdkv.daemons.config import DecodeConfig, PrefillConfig, RouterConfig, UpConfig, WorkerConfig
from pdkv.daemons.logs import configure_logging

app = command_module()


def _run_worker(config: WorkerConfig) -> int:
    from pdkv.daemons.front import run_worker  # noqa: PLC0415  the web server is not needed for --help

    configure_logging(config.log_level, "prefill" if isinstance(config, PrefillConfig) else "decode", config.log_format)
    return asyncio.run(run_worker(config))


def _run_router(config: RouterConfig) -> int:
    from pdkv.daemons.router import run_router  # noqa: PLC0415

    configure_logging(config.log_level, "router", config.log_format)
    return asyncio.run(run_router(config))


def _run_up(config: UpConfig) -> int:
    from pdkv.daemons.local import run_up  # noqa: PLC0415

    configure_logging(config.log_level, "up", config.log_format)
    return asyncio.run(run_up(config))


role_command(
    app,
    "prefill",
    PrefillConfig,
    _run_worker,
    "Run a prefill worker: it computes prompts, and decode workers read their state out of its memory.",
    """
Examples:

  pdkv prefill --model ./checkpoint --listen 127.0.0.1:8100
  pdkv prefill --config worker.yaml --max-model-len 16384
""",
)
role_command(
    app,
    "decode",
    DecodeConfig,
    _run_worker,
    "Run a decode worker: it reads a prompt's state from the prefill worker and generates the answer.",
    """
Examples:

  pdkv decode --model ./checkpoint --listen 127.0.0.1:8200
  pdkv decode --model ./checkpoint --require-transport shm
""",
)
role_command(
    app,
    "router",
    RouterConfig,
    _run_router,
    "Run the router: it gives every request to a prefill and a decode worker that fit together.",
    """
Examples:

  pdkv router --prefill http://127.0.0.1:8100 --decode http://127.0.0.1:8200
  pdkv router --prefill http://p0:8100 --prefill http://p1:8100 --decode http://d0:8200 --listen 0.0.0.0:8000
""",
)
role_command(
    app,
    "up",
    UpConfig,
    _run_up,
    "Start prefill workers, decode workers and a router on this machine; Ctrl-C ends them all.",
    """
Examples:

  pdkv up --model ./checkpoint --prefill 1 --decode 1 --port 8000
  pdkv up --model ./checkpoint --prefill 2 --decode 2 --transport ucx --max-model-len 20480
""",
)
