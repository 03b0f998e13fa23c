"""Improved distribution matching (DMD2; Yin et al. 2024, arXiv 2405.14867), with an option of
SenseFlow (arXiv 2506.00523)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from fastdistill.data.latents import LatentBatch
from fastdistill.diffusion.prediction import Prediction
from fastdistill.distill.methods.critic import FOLLOWING, Critic, two_time_scales
from fastdistill.distill.methods.discriminator import Discriminator
from fastdistill.distill.methods.distillation import Distillation, Setup
from fastdistill.distill.methods.losses import GanLoss, pseudo_huber
from fastdistill.distill.methods.rollout import Rollout, Visit
from fastdistill.distill.options import RolloutOptions, TrainingData
from fastdistill.errors import UserError
from fastdistill.run.options import at_least
from fastdistill.train.method import Loss

SEGMENT_MARGIN = 0.02
"""SenseFlow's distance of the middle of a segment from its ends (20 of 1000 times)."""


@dataclass(frozen=True, kw_only=True)
class DMD2Options(RolloutOptions):
    """Match the teacher's distribution where the few-step student samples, with a critic that
    follows it closely, and with a GAN."""

    critic_knows_step: bool = False
    """Tell the critic which of several steps a sample is from, by its input for guidance. Then each
    step has to match the teacher, and not only, as in the paper, all of them together."""
    gan_weight: float = 5e-3
    """Weight of the adversarial loss in the student's loss; 0: no GAN, and no data is needed."""
    gan_critic_weight: float = 1e-2
    """Weight of the discriminator's loss in the loss of the critic, whose features it reads."""
    gan_loss: GanLoss = "non_saturating"
    gan_depths: tuple[float, ...] = (0.5,)
    """Depths of the blocks whose features have a head: 0 the first block, 1 the last."""
    isg_weight: float = 0.0
    """Weight of intra-segment guidance: the distance between the student's jump and one by way of
    the teacher (SenseFlow: 1)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 0, "gan_weight", "gan_critic_weight", "isg_weight")
        if self.critic_knows_step and self.guidance_range is not None:
            raise UserError(
                "--critic-knows-step uses the critic's input for guidance: give one scale, or --no-critic-knows-step"
            )
        if not self.gan_depths or not all(0 <= depth <= 1 for depth in self.gan_depths):
            raise UserError(f"--gan-depths are between 0, the first block, and 1, the last, got {self.gan_depths}")

    def idle(self) -> Mapping[str, Sequence[str]]:
        gan = ("gan_critic_weight", "gan_loss", "gan_depths")
        return super().idle() if self.gan_weight else {**super().idle(), "without --gan-weight": gan}

    @property
    def training_data(self) -> TrainingData:
        return "images" if self.gan_weight else super().training_data


class DMD2(Distillation):
    """Distribution matching without pairs, in several steps:

        L_student = L_matching + gan_weight L_G + isg_weight L_ISG          every critic_updates steps
        L_critic  = L_denoising + gan_critic_weight L_D                     every step
        L_heads   = L_D                                                     every step

    All three judge the student's `x_0` at one of its times (`Rollout`). The critic sees the samples
    of all steps as one distribution, so that the steps may share out the modes. With
    `critic_knows_step` each step is matched by itself; that is not in the paper.

    `L_G` and `L_D` read the critic's features of the sample and of data, each behind fresh noise
    (section 4.3). The role `discriminator` is the heads; the body is trained with the critic.

    Intra-segment guidance (`isg_weight`; SenseFlow) compares the student's jump from `t_k` to
    `t_k+1` with the teacher's to a random time between, `t_k+1 + 0.02 .. t_k - 0.02`, and the
    student's from there, by the pseudo-Huber loss.
    """

    Options = DMD2Options
    options: DMD2Options
    command_defaults = {"learning_rate": 5e-5, "betas": (0.0, 0.99), **FOLLOWING, "critic_knows_step": True}
    may_average_guidance = True
    trains: Sequence[str] = ("student", "critic")

    def __init__(
        self,
        options: DMD2Options,
        *,
        critic: nn.Module | None = None,
        heads: nn.Module | None = None,
        **setup: Unpack[Setup],
    ) -> None:
        super().__init__(options, **setup)
        self.critic = Critic.of(self.student, options, critic, knows_step=options.critic_knows_step and self.steps > 1)
        self.rollout = Rollout(self.student, self.teacher, self.times, options)
        self.stochastic_sampling = self.rollout.stochastic
        self.networks["critic"] = self.critic.network
        if options.gan_weight:
            self.discriminator = Discriminator(self.critic, options.gan_depths, options.gan_loss, heads)
            self.networks["discriminator"] = self.discriminator.heads
            self.trains = ("student", "critic", "discriminator")
        if options.ida_decay is not None:
            self.critic.check_alignable(self.student)
        if options.isg_weight:
            self.teacher.check_determined(self.times)

    def turns(self, step: int) -> Sequence[str]:
        return two_time_scales(self.trains, step, self.options.critic_updates)

    def before_step(self, step: int, rng: torch.Generator) -> None:
        self.rollout.agree(rng)

    def after_step(self, step: int) -> None:
        if self.options.ida_decay is not None and "student" in self.turns(step):
            self.critic.align(self.student, self.options.ida_decay)

    def loss(self, role: str, batch: LatentBatch, rng: torch.Generator) -> Loss:
        if role == "student":
            visit, x_0 = self.rollout.sample(batch, rng)
            return self._student_loss(visit, x_0, batch.conditioning, rng)
        visit, x_0 = self.rollout.sample_to_judge(batch, rng)
        told = self.critic.told(visit)
        if role == "discriminator":
            return Loss(total=self.discriminator.loss(batch, x_0, told, rng))
        denoising = self.critic.denoising_loss(x_0, batch.conditioning, told, rng)
        if not self.options.gan_weight:
            return denoising
        gan = self.discriminator.loss(batch, x_0, told, rng)
        return Loss(
            total=denoising.total + self.options.gan_critic_weight * gan,
            logs={"denoising": denoising.total, "gan": gan},
        )

    def _student_loss(self, visit: Visit, x_0: Tensor, conditioning: Any, rng: torch.Generator) -> Loss:
        told = self.critic.told(visit)
        point = self.critic.noised(x_0, conditioning, visit.scale, rng)
        terms = {"matching": self.critic.difference(point, self.teacher, told)}
        total = terms["matching"]
        if self.options.gan_weight:
            terms["gan"] = self.discriminator.generator_loss(x_0, conditioning, told, rng)
            total = total + self.options.gan_weight * terms["gan"]
        if self.options.isg_weight:
            terms["isg"] = self._segment_loss(visit, x_0, conditioning, rng)
            total = total + self.options.isg_weight * terms["isg"]
        return Loss(total=total, logs=terms)

    def _segment_loss(self, visit: Visit, x_0: Tensor, conditioning: Any, rng: torch.Generator) -> Tensor:
        x_t, t, s = visit.x_t, visit.t, self.rollout.end(visit)
        with torch.no_grad():
            # Narrow segments, of many steps or a strong shift, keep half of their width.
            margin = torch.minimum(torch.full_like(s, SEGMENT_MARGIN), (t - s) / 4)
            middle = s + margin + (t - s - 2 * margin) * torch.rand(len(t), generator=rng, device=rng.device).to(t)
            x_middle = self.process.ddim_step(
                x_t, self.teacher.guided(x_t, t, conditioning, Prediction.X0, visit.scale), t, middle
            )
            x_0_middle = self.student.predict(x_middle, middle, conditioning, Prediction.X0, visit.scale)
            target = self.process.ddim_step(x_middle, x_0_middle, middle, s)
        return pseudo_huber(self.process.ddim_step(x_t, x_0, t, s), target)
