"""What the server has that forks processes off: modules of commands and far ends, and the bytes that targets hold."""

import gc
import importlib
import pkgutil

import pdkv.cli
import pdkv.daemons.doctor
import pdkv.daemons.engine_process
import pdkv.daemons.front
import pdkv.daemons.router
import pdkv.transport.auto
import pdkv.transport.conformance
import pdkv.verify.suite
import pdkv.verify.undivided  # noqa: F401
from pdkv.transport.conformance_target import MEMORY_SIZES, pattern

for module in pkgutil.iter_modules(pdkv.cli.__path__):
    importlib.import_module(f"pdkv.cli.{module.name}")
for memory in range(len(MEMORY_SIZES)):
    pattern(1, memory)
gc.collect()
gc.freeze()  # or a collection in a child copies all pages of it
