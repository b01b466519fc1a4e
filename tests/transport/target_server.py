"""What the server has that forks far ends off: modules, and the bytes that targets hold."""

import pdkv.transport.auto
import pdkv.transport.conformance  # noqa: F401
from pdkv.transport.conformance_target import MEMORY_SIZES, pattern

for memory in range(len(MEMORY_SIZES)):
    pattern(1, memory)
