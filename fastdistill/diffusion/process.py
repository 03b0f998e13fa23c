"""The forward process ``x_t = alpha(t) x_0 + sigma(t) eps``: data at ``t = 0``, noise at ``t = 1``."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def expand_time(t: Tensor, like: Tensor) -> Tensor:
    """``t`` (B,) with trailing singleton dimensions, to broadcast against ``like`` (B, ...)."""
    if t.ndim != 1 or t.shape[0] != like.shape[0]:
        raise ValueError(f"t must have shape ({like.shape[0]},), one time per sample, got {tuple(t.shape)}")
    return t.view(-1, *[1] * (like.ndim - 1)).to(like.dtype)


def noise_like(x: Tensor, rng: torch.Generator) -> Tensor:
    """Standard normal noise of the shape, dtype and device of ``x``, drawn on ``rng``'s device: the same bits wherever ``x`` lives."""
    return torch.randn(x.shape, generator=rng, device=rng.device).to(x)


@dataclass(frozen=True, kw_only=True)
class RectifiedFlow:
    """Straight paths, ``alpha = 1 - t`` and ``sigma = t`` (Liu et al. 2022, equation 1; FLUX's process)."""

    time_mean: float = 0.0
    """Location of the training times' logit. Above 0, more of them near noise, where a sample's coarse features are decided:
    ``log(s)`` is the density of the timestep shift ``s`` (Esser et al. 2024, section 5.3.2)."""

    def add_noise(self, x_0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """``x_t`` of shape (B, ...) for ``t`` (B,) in [0, 1]."""
        t = expand_time(t, x_0)
        return (1 - t) * x_0 + t * noise

    def draw(self, x_0: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """A training point ``(x_t, t, velocity)`` for each ``x_0``: fresh noise, and ``t`` (B,) logit-normal."""
        noise = noise_like(x_0, rng)
        t = logit_normal(x_0.shape[0], rng, mean=self.time_mean).to(x_0.device)
        return self.add_noise(x_0, noise, t), t, self.velocity(x_0, noise)

    def velocity(self, x_0: Tensor, noise: Tensor) -> Tensor:
        """``dx_t / dt = eps - x_0``, what a flow-matching network predicts (Lipman et al. 2023)."""
        return noise - x_0


def logit_normal(batch: int, generator: torch.Generator, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """``batch`` times ``t = sigmoid(mean + std * z)``, ``z ~ N(0, 1)`` (Esser et al. 2024, section 3.1)."""
    return torch.sigmoid(mean + std * torch.randn(batch, generator=generator, device=generator.device))
