"""vLLM's own Triton kernels for M3, run unmodified from an unpacked package of vLLM 0.33.

Their modules import a platform probe and a wrapper of triton from the rest of vLLM, which needs compiled extensions.
Empty packages that point into the given folder, and two small modules in place of those imports, let the kernel
files load as they are.
"""

import importlib
import sys
from dataclasses import dataclass
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
]


@dataclass(frozen=True)
class _Platform:
    """What the kernels' launchers ask of vLLM's platform: answers for the CUDA device at hand."""

    capability: tuple[int, int]

    def is_cuda(self) -> bool:
        return True

    def is_device_capability(self, capability: tuple[int, int]) -> bool:
        return self.capability == capability

    def is_arch_support_pdl(self) -> bool:
        return self.capability >= (9, 0)


def load(folder: Path) -> None:
    """Make ``index_topk()`` and ``sparse_attention()`` find their modules; folder is ``vllm/`` or what holds it."""
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
    sys.modules.update({"vllm.platforms": platforms, "vllm.triton_utils": wrapper})


def index_topk() -> Any:
    """vLLM's module of index scores and top-k."""
    return importlib.import_module("vllm.models.minimax_m3.common.ops.index_topk")


def sparse_attention() -> Any:
    """vLLM's module of attention to selected blocks."""
    return importlib.import_module("vllm.models.minimax_m3.common.ops.sparse_attn")
