"""Latents with their conditioning: the batch of every training method."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastdistill.models.families.family import Conditioning


@dataclass(frozen=True, kw_only=True)
class LatentBatch:
    """Clean latents (B, ...), in the scale of the network, with the conditioning of `predict`."""

    latents: Tensor
    conditioning: Any
    """`Conditioning` of text-to-image models; class labels (B,) of toy networks, or None."""
    shared: dict[str, Any] = field(default_factory=dict, init=False, compare=False, repr=False)
    """Values that the roles of a step leave for each other, such as the sample that they judge.
    They go with the batch."""

    def __len__(self) -> int:
        return self.latents.shape[0]

    def __getitem__(self, index: Tensor | slice) -> LatentBatch:
        conditioning = None if self.conditioning is None else self.conditioning[index]
        return LatentBatch(latents=self.latents[index], conditioning=conditioning)


@dataclass(frozen=True, kw_only=True)
class LatentPool:
    """Cached pool of latents (N, C, H, W), and the prompt of each (N,).

    `conditioning` (P, ...) has a row for every prompt. The last row is the empty prompt's. It
    replaces a prompt with odds `dropout`, so that the student can be sampled with classifier-free
    guidance (Ho & Salimans 2022).
    """

    latents: Tensor
    prompts: Tensor
    conditioning: Conditioning
    dropout: float = 0.1

    def __post_init__(self) -> None:
        if self.latents.shape[0] != self.prompts.shape[0] or self.latents.shape[0] == 0:
            raise ValueError(
                "a pool needs one prompt per latent and at least one: "
                f"{self.latents.shape[0]} and {self.prompts.shape[0]}"
            )

    def batch(self, size: int, generator: torch.Generator) -> LatentBatch:
        """Draw `size` latents with replacement."""
        rows = torch.randint(self.latents.shape[0], (size,), generator=generator)
        dropped = torch.rand(size, generator=generator) < self.dropout
        prompts = torch.where(dropped, len(self.conditioning) - 1, self.prompts[rows])
        device = self.conditioning.prompt_embeds.device
        return LatentBatch(
            latents=self.latents[rows].float().to(device), conditioning=self.conditioning[prompts.to(device)]
        )
