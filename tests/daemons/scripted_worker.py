"""A real worker front above the scripted engine: ``python -m tests.daemons.scripted_worker ROLE MODEL HOST:PORT``."""

import asyncio
import sys

from pdkv.daemons.config import DecodeConfig, PrefillConfig, load
from pdkv.daemons.front import run_worker
from pdkv.daemons.logs import configure_logging


def main() -> int:
    role, model, listen = sys.argv[1:]
    configure_logging("info", role)
    schema = PrefillConfig if role == "prefill" else DecodeConfig
    config = load(schema, {"model": model, "listen": listen, "max_model_len": 512})
    return asyncio.run(run_worker(config, "tests.daemons.scripted_engine"))


if __name__ == "__main__":
    sys.exit(main())
