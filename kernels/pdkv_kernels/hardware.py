"""What launches depend on, as Triton knows it: the device that it compiles for."""

from dataclasses import dataclass
from functools import cache

import triton


@dataclass(frozen=True)
class Hardware:
    """A kind of device. No kernel asks how wide its warps are."""

    capability: int  # NVIDIA's compute capability times ten; 0 on anybody else's, and in the interpreter
    amd: bool  # whose compiler follows each pointer back to one argument, and fails where it may come from two
    shared_bytes: int  # memory that one program may share among its threads

    @property
    def nvidia(self) -> bool:
        return self.capability > 0

    @property
    def wide_float64(self) -> bool:
        """Whether float64 is half as fast as float32, or faster: NVIDIA's for data centres."""
        return self.capability in {80, 90, 100, 103}


_INTERPRETER = Hardware(0, False, 1 << 40)


@cache
def hardware() -> Hardware:
    """Of the current device when first asked; all devices of a process are taken to be of one kind."""
    if triton.knobs.runtime.interpret:
        return _INTERPRETER
    driver = triton.runtime.driver.active
    target = driver.get_current_target()
    shared = driver.utils.get_device_properties(driver.get_current_device())["max_shared_mem"]
    return Hardware(target.arch if target.backend == "cuda" else 0, target.backend == "hip", shared)
