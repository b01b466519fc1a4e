"""Which GPUs this machine has, and in which order each worker of a deployment sees them. Does without torch."""

import ctypes
import os
from collections.abc import Mapping, Sequence

VARIABLE = "CUDA_VISIBLE_DEVICES"


def visible_gpus(environment: Mapping[str, str] = os.environ) -> tuple[str, ...]:
    """As CUDA_VISIBLE_DEVICES names them, else by number; none without NVIDIA's driver."""
    if (named := environment.get(VARIABLE)) is not None:
        return tuple(name.strip() for name in named.split(",") if name.strip())
    count = ctypes.c_int(0)
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return ()
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        return ()
    return tuple(str(number) for number in range(count.value))


def orders(gpus: Sequence[str], ranks: Sequence[int]) -> list[tuple[str, ...]]:
    """For workers with so many ranks each, all GPUs, beginning with the worker's own: rank r takes the r-th.

    It sees the others, too, because peer access is asked for by GPUs that a process sees. Workers take turns where
    there are fewer GPUs than ranks.
    """
    begins = [sum(ranks[:number]) % max(1, len(gpus)) for number in range(len(ranks))]
    return [(*gpus[begin:], *gpus[:begin]) for begin in begins]
