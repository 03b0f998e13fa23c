"""Times in [0, 1]: distributions that training draws from, and grids that few-step samplers visit."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class TimeDistribution(Protocol):
    """Distribution of the times, on the path from data to noise, that training looks at."""

    def __call__(self, batch: int, rng: torch.Generator) -> Tensor:
        """Draw `batch` times, float32 on the device of `rng`."""
        ...


@dataclass(frozen=True, kw_only=True)
class Uniform:
    """Uniform times `t ~ U[low, high)`.

    DDPM draws from [0, 1), and DMD from [0.02, 0.98) (Yin et al. 2024, section 3.2).
    """

    low: float = 0.0
    high: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.low < self.high <= 1:
            raise ValueError(f"times lie in [0, 1]: 0 <= low < high <= 1, got {self.low} and {self.high}")

    def __call__(self, batch: int, rng: torch.Generator) -> Tensor:
        return self.low + (self.high - self.low) * torch.rand(batch, generator=rng, device=rng.device)


@dataclass(frozen=True, kw_only=True)
class LogitNormal:
    """Logit-normal times `t = sigmoid(mean + std z)`, `z ~ N(0, 1)`.

    (Esser et al. 2024, equation 19.) A `mean` above 0 draws more times near noise, where a sample's
    coarse features are decided. `mean = log(s)` gives the density of the times of `mean = 0` under
    the shift `s` (`shifted`).
    """

    mean: float = 0.0
    std: float = 1.0

    def __call__(self, batch: int, rng: torch.Generator) -> Tensor:
        return torch.sigmoid(self.mean + self.std * torch.randn(batch, generator=rng, device=rng.device))


@dataclass(frozen=True, kw_only=True)
class Shifted:
    """Times of `base` under the shift `shift` (`shifted`)."""

    base: TimeDistribution
    shift: float

    def __call__(self, batch: int, rng: torch.Generator) -> Tensor:
        return shifted(self.base(batch, rng), self.shift)


def shifted(t: Tensor, shift: float) -> Tensor:
    """Shifted times `t' = s t / (1 + (s - 1) t)`, towards noise for `s > 1`.

    (Esser et al. 2024, equation 23.) On rectified flow the shift divides the signal-to-noise ratio
    `((1 - t) / t)^2` by `s^2`: an image of `s^2` times as many pixels is then equally uncertain.
    diffusers' `mu` is `log(s)`.
    """
    return shift * t / (1 + (shift - 1) * t)


def flux_shift(
    image_tokens: int, tokens: tuple[int, int] = (256, 4096), mu: tuple[float, float] = (0.5, 1.15)
) -> float:
    """Shift that `FluxPipeline` gives an image of `image_tokens` tokens.

    It is `exp(mu)`, `mu` linear in the tokens. `mu` is 0.5 at 256 tokens (256 pixels squared) and
    1.15 at 4096 (1024 pixels squared), the defaults of `calculate_shift` in diffusers.
    """
    return math.exp(mu[0] + (mu[1] - mu[0]) * (image_tokens - tokens[0]) / (tokens[1] - tokens[0]))


def time_of_batch(time: Tensor, like: Tensor) -> Tensor:
    """`time` () for every sample of `like` (B, ...), (B,)."""
    return time.to(like.device).expand(like.shape[0])


def few_step_times(steps: int, shift: float = 1.0) -> Tensor:
    """Times (steps,) at which a sampler of `steps` steps calls its network.

    The times fall from 1, and are evenly spaced before the shift. For 4 steps the times are
    `[1, 0.75, 0.5, 0.25]`; with FLUX.1's shift at 1024 pixels squared, `exp(1.15)`,
    `[1, 0.9045, 0.7595, 0.5128]`. They are the `sigmas` of `FlowMatchEulerDiscreteScheduler` in
    `FluxPipeline`, without the last, 0. (Called without `sigmas`, that scheduler ends its grid at
    `sigma_min` instead, and shifts the grid twice. Pipelines of FLUX's kind do not call it so.)

    Raises:
        ValueError: `steps` is less than 1.
    """
    if steps < 1:
        raise ValueError(f"a sampler needs at least one step, got {steps}")
    return shifted(torch.linspace(1, 1 / steps, steps, dtype=torch.float64), shift).float()
