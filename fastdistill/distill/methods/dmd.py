"""One-step distribution matching held to pairs (DMD; Yin et al. 2024, arXiv 2311.18828)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from fastdistill.data.pairs import PairBatch
from fastdistill.diffusion.prediction import Prediction
from fastdistill.diffusion.process import noise_like
from fastdistill.distill.methods.distillation import Setup
from fastdistill.distill.methods.distribution_matching import DistributionMatching
from fastdistill.distill.methods.losses import pseudo_huber
from fastdistill.distill.methods.teacher_pairs import require_pairs
from fastdistill.distill.options import DMDOptions
from fastdistill.train.method import Loss


class DMD(DistributionMatching):
    """``L_student = L_matching + regression_weight L_regression``, and ``L_critic = L_denoising``, both in every step (algorithm 1).

    ``L_regression`` is the distance of the student's sample from the teacher's, from the same noise; it keeps modes that matching
    alone, which seeks them, may lose. The paper measures it by LPIPS between images; here, in the latent space, by the squared error
    or the pseudo-Huber loss. ``L_matching`` is of samples from noise of its own, under the same prompts.

    Trained on :class:`~fastdistill.data.pairs.PairBatch`, from :func:`fastdistill.distill.methods.teacher_pairs.teacher_pairs`.
    """

    trains = ("student", "critic")

    def __init__(self, options: DMDOptions = DMDOptions(), *, critic: nn.Module | None = None, **setup: Unpack[Setup]) -> None:
        super().__init__(options, critic, **setup)
        self.options = options

    def role_loss(self, role: str, batch: Any, rng: torch.Generator) -> Loss:
        pairs = require_pairs(batch, "DMD")
        with torch.set_grad_enabled(role == "student"):
            generated = self._generate(noise_like(pairs.noise, rng), pairs)
        if role == "critic":
            return self.denoising_loss(generated, pairs.conditioning, pairs.scale, rng)
        matching = self.matching_loss(generated, pairs.conditioning, pairs.scale, rng, critic_scale=pairs.scale)
        found = self._generate(pairs.noise, pairs)
        if self.options.regression_loss == "mse":
            regression = (found - pairs.latents).square().mean()
        else:
            regression = pseudo_huber(found, pairs.latents)
        return Loss(total=matching + self.options.regression_weight * regression, logs={"matching": matching, "regression": regression})

    def _generate(self, noise: Tensor, pairs: PairBatch) -> Tensor:
        t = self.at(self.times[0], noise)
        x_t = self.process.add_noise(torch.zeros_like(noise), noise, t)
        return self.predict("student", x_t, t, pairs.conditioning, Prediction.X0, pairs.scale)
