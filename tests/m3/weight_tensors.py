"""The tensors inside a weight struct, in its own order."""

import torch


def tensors(value: object) -> list[torch.Tensor]:
    """Every tensor of a weight struct."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, tuple):
        return [tensor for item in value for tensor in tensors(item)]
    return [tensor for item in getattr(value, "__dict__", {}).values() for tensor in tensors(item)]
