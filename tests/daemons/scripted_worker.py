"""A real worker front above the scripted engine: ``... -m tests.daemons.scripted_worker ROLE MODEL HOST:PORT JSON``."""

import asyncio
import json
import sys

from pdkv.daemons.config import DecodeConfig, PrefillConfig, load
from pdkv.daemons.front import run_worker
from pdkv.daemons.logs import configure_logging


def main() -> int:
    role, model, listen, settings = sys.argv[1:]
    configure_logging("info", role)
    schema = PrefillConfig if role == "prefill" else DecodeConfig
    flags = {"model": model, "listen": listen, "admin_listen": "127.0.0.1:0", "max_model_len": 512}
    config = load(schema, {**flags, **json.loads(settings)})
    return asyncio.run(run_worker(config, "tests.daemons.scripted_engine"))


if __name__ == "__main__":
    sys.exit(main())
