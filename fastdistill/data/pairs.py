"""Pairs of noise and the sample that a teacher's flow makes of the noise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastdistill.data.latents import LatentBatch


@dataclass(frozen=True, kw_only=True)
class PairBatch(LatentBatch):
    """Batch whose `latents` (B, ...) are the teacher's samples from `noise` (B, ...).

    The guidance of each is `scale` (B,), if the scale was drawn.
    """

    noise: Tensor
    scale: Tensor | None = None

    def __getitem__(self, index: Tensor | slice) -> PairBatch:
        return PairBatch(
            latents=self.latents[index],
            conditioning=None if self.conditioning is None else self.conditioning[index],
            noise=self.noise[index],
            scale=None if self.scale is None else self.scale[index],
        )


@dataclass(frozen=True, kw_only=True)
class PairPool:
    """Pairs (N, ...), the prompt of each (N,), and the conditioning of every prompt (P, ...)."""

    noise: Tensor
    latents: Tensor
    prompts: Tensor
    conditioning: Any
    scale: Tensor | None = None
    device: torch.device = torch.device("cpu")  # noqa: RUF009, an immutable value
    """Device of the batches; the pool itself may be too large for a GPU."""

    def batch(self, size: int, generator: torch.Generator) -> PairBatch:
        """Draw `size` pairs with replacement."""
        rows = torch.randint(len(self.noise), (size,), generator=generator)
        return PairBatch(
            latents=self.latents[rows].to(self.device),
            noise=self.noise[rows].to(self.device),
            conditioning=self.conditioning[self.prompts[rows].to(self.device)],
            scale=None if self.scale is None else self.scale[rows].to(self.device),
        )
