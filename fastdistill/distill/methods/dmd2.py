"""Improved distribution matching (DMD2; Yin et al. 2024, arXiv 2405.14867), with an option of SenseFlow (arXiv 2506.00523)."""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from fastdistill.data.latents import LatentBatch
from fastdistill.diffusion.prediction import Prediction
from fastdistill.diffusion.timesteps import Uniform
from fastdistill.distill.methods.discriminator import Discriminator, blocks_at, image_features, inner_dim
from fastdistill.distill.methods.distillation import Setup
from fastdistill.distill.methods.losses import discriminator_loss, generator_loss, pseudo_huber
from fastdistill.distill.methods.rollout import Rollout, Visit
from fastdistill.distill.options import DMD2Options
from fastdistill.models.families.family import Family
from fastdistill.models.guidance_embedder import embeds_guidance, with_guidance_embedder, with_scale
from fastdistill.train.method import Loss

# SenseFlow's distance of the middle of a segment from its ends (20 of 1000 times).
SEGMENT_MARGIN = 0.02


class DMD2(Rollout):
    """Distribution matching without pairs, in several steps::

        L_student = L_matching + gan_weight L_G + isg_weight L_ISG          every critic_updates steps
        L_critic    = L_denoising + gan_critic_weight L_D                       every step
        L_heads   = L_D                                                     every step

    ``x``, which all judge, is the student's ``x_0`` at one of its times (:class:`~fastdistill.distill.methods.rollout.Rollout`).

    The critic sees the samples of all steps as one distribution, so that the steps may share out the modes. With ``critic_knows_step`` it
    is given the time of the step as guidance, which it has no other use for, and each step is matched by itself; not in the paper.

    ``L_G`` and ``L_D`` read the critic's features of ``x`` and of data, each noised anew (section 4.3). The role ``discriminator`` is
    the heads; the body is trained with the critic.

    Intra-segment guidance (``isg_weight``; SenseFlow) compares the student's jump from ``t_k`` to ``t_k+1`` with the teacher's to a random
    time between, ``t_k+1 + 0.02 .. t_k - 0.02``, and the student's from there, by the pseudo-Huber loss.
    """

    def __init__(
        self,
        options: DMD2Options = DMD2Options(),
        *,
        critic: nn.Module | None = None,
        discriminator: nn.Module | None = None,
        **setup: Unpack[Setup],
    ) -> None:
        self.tells_step = options.critic_knows_step and setup["steps"] > 1
        if self.tells_step:
            critic = copy.deepcopy(setup["student"]) if critic is None else critic
            critic = critic if embeds_guidance(critic) else with_guidance_embedder(critic)
        super().__init__(options, critic, **setup)
        self.options = options
        if options.gan_weight:
            critic = self.networks["critic"]
            self.blocks = blocks_at(critic, cast(Family, self.family), options.gan_depths)
            if discriminator is None:
                discriminator = Discriminator(inner_dim(critic), len(self.blocks)).to(next(critic.parameters()).device)
            self.networks["discriminator"] = discriminator
            self.trains = ("student", "critic", "discriminator")
        if options.isg_weight:
            self.check_determined("teacher", self.times)

    def role_loss(self, role: str, batch: LatentBatch, rng: torch.Generator) -> Loss:
        if role == "discriminator" and role in self.trains:
            return Loss(total=self._discriminator_loss(*self.sample_to_judge(batch, rng), batch, rng))
        return super().role_loss(role, batch, rng)

    def student_loss(self, visit: Visit, x_0: Tensor, batch: LatentBatch, rng: torch.Generator) -> Loss:
        critic_scale = self._critic_scale(visit)
        terms = {"matching": self.matching_loss(x_0, batch.conditioning, visit.scale, rng, critic_scale=critic_scale)}
        total = terms["matching"]
        if self.options.gan_weight:
            terms["gan"] = generator_loss(self._logits(x_0, batch.conditioning, critic_scale, rng), self.options.gan_loss)
            total = total + self.options.gan_weight * terms["gan"]
        if self.options.isg_weight:
            terms["isg"] = self._segment_loss(x_0, visit, batch.conditioning, rng)
            total = total + self.options.isg_weight * terms["isg"]
        return Loss(total=total, logs=terms)

    def critic_loss(self, visit: Visit, x_0: Tensor, batch: LatentBatch, rng: torch.Generator) -> Loss:
        denoising = self.denoising_loss(x_0, batch.conditioning, self._critic_scale(visit), rng)
        if not self.options.gan_weight:
            return denoising
        gan = self._discriminator_loss(visit, x_0, batch, rng)
        return Loss(total=denoising.total + self.options.gan_critic_weight * gan, logs={"denoising": denoising.total, "gan": gan})

    def _discriminator_loss(self, visit: Visit, x_0: Tensor, batch: LatentBatch, rng: torch.Generator) -> Tensor:
        scale = self._critic_scale(visit)
        critic = self._logits(x_0, batch.conditioning, scale, rng)
        real = self._logits(batch.latents, batch.conditioning, scale, rng)
        return discriminator_loss(real, critic, self.options.gan_loss)

    def _critic_scale(self, visit: Visit) -> Tensor | None:
        """What the critic is given as guidance: the time of the step that a sample is from, if it is told."""
        return visit.t if self.tells_step else visit.scale

    def _logits(self, x_0: Tensor, conditioning: Any, scale: Tensor | None, rng: torch.Generator) -> Tensor:
        """What the heads say about ``x_0`` (B, ...) behind fresh noise."""
        x_t, t, _ = self.process.draw(x_0, Uniform(), rng)
        critic, family = self.networks["critic"], cast(Family, self.family)
        conditioning = with_scale(conditioning, critic, self.default_scale(x_0) if scale is None else scale)
        logits: Tensor = self.networks["discriminator"](image_features(critic, family, self.blocks, x_t, t, conditioning))
        return logits

    def _segment_loss(self, x_0: Tensor, visit: Visit, conditioning: Any, rng: torch.Generator) -> Tensor:
        x_t, t, scale = visit.x_t, visit.t, visit.scale
        s = self.end(visit)
        with torch.no_grad():
            # Narrow segments, of many steps or a strong shift, keep half of their width.
            margin = torch.minimum(torch.full_like(s, SEGMENT_MARGIN), (t - s) / 4)
            middle = s + margin + (t - s - 2 * margin) * torch.rand(len(t), generator=rng, device=rng.device).to(t)
            x_middle = self.process.ddim_step(x_t, self.teach(x_t, t, conditioning, Prediction.X0, scale), t, middle)
            x_0_middle = self.predict("student", x_middle, middle, conditioning, Prediction.X0, scale)
            target = self.process.ddim_step(x_middle, x_0_middle, middle, s)
        return pseudo_huber(self.process.ddim_step(x_t, x_0, t, s), target)
