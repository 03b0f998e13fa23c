"""Training of a velocity network from data: conditional flow matching."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from fastdistill.data.latents import LatentBatch
from fastdistill.diffusion.process import RectifiedFlow, logit_normal, noise_like
from fastdistill.models.family import Family
from fastdistill.train.method import Loss


class FlowMatching:
    """``L_task = E || v(x_t, t, c) - (eps - x_0) ||^2`` with logit-normal ``t`` (Lipman et al. 2023; Esser et al. 2024)."""

    trains: Sequence[str] = ("student",)

    def __init__(self, student: nn.Module, family: Family) -> None:
        self.networks = {"student": student}
        self.family = family
        self.process = RectifiedFlow()

    def turns(self, step: int) -> Sequence[str]:
        return self.trains

    def loss(self, role: str, batch: LatentBatch, rng: torch.Generator) -> Loss:
        noise = noise_like(batch.latents, rng)
        t = logit_normal(len(batch), rng).to(noise.device)
        x_t = self.process.add_noise(batch.latents, noise, t)
        velocity = self.family.predict(self.networks[role], x_t, t, batch.conditioning)
        return Loss(total=(velocity.float() - self.process.velocity(batch.latents, noise)).square().mean())

    def after_step(self, step: int) -> None:
        pass
