"""Training of a velocity network from data: conditional flow matching."""

from __future__ import annotations

import torch
from torch import nn

from fastdistill.data.latents import LatentBatch
from fastdistill.diffusion.process import RectifiedFlow
from fastdistill.models.family import Family
from fastdistill.train.method import Loss, StudentMethod


class FlowMatching(StudentMethod):
    """``L_task = E || v(x_t, t, c) - (eps - x_0) ||^2`` with logit-normal ``t`` (Lipman et al. 2023; Esser et al. 2024)."""

    def __init__(self, student: nn.Module, family: Family, process: RectifiedFlow) -> None:
        self.networks = {"student": student}
        self.family = family
        self.process = process

    def loss(self, role: str, batch: LatentBatch, rng: torch.Generator) -> Loss:
        x_t, t, target = self.process.draw(batch.latents, rng)
        velocity = self.family.predict(self.networks[role], x_t, t, batch.conditioning)
        return Loss(total=(velocity.float() - target).square().mean())
