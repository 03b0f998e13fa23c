"""What DMD and DMD2 have in common: a critic that follows the student's samples, and a student that moves against it."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from fastdistill.data.latents import LatentBatch
from fastdistill.diffusion.guidance import guide
from fastdistill.diffusion.prediction import Prediction
from fastdistill.diffusion.process import RectifiedFlow
from fastdistill.distill.methods.distillation import Distillation, Setup, time_distribution
from fastdistill.distill.options import MatchingOptions
from fastdistill.errors import UserError
from fastdistill.models.guidance_embedder import embeds_guidance, with_scale
from fastdistill.ops import dmd_loss
from fastdistill.train.denoising import Denoising
from fastdistill.train.method import Loss


class DistributionMatching(Distillation):
    """The student descends the KL divergence of its noised samples from the teacher's, along the difference of two scores.

    With ``x`` a sample of the student, ``x_t = alpha x + sigma eps`` and ``x_0_critic``, ``x_0_real`` the data that the critic and the
    guided teacher see in it, the gradient in ``x`` is (Yin et al. 2024, arXiv 2311.18828, equations 7 and 8)::

        g = (x_0_critic - x_0_real) / mean |x - x_0_real|

    It is the same in any prediction, as the factor between two predictions cancels.

    The role ``critic`` is the critic, trained by the student's own loss of denoising on the student's samples. By default it starts as
    a copy of the student, which starts as a diffusion model; another network must take and predict what the student does.
    """

    # Two networks that disagree about the scale average over it alike (SenseFlow draws its teacher's embedded guidance).
    may_average_guidance = True
    tells_step = False
    """Whether the critic's input for guidance has another use."""

    def __init__(self, options: MatchingOptions, critic: nn.Module | None, **setup: Unpack[Setup]) -> None:
        super().__init__(options, **setup)
        self.matching = options
        critic = copy.deepcopy(self.networks["student"]) if critic is None else critic
        if not self.tells_step and embeds_guidance(critic) != embeds_guidance(self.networks["student"]):
            raise UserError("the critic takes guidance as the student does: give critic= of the student's kind, or leave it out")
        self.networks["critic"] = critic
        self.predictions["critic"] = self.predictions["student"]
        self.distribution = time_distribution(options.times, options.time_shift, low=options.time_low, high=options.time_high)
        # Not bounded, as the critic has to know what every time looks like (DMD2's main/sd_guidance.py).
        self.critic_distribution = time_distribution(options.times, options.time_shift)
        # On rectified flow a velocity is compared, on others the noise: both are finite at all times.
        self.compared = Prediction.VELOCITY if isinstance(self.process, RectifiedFlow) else Prediction.EPSILON

    def matching_loss(
        self, x_0: Tensor, conditioning: Any, scale: Tensor | None, rng: torch.Generator, *, critic_scale: Tensor | None
    ) -> Tensor:
        """``mean(g^2) / 2`` with the gradient ``g / numel`` in ``x_0`` (B, ...), the student's samples, behind fresh noise.

        Args:
            scale: (B,), the guidance of the teacher, from :meth:`draw_scale`.
            critic_scale: (B,), what the critic is given as guidance.
        """
        x_t, t, noise = self.process.draw(x_0.detach(), self.distribution, rng)
        return self.difference(x_0, noise, x_t, t, conditioning, scale, critic_scale)

    def difference(
        self, x_0: Tensor, noise: Tensor, x_t: Tensor, t: Tensor, conditioning: Any, scale: Tensor | None, critic_scale: Tensor | None
    ) -> Tensor:
        """The loss of :meth:`matching_loss` at ``x_t = alpha x_0 + sigma noise`` (B, ...) and ``t`` (B,)."""
        with torch.no_grad():
            real, unconditional, weight = self.teach_apart(x_t, t, conditioning, self.compared, scale)
            critic = self.predict("critic", x_t, t, conditioning, self.compared, critic_scale)
            if unconditional is not None and isinstance(weight, Tensor):
                # The operator takes one scale for all.
                real, unconditional, weight = guide(unconditional, real, weight), None, 1.0
        return dmd_loss(
            x_0,
            noise,
            real,
            unconditional,
            critic,
            guidance=float(weight),
            prediction="velocity" if self.compared is Prediction.VELOCITY else "eps",
            normaliser=self.matching.normaliser,
        )

    def denoising_loss(self, x_0: Tensor, conditioning: Any, scale: Tensor | None, rng: torch.Generator) -> Loss:
        """Of the critic, which is given ``scale`` (B,) as guidance, on the student's samples ``x_0`` (B, ...), a constant."""
        critic, prediction = self.networks["critic"], self.predictions["critic"]
        # A score's own error is infinite towards t = 0.
        error_in = Prediction.EPSILON if prediction is Prediction.SCORE else prediction
        training = Denoising(critic, self.family, self.process, prediction, self.critic_distribution, error_in)
        scale = self.default_scale(x_0) if scale is None else scale
        batch = LatentBatch(latents=x_0.detach(), conditioning=with_scale(conditioning, critic, scale))
        return training.loss("student", batch, rng)
