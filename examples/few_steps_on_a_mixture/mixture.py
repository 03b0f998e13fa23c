"""The data, its exact teacher, and a network that is small enough to train in seconds."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from fastdistill.data.closed_form import ExactTeacher, GaussianMixture
from fastdistill.data.latents import LatentBatch
from fastdistill.diffusion.prediction import Prediction
from fastdistill.diffusion.process import RectifiedFlow
from fastdistill.models.families.family import Stack, one_stream

FLOW = RectifiedFlow()
WIDTH, LAYERS = 128, 3
RADIUS, DEVIATION = 1.5, 0.15
WEIGHTS = ((0.4, 0.1, 0.3, 0.2), (0.5, 0.15, 0.3, 0.05))
"""Weights of the modes of each label, in the order of their angles."""


def mixture() -> GaussianMixture:
    """Eight modes on a circle, by turns of label 0 and of label 1: given the label, four of unequal
    weight, with nothing between them."""
    angle = torch.arange(8, dtype=torch.float64) * math.pi / 4
    means = RADIUS * torch.stack([angle.cos(), angle.sin()], dim=1)
    weights = torch.tensor(WEIGHTS, dtype=torch.float64).T.flatten()
    covariances = (DEVIATION**2 * torch.eye(2, dtype=torch.float64)).expand(8, 2, 2)
    # Distances of points to modes are short sums: float32, as the students have it, is enough.
    return GaussianMixture(weights, means, covariances, torch.arange(8) % 2).float()


def teacher() -> ExactTeacher:
    return ExactTeacher(mixture(), FLOW, Prediction.VELOCITY)


@dataclass(frozen=True)
class Labels:
    """The conditioning: labels (B,), and for a critic that is told it the time (B,) of the
    student's step, in place of guidance."""

    labels: Tensor
    guidance: Tensor | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, rows: Tensor) -> Labels:
        return Labels(self.labels[rows])


class LabelFamily:
    """Networks that are called with `(x_t, t, labels)`, whose blocks are `layers`: what methods ask
    of a family."""

    stacks = (Stack(attribute="layers", config_field="", short="layers", pass_through=one_stream),)

    def predict(self, network: nn.Module, x_t: Tensor, t: Tensor, conditioning: Labels) -> Tensor:
        told = {} if conditioning.guidance is None else {"step": conditioning.guidance}
        output: Tensor = network(x_t, t, conditioning.labels, **told)
        return output

    def stack(self, attribute: str) -> Stack:
        return self.stacks[0]

    def streams(self, block_output: Tensor) -> Mapping[str, Tensor]:
        return {"image": block_output[:, None]}


def features(t: Tensor) -> Tensor:
    """(B, 8) of times (B,): they tell times apart where signal and noise are equally strong, and
    where one of them is weak."""
    angle = torch.atan2(t, 1 - t)[:, None] * 2 ** torch.arange(4)
    return torch.cat([angle.sin(), angle.cos()], dim=1)


class Perceptron(nn.Module):
    """A velocity (B, 2) by `x_t` (B, 2), features of `t` (B,) and the label (B,); residual layers
    of width `WIDTH`.

    `told()` is a copy that takes the time of a step, too, and does not yet heed it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(guidance_embeds=False)
        self.into = nn.Linear(2 + 8 + 2, WIDTH)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))
        self.out = nn.Linear(WIDTH, 2)

    def told(self) -> Perceptron:
        sibling = copy.deepcopy(self)
        sibling.config.guidance_embeds = True
        sibling.of_step = nn.Linear(8, WIDTH)
        nn.init.zeros_(sibling.of_step.weight)
        nn.init.zeros_(sibling.of_step.bias)
        return sibling

    def forward(self, x_t: Tensor, t: Tensor, labels: Tensor, step: Tensor | None = None) -> Tensor:
        hidden = self.into(torch.cat([x_t, features(t), nn.functional.one_hot(labels, 2)], dim=1))
        if step is not None:
            hidden = hidden + self.of_step(features(step))
        hidden = nn.functional.silu(hidden)
        for layer in self.layers:
            hidden = hidden + nn.functional.silu(layer(hidden))
        output: Tensor = self.out(hidden)
        return output


class Batches:
    """Labelled draws of the data, as the trainer takes them."""

    def __init__(self, data: GaussianMixture, size: int) -> None:
        self.data, self.size = data, size

    def __call__(self, step: int, rng: torch.Generator) -> LatentBatch:
        x_0, labels = self.data.draw(self.size, rng)
        return LatentBatch(latents=x_0, conditioning=Labels(labels))
