"""Weights drawn at random in the shapes of a config: for measuring a model of which there is no checkpoint at hand."""

from dataclasses import dataclass

import torch
from torch import Tensor

from pdkv.m3.model_config import M3Config
from pdkv.m3.sharding import ModelShare
from pdkv.m3.tensor_names import NAMINGS, Slot, Slots
from pdkv.m3.weights import M3Weights, assemble_weights


def random_weights(config: M3Config, device: str, dtype: torch.dtype, share: ModelShare) -> M3Weights:
    """The same ones for every process that has the same kind of device, config and share.

    Matrices have entries of variance 1 / columns, so that what flows through stays as large as it is; norms and
    routers' biases are 0. Ranks draw what they divide each for itself, and alike what all of them hold: a model of
    several ranks is a model, but not the one of a single rank.
    """
    return assemble_weights(_Drawn(device, dtype), NAMINGS[0], config, share)


@dataclass
class _Drawn:
    device: str
    dtype: torch.dtype
    num_drawn: int = 0

    def read(self, slots: Slots) -> dict[str, Tensor]:
        return {field: self._draw(slot) for field, slot in slots.items()}

    def _draw(self, slot: Slot) -> Tensor:
        """Each tensor from a seed of its own: its place in the model."""
        self.num_drawn += 1
        dtype = torch.float32 if slot.exact else self.dtype
        if len(slot.shape) == 1:
            return torch.zeros(slot.shape, dtype=dtype, device=self.device)
        generator = torch.Generator(self.device).manual_seed(self.num_drawn)
        drawn = torch.empty(slot.shape, dtype=dtype, device=self.device)
        return drawn.normal_(std=slot.shape[-1] ** -0.5, generator=generator)
