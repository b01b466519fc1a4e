"""vLLM's own Triton kernels for M3, run unmodified from an unpacked package of vLLM 0.33.

Their modules import a platform probe, a wrapper of triton and a few names from the rest of vLLM, which needs compiled
extensions. Empty packages that point into the given folder, and small modules in place of those imports, let the kernel
files load as they are.
"""

import importlib
import logging
import sys
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import triton
import triton.language as tl

_PACKAGES = [
    "vllm",
    "vllm.utils",
    "vllm.models",
    "vllm.models.minimax_m3",
    "vllm.models.minimax_m3.common",
    "vllm.models.minimax_m3.common.ops",
    "vllm.v1",
    "vllm.v1.attention",
    "vllm.v1.attention.ops",
]


class CacheMode(IntEnum):
    """What vLLM's attention kernels ask of ``KVQuantMode``, by its numbers."""

    NONE = 0
    FP8_PER_TENSOR = 1
    INT8_PER_TOKEN_HEAD = 2
    FP8_PER_TOKEN_HEAD = 3
    INT4_PER_TOKEN_HEAD = 4
    NVFP4 = 5


@dataclass(frozen=True)
class _Platform:
    """What the kernels' launchers ask of vLLM's platform: answers for the CUDA device at hand."""

    capability: tuple[int, int]

    def is_cuda(self) -> bool:
        return True

    def is_device_capability(self, capability: tuple[int, int]) -> bool:
        return self.capability == capability

    def is_device_capability_family(self, family: int) -> bool:
        return self.capability[0] == family // 10

    def is_arch_support_pdl(self) -> bool:
        return self.capability >= (9, 0)

    def fp8_dtype(self) -> torch.dtype:
        return torch.float8_e4m3fn


def load(folder: Path) -> None:
    """Let the functions below find their modules; folder is ``vllm/`` or what holds it."""
    root = folder / "vllm" if (folder / "vllm").is_dir() else folder
    if not (root / "models" / "minimax_m3" / "common" / "ops" / "index_topk.py").is_file():
        raise SystemExit(f"bench: {folder} holds no vllm/models/minimax_m3: unpack the wheel of vllm 0.33 there")
    for name in _PACKAGES:
        package = ModuleType(name)
        package.__path__ = [str(root.joinpath(*name.split(".")[1:]))]
        sys.modules[name] = package
    platforms = ModuleType("vllm.platforms")
    platforms.current_platform = _Platform(torch.cuda.get_device_capability())  # type: ignore[attr-defined]
    wrapper = ModuleType("vllm.triton_utils")
    wrapper.triton, wrapper.tl = triton, tl  # type: ignore[attr-defined]
    settings = ModuleType("vllm.envs")
    settings.VLLM_BATCH_INVARIANT = False  # type: ignore[attr-defined]
    sys.modules["vllm"].envs = settings  # type: ignore[attr-defined]
    log = ModuleType("vllm.logger")
    log.init_logger = logging.getLogger  # type: ignore[attr-defined]
    caches = ModuleType("vllm.v1.kv_cache_interface")
    caches.KVQuantMode = CacheMode  # type: ignore[attr-defined]
    sys.modules.update({module.__name__: module for module in (platforms, wrapper, settings, log, caches)})


def index_topk() -> Any:
    """vLLM's module of index scores and top-k."""
    return importlib.import_module("vllm.models.minimax_m3.common.ops.index_topk")


def sparse_attention() -> Any:
    """vLLM's module of attention to selected blocks."""
    return importlib.import_module("vllm.models.minimax_m3.common.ops.sparse_attn")


def paged_attention() -> Any:
    """vLLM's module of attention to all keys, what it takes for dense layers where it runs on Triton."""
    return importlib.import_module("vllm.v1.attention.ops.triton_unified_attention")
