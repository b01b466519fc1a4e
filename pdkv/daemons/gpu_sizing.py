"""What of a GPU's memory a worker takes for pages, and how many prompt tokens it computes at a time."""

import msgspec
import torch

from pdkv.daemons.link import WorkerSettings
from pdkv.daemons.sizing import GpuRoom
from pdkv.m3.config import M3Config
from pdkv.m3.model import M3Model

_CHUNKS = (8192, 4096, 2048, 1024, 512)
"""The last is a CPU's."""
_SHARE_OF_CHUNK = 0.06
"""Of a GPU's memory, for what one prefill step makes on its way."""
_FIXED_RESERVE = 2 << 30
"""Bytes: the context and the kernels' code, CUDA graphs, workspaces that do not grow with a chunk."""


class GpuMemory(msgspec.Struct, frozen=True):
    """Bytes of one GPU."""

    total: int
    free: int
    """For anybody."""
    ours: int
    """Held by this process for weights."""


def room_on(settings: WorkerSettings, model: M3Model) -> GpuRoom | None:
    """Room on the model's GPU, once its weights are there; None for a CPU. What other processes hold is theirs."""
    if model.device.type != "cuda":
        return None
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(model.device)
    memory = GpuMemory(total, free, torch.cuda.memory_reserved(model.device))
    return room_in(memory, settings, model.config, model.dtype.itemsize)


def room_in(memory: GpuMemory, settings: WorkerSettings, config: M3Config, itemsize: int) -> GpuRoom:
    """What is left for pages of the worker's share, or of what is free where that is less, beside the reserve."""
    reserve = _FIXED_RESERVE + chunk_in(memory.total, settings, config, itemsize) * activation_bytes(config, itemsize)
    reserve += settings.max_batch * config.vocab_size * itemsize  # logits of a decode step
    if config.dtype == "float32":
        reserve += settings.max_model_len * gathered_bytes(config, itemsize)
    share = int(memory.total * settings.gpu_memory_utilization) - memory.ours
    room = min(share, memory.free) - reserve
    return GpuRoom(room, reserve, memory.total, memory.free, settings.gpu_memory_utilization)


def chunk_on(settings: WorkerSettings, model: M3Model) -> int:
    """What ``prefill_chunk`` says, else the most that takes no more than a small share of the model's GPU."""
    if model.device.type != "cuda":
        return settings.prefill_chunk or _CHUNKS[-1]
    total = torch.cuda.mem_get_info(model.device)[1]
    return chunk_in(total, settings, model.config, model.dtype.itemsize)


def chunk_in(total: int, settings: WorkerSettings, config: M3Config, itemsize: int) -> int:
    """The same on a GPU of ``total`` bytes."""
    if settings.prefill_chunk:
        return settings.prefill_chunk
    a_token = activation_bytes(config, itemsize)
    return next((chunk for chunk in _CHUNKS if chunk * a_token <= total * _SHARE_OF_CHUNK), _CHUNKS[-1])


def activation_bytes(config: M3Config, itemsize: int) -> int:
    """What one prompt token takes at the widest place of a layer: all of its experts' inputs and outputs at once.

    An upper bound for a rank: it counts the experts' full width.
    """
    expert = 2 * config.expert_intermediate_size * (itemsize + 3 * 4) + config.hidden_size * (itemsize + 3 * 4)
    dense = 2 * config.dense_intermediate_size * (itemsize + 3 * 4)
    norms = 3 * 8 * config.hidden_size
    return max(config.experts_per_token * expert, dense) + norms


def gathered_bytes(config: M3Config, itemsize: int) -> int:
    """What one token of context takes where a dense layer's K and V are put together, as its prefill in float32 does:
    both, and one on its way there, widened and scaled."""
    return config.num_kv_heads * config.head_dim * (2 * itemsize + 2 * 4)
