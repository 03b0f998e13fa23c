"""Two-dimensional data with exact teachers, every process, and a network small enough to train in a
test."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from fastdistill.data.closed_form import GaussianMixture
from fastdistill.data.latents import LatentBatch
from fastdistill.diffusion.process import (
    CosineVariancePreserving,
    LinearVariancePreserving,
    Process,
    RectifiedFlow,
    TrigFlow,
    VarianceExploding,
)

PROCESSES: dict[str, Process] = {
    "rectified_flow": RectifiedFlow(),
    "linear": LinearVariancePreserving(),
    "cosine": CosineVariancePreserving(),
    "trig_flow": TrigFlow(),
    "exploding": VarianceExploding(),
}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def mixture() -> GaussianMixture:
    """Four oblong modes of unequal weight in three classes, two of them in class 2; about unit
    variance in all."""
    weights = torch.tensor([0.15, 0.25, 0.2, 0.4], dtype=torch.float64)
    means = torch.tensor([[-1.5, 0.5], [1.0, 1.2], [-0.6, -1.3], [0.8, -0.9]], dtype=torch.float64)
    spreads = torch.tensor(
        [[[0.3, 0.0], [0.1, 0.2]], [[0.2, 0.0], [0.0, 0.3]], [[0.25, 0.0], [0.0, 0.2]], [[0.3, 0.0], [-0.15, 0.25]]]
    )
    return GaussianMixture(weights, means, (spreads @ spreads.mT).double(), torch.tensor([0, 1, 2, 2]))


def gaussian() -> GaussianMixture:
    mean = torch.tensor([0.7, -0.4], dtype=torch.float64)
    return GaussianMixture.gaussian(mean, torch.tensor([[0.5, 0.2], [0.2, 0.3]], dtype=torch.float64))


class ToyFamily:
    """Networks that are called with `(x_t, t, labels)`."""

    def predict(self, network: nn.Module, x_t: Tensor, t: Tensor, conditioning: Tensor | None) -> Tensor:
        return network(x_t, t, conditioning)


class ToyNetwork(nn.Module):
    """A perceptron of `x_t` scaled to about unit variance, Fourier features of `log(sigma /
    alpha)`, and a label.

    `output_scale(alpha, sigma)` gives the output the size of what it predicts.
    """

    def __init__(
        self, process: Process, labels: int = 0, width: int = 96, output_scale: Any = lambda alpha, sigma: 1.0
    ) -> None:
        super().__init__()
        self.process, self.output_scale = process, output_scale
        self.embedding = nn.Embedding(labels + 1, width)
        self.into = nn.Linear(2 + 8, width)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(2))
        self.out = nn.Linear(width, 2)

    def forward(self, x_t: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        labels = torch.full_like(t, self.embedding.num_embeddings - 1, dtype=torch.long) if labels is None else labels
        alpha, sigma = (value[:, None] for value in (self.process.alpha(t), self.process.sigma(t)))
        angle = torch.atan2(sigma, alpha) * 2 ** torch.arange(4)
        features = torch.cat([x_t / torch.hypot(alpha, sigma), torch.sin(angle), torch.cos(angle)], dim=1)
        hidden = nn.functional.silu(self.into(features) + self.embedding(labels))
        for layer in self.layers:
            hidden = hidden + nn.functional.silu(layer(hidden))
        return self.out(hidden) * self.output_scale(alpha, sigma)


def mixture_batches(data: GaussianMixture, size: int, *, labelled: bool = False) -> Any:
    """A batch source of the trainer."""

    def batch(step: int, rng: torch.Generator) -> LatentBatch:
        x_0, labels = data.draw(size, rng)
        return LatentBatch(latents=x_0.float(), conditioning=labels if labelled else None)

    return batch


def quasi_random_noise(count: int) -> Tensor:
    """(count, 2) standard normal, spread evenly (a scrambled Sobol sequence): moments of smooth
    maps of it hardly scatter."""
    uniform = torch.quasirandom.SobolEngine(2, scramble=True, seed=0).draw(count, dtype=torch.float64)
    return math.sqrt(2) * torch.erfinv(2 * uniform.clamp(1e-9, 1 - 1e-9) - 1)
