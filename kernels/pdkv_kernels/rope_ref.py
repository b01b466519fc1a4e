"""Partial rotary embedding, NeoX style: dims i and i + rotary_dim / 2 are rotated together, the rest passes through."""

import torch
from torch import Tensor


def rope_table_ref(positions: Tensor, rotary_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines of these positions alone (no table is too short): two float32 [num_rows, rotary_dim / 2].

    Frequencies and angles are rounded to float32, as the model was trained with; exact ones would differ at position
    6,000 by 2e-4 radians.
    """
    exponents = torch.arange(0, rotary_dim, 2, dtype=torch.float32, device=positions.device) / rotary_dim
    angles = positions.float()[:, None] * (1.0 / theta**exponents)  # [num_rows, rotary_dim / 2]
    return angles.cos(), angles.sin()


def rope_ref(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x: [num_rows, heads, head_dim] by a table [num_rows, rotary_dim / 2]; returns float32."""
    half = cos.shape[-1]
    wide = x.float()
    a, b = wide[..., :half], wide[..., half : 2 * half]
    c, s = cos[:, None, :], sin[:, None, :]
    return torch.cat((a * c - b * s, b * c + a * s, wide[..., 2 * half :]), dim=-1)
