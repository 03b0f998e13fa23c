"""Trajectory distribution matching (TDM; Luo et al. 2025, arXiv 2503.06674)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from typing_extensions import Self, Unpack

from fastdistill.data.latents import LatentBatch
from fastdistill.diffusion.prediction import Prediction, convert
from fastdistill.diffusion.process import expand_time, noise_like
from fastdistill.distill.methods.critic import FOLLOWING, Critic, Point, two_time_scales
from fastdistill.distill.methods.distillation import Distillation, Setup
from fastdistill.distill.methods.losses import weighted_mse
from fastdistill.distill.methods.rollout import Rollout, Visit
from fastdistill.distill.options import RolloutOptions
from fastdistill.errors import UserError
from fastdistill.train.method import Loss


@dataclass(frozen=True, kw_only=True)
class TDMOptions(RolloutOptions):
    """Match the teacher's distribution at every step of the student's way from noise to data, where
    the scores are compared at times between those of the step; they are counted from 0, its end, to
    1, its start. Needs no data."""

    critic_target: Literal["x_0", "score"] = "x_0"
    """Target of the critic: the mean of the student's x_0, which varies little (TDM), or the score
    of its states, which is exact in the limit of long training."""

    def resolved(self, steps: int, training_steps: int) -> Self:
        if steps == 1:
            raise UserError(
                "TDM matches the states between a student's steps, of which one step has none; "
                "for one step choose dmd, progressive or reflow"
            )
        return super().resolved(steps, training_steps)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.time_low == 0:
            raise UserError(
                "scores are compared behind noise, of which the end of the last step has none: "
                "give a --time-low above 0"
            )


@dataclass(frozen=True, kw_only=True)
class Between:
    """State at which scores are compared: `x_u` (B, ...) at `u` (B,), and the critic's `target` (B,
    ...) there with its `weight` (B,)."""

    x_u: Tensor
    u: Tensor
    target: Tensor
    weight: Tensor


class TDM(Distillation):
    """Distribution matching at every state of the student's own way from noise to data:

        L_student = L_matching                 every critic_updates steps
        L_critic  = L_denoising                every step

    DMD2 asks of the `x_0` of every step that it be the data, in the first step too. Here the state
    `x_s` to which a step leads from `t` has to be distributed as the teacher's at `s`: few steps
    share the work, and a student that starts as the teacher is near its goal. Teacher and critic
    are compared behind more noise, at times `s < u < t`, where the process goes on from `x_s`:

        x_u = k x_s + r eps          k = alpha_u / alpha_s          r^2 = sigma_u^2 - k^2 sigma_s^2

    The steps' intervals do not overlap, so that the time tells the critic the step.

    The critic learns the mean of the student's `x_0` there. It varies little, and is a little off:
    `x_u` holds noise of `x_s`, which is not independent of `x_0`, so that its mean is not the
    student's score. With `critic_target="score"` it learns that: given `x_s` the score is `-eps /
    r`, or as data `x_s / alpha_s - n eps` with `n = k sigma_s^2 / (alpha_s r)`, to be weighted by
    `1 / (1 + n^2)`, as it varies without bounds towards `s` (denoising score matching within an
    interval, as in Phased DMD, arXiv 2510.27684). A student of a Gaussian in four steps has 17 %
    too much variance by the one, and 2 % too little by the other.

    A student that is sampled with new noise at each step (`rollout="sde"`) has no such bias. In one
    step, `s = 0` and `n = 0`, this is DMD2 without a GAN, whose critic is trained at the times of
    matching; the command refuses that.
    """

    Options = TDMOptions
    options: TDMOptions
    command_defaults = {
        "learning_rate": 5e-5,
        "betas": (0.0, 0.99),
        "training_steps": 100,
        "watch_every": 20,
        **FOLLOWING,
    }
    may_average_guidance = True
    trains: Sequence[str] = ("student", "critic")

    def __init__(self, options: TDMOptions, *, critic: nn.Module | None = None, **setup: Unpack[Setup]) -> None:
        super().__init__(options, **setup)
        self.critic = Critic.of(self.student, options, critic)
        self.rollout = Rollout(self.student, self.teacher, self.times, options)
        self.stochastic_sampling = self.rollout.stochastic
        self.networks["critic"] = self.critic.network
        if options.ida_decay is not None:
            self.critic.check_alignable(self.student)

    def turns(self, step: int) -> Sequence[str]:
        return two_time_scales(self.trains, step, self.options.critic_updates)

    def before_step(self, step: int, rng: torch.Generator) -> None:
        self.rollout.agree(rng)

    def after_step(self, step: int) -> None:
        if self.options.ida_decay is not None and "student" in self.turns(step):
            self.critic.align(self.student, self.options.ida_decay)

    def loss(self, role: str, batch: LatentBatch, rng: torch.Generator) -> Loss:
        if role == "critic":
            visit, x_0 = self.rollout.sample_to_judge(batch, rng)
            at = self.between(visit, x_0, rng)
            found = self.critic.predict(at.x_u, at.u, batch.conditioning, self.critic.compared, visit.scale)
            target = convert(at.target, at.x_u, at.u, self.process, Prediction.X0, self.critic.compared)
            return Loss(total=weighted_mse(found, target, at.weight))
        visit, x_0 = self.rollout.sample(batch, rng)
        at = self.between(visit, x_0.detach(), rng)
        # The noise that x_u is made of, if x_0 is the data in it.
        noise = convert(x_0.detach(), at.x_u, at.u, self.process, Prediction.X0, Prediction.EPSILON)
        point = Point(x_0=x_0, noise=noise, x_t=at.x_u, t=at.u, conditioning=batch.conditioning, scale=visit.scale)
        return Loss(total=self.critic.difference(point, self.teacher, told=visit.scale))

    def between(self, visit: Visit, x_0: Tensor, rng: torch.Generator) -> Between:
        """Time of the student's step at `visit`, in which it sees `x_0` (B, ...), and the state
        behind noise there."""
        eps, s = noise_like(x_0, rng), self.rollout.end(visit)
        u = s + (visit.t - s) * self.critic.times(len(s), rng).to(s)
        plain = torch.ones_like(u)
        if self.rollout.stochastic:
            # The step's noise is new, and so is all noise in x_u.
            return Between(x_u=self.process.add_noise(x_0, eps, u), u=u, target=x_0, weight=plain)
        x_s = self.process.ddim_step(visit.x_t, x_0, visit.t, s)
        (alpha_s, sigma_s), (alpha_u, sigma_u) = (self._scales(time, x_0) for time in (s, u))
        k = alpha_u / alpha_s
        r = (sigma_u**2 - (k * sigma_s) ** 2).sqrt()
        x_u = k.to(x_0) * x_s + r.to(x_0) * eps
        if self.options.critic_target == "x_0":
            return Between(x_u=x_u, u=u, target=x_0, weight=plain)
        n = k * sigma_s**2 / (alpha_s * r)
        target = (1 / alpha_s).to(x_0) * x_s - n.to(x_0) * eps
        return Between(x_u=x_u, u=u, target=target, weight=1 / (1 + n.flatten() ** 2))

    def _scales(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        time = expand_time(t, like)
        return self.process.alpha(time), self.process.sigma(time)
