"""Small models with random weights, the same ones on a CPU and on a GPU."""

import dataclasses
from typing import Any

import torch

from pdkv.m3.config import M3Config
from pdkv.m3.model import M3Model
from pdkv.m3.random_weights import random_weights
from pdkv.m3.sharding import model_share
from pdkv.m3.weights import M3Weights

GPU = torch.device("cuda", 0)


def small_config(dtype: str) -> M3Config:
    """One dense layer and three sparse ones; from 513 tokens on the selection matters. M3's head size."""
    return M3Config(
        hidden_size=256,
        num_layers=4,
        num_heads=16,
        num_kv_heads=4,
        head_dim=128,
        vocab_size=384,
        max_position_embeddings=131072,
        rms_norm_eps=1e-6,
        rope_theta=5e6,
        rotary_dim=64,
        dense_intermediate_size=256,
        expert_intermediate_size=128,
        shared_intermediate_size=128,
        num_experts=8,
        experts_per_token=2,
        routed_scaling_factor=1.5,
        moe_layers=(False, True, True, True),
        sparse_layers=(False, True, True, True),
        num_index_heads=4,
        index_dim=128,
        topk_blocks=4,
        dtype=dtype,
    )


def small_weights(config: M3Config) -> M3Weights:
    """Drawn on a CPU; as ``config.dtype`` holds them."""
    return random_weights(config, "cpu", getattr(torch, config.dtype), model_share(config))


def cpu_model(config: M3Config) -> M3Model:
    """The reference: float32 maths over weights that are rounded as the GPU's are."""
    return M3Model(config, moved(small_weights(config), "cpu", torch.float32))


def gpu_model(config: M3Config) -> M3Model:
    return M3Model(config, moved(small_weights(config), GPU, getattr(torch, config.dtype)), GPU)


def moved(weights: Any, device: str | torch.device, dtype: torch.dtype) -> Any:  # noqa: ANN401  any part of M3Weights
    """Matrices in ``dtype``; what is float32 anyway, norms and routers, stays so."""
    if isinstance(weights, torch.Tensor):
        exact = weights.dim() == 1 or weights.shape[0] == 8  # the router has a row an expert
        return weights.to(device) if exact and weights.dtype == torch.float32 else weights.to(device, dtype)
    if isinstance(weights, tuple):
        return tuple(moved(part, device, dtype) for part in weights)
    if dataclasses.is_dataclass(weights) and not isinstance(weights, type):
        parts = {f.name: moved(getattr(weights, f.name), device, dtype) for f in dataclasses.fields(weights)}
        return dataclasses.replace(weights, **parts)
    return weights
