"""Memory of a GPU that other processes can map: plain allocations of the vendor's runtime, seen as torch tensors.

Torch's own allocator hands out pieces of larger blocks, and some of its blocks cannot be exported to another process at
all. An arena is one allocation of its own instead.
"""

import ctypes
from functools import cache

import torch

from pdkv.errors import CapacityError, ConfigError


class _Allocation:
    """One allocation, freed when nothing refers to it: torch's view of it keeps this object."""

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        self._runtime = _runtime()
        address = ctypes.c_void_p()
        with torch.cuda.device(device):
            code = self._runtime.malloc(ctypes.byref(address), ctypes.c_size_t(num_bytes))
            self._address = address.value or 0
            if code or not self._address:
                self._runtime.last_error()  # taken, so that torch does not find it at its next launch
                free, total = torch.cuda.mem_get_info(device)
                raise CapacityError(
                    f"cannot allocate {num_bytes:,} bytes on {device}: {free:,} of {total:,} are free, which is "
                    f"{max(0, num_bytes - free):,} too few; use fewer pages (--num-pages, --gpu-memory-utilization)"
                )
            code = self._runtime.memset(address, 0, ctypes.c_size_t(num_bytes))
            torch.cuda.synchronize(device)
        self.__cuda_array_interface__ = {
            "shape": (num_bytes,),
            "typestr": "|u1",
            "data": (self._address, False),
            "strides": None,
            "version": 3,
        }
        if code:
            raise CapacityError(f"cannot zero {num_bytes:,} bytes on {device}: error {code}")

    def __del__(self) -> None:
        if getattr(self, "_address", 0):
            self._runtime.free(ctypes.c_void_p(self._address))


class _Runtime:
    """The few calls that are needed of libcudart or of HIP's runtime, which has the same ones under its own prefix."""

    def __init__(self, library: ctypes.CDLL, prefix: str) -> None:
        self.malloc = getattr(library, f"{prefix}Malloc")
        self.memset = getattr(library, f"{prefix}Memset")
        self.free = getattr(library, f"{prefix}Free")
        self.last_error = getattr(library, f"{prefix}GetLastError")


@cache
def _runtime() -> _Runtime:
    """The library that torch itself has loaded: a second runtime would do, but nobody ships one."""
    names = (
        ["libamdhip64.so"] if torch.version.hip else [f"libcudart.so.{(torch.version.cuda or '').partition('.')[0]}"]
    )
    prefix = "hip" if torch.version.hip else "cuda"
    for name in [*names, "libcudart.so"]:
        try:
            return _Runtime(ctypes.CDLL(name), prefix)
        except OSError:
            continue
    raise ConfigError(
        f"cannot load {names[0]}, the runtime of torch {torch.__version__}; is torch installed with CUDA?"
    )


def allocate_on(device: torch.device, num_bytes: int) -> torch.Tensor:  # [num_bytes] uint8
    """Zeroed memory of one GPU, an allocation of its own, so that its handle opens in other processes.

    Freed with the last view of the returned tensor. Raises ``CapacityError`` that says by how much it does not fit.
    """
    return torch.as_tensor(_Allocation(num_bytes, device), device=device)
