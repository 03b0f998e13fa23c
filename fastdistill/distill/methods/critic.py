"""The critic of distribution matching: a network that follows the distribution of the student's
samples (the papers' fake score)."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastdistill.data.latents import LatentBatch
from fastdistill.diffusion.guidance import guide
from fastdistill.diffusion.prediction import Prediction
from fastdistill.diffusion.process import RectifiedFlow
from fastdistill.diffusion.timesteps import TimeDistribution
from fastdistill.distill.methods.denoiser import Denoiser, Teacher
from fastdistill.distill.methods.distillation import follow, time_distribution
from fastdistill.distill.methods.rollout import Visit
from fastdistill.distill.options import MatchingOptions
from fastdistill.errors import UserError
from fastdistill.models.guidance_embedder import embeds_guidance, with_guidance_embedder
from fastdistill.ops import dmd_loss
from fastdistill.train.denoising import Denoising
from fastdistill.train.method import Loss


@dataclass(frozen=True, kw_only=True)
class Point:
    """Point at which teacher and critic are compared: `x_t = alpha x_0 + sigma noise` (B, ...) at
    `t` (B,), under one conditioning."""

    x_0: Tensor
    """Sample of the student (B, ...), with its gradient."""
    noise: Tensor
    x_t: Tensor
    t: Tensor
    conditioning: Any
    scale: Tensor | None
    """Guidance scale of the teacher (B,), from its range."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Critic(Denoiser):
    """Network that learns to denoise the student's samples, so that the difference to the teacher
    says where these have to go.

    The student descends the KL divergence of its noised samples from the teacher's, along the
    difference of two scores. With `x` a sample of the student, `x_t = alpha x + sigma eps` and
    `x_0_critic`, `x_0_teacher` the data that the critic and the guided teacher see in it, the
    gradient in `x` is (Yin et al. 2024, arXiv 2311.18828, equations 7 and 8):

        g = (x_0_critic - x_0_teacher) / mean |x - x_0_teacher|

    It is the same in any prediction, as the factor between two predictions cancels.

    The critic sees the samples of all steps as one distribution, so that the steps may share out
    the modes. One that `knows_step` is given the time of the step as guidance, which it has no
    other use for.
    """

    options: MatchingOptions
    knows_step: bool
    times: TimeDistribution
    """Times at which the student is compared."""
    all_times: TimeDistribution
    """Times at which the critic is trained; not bounded, as it has to know what every time looks
    like (DMD2's main/sd_guidance.py)."""

    @classmethod
    def of(
        cls, student: Denoiser, options: MatchingOptions, network: nn.Module | None, *, knows_step: bool = False
    ) -> Critic:
        """Critic of `student`, by default a copy of it, which starts as a diffusion model;
        `network` must take what the student does.

        Raises:
            UserError: `network` takes guidance and the student does not, or the other way round.
        """
        network = copy.deepcopy(student.network) if network is None else network
        if knows_step and not embeds_guidance(network):
            network = with_guidance_embedder(network)
        if not knows_step and embeds_guidance(network) != embeds_guidance(student.network):
            raise UserError(
                "the critic takes guidance as the student does: give critic= of the student's kind, or leave it out"
            )
        return cls(
            role="critic",
            network=network,
            prediction=student.prediction,
            family=student.family,
            process=student.process,
            guidance_scale=student.guidance_scale,
            options=options,
            knows_step=knows_step,
            times=time_distribution(options.times, options.time_shift, low=options.time_low, high=options.time_high),
            all_times=time_distribution(options.times, options.time_shift),
        )

    @property
    def compared(self) -> Prediction:
        """Prediction that is compared: the velocity on rectified flow, the noise on others; both
        are finite at all times."""
        return Prediction.VELOCITY if isinstance(self.process, RectifiedFlow) else Prediction.EPSILON

    def told(self, visit: Visit) -> Tensor | None:
        """Guidance (B,) that the critic is given for samples from `visit`."""
        return visit.t if self.knows_step else visit.scale

    def noised(self, x_0: Tensor, conditioning: Any, scale: Tensor | None, rng: torch.Generator) -> Point:
        """`x_0` (B, ...) behind fresh noise, at times of the comparison."""
        x_t, t, noise = self.process.draw(x_0.detach(), self.times, rng)
        return Point(x_0=x_0, noise=noise, x_t=x_t, t=t, conditioning=conditioning, scale=scale)

    def difference(self, point: Point, teacher: Teacher, told: Tensor | None) -> Tensor:
        """`mean(g^2) / 2` with the gradient `g / numel` in `point.x_0`; the critic is given `told`
        (B,) as guidance."""
        with torch.no_grad():
            real, unconditional, weight = teacher.apart(
                point.x_t, point.t, point.conditioning, self.compared, point.scale
            )
            critic = self.predict(point.x_t, point.t, point.conditioning, self.compared, told)
            if unconditional is not None and isinstance(weight, Tensor):
                # The operator takes one scale for all.
                real, unconditional, weight = guide(unconditional, real, weight), None, 1.0
        return dmd_loss(
            point.x_0,
            point.noise,
            real,
            unconditional,
            critic,
            guidance=float(weight),
            prediction="velocity" if self.compared is Prediction.VELOCITY else "eps",
            normaliser=self.options.normaliser,
        )

    def denoising_loss(self, x_0: Tensor, conditioning: Any, told: Tensor | None, rng: torch.Generator) -> Loss:
        """Loss of the critic on the student's samples `x_0` (B, ...), a constant, with `told` (B,)
        as guidance."""
        # A score's own error is infinite towards t = 0.
        error_in = Prediction.EPSILON if self.prediction is Prediction.SCORE else self.prediction
        training = Denoising(self.network, self.family, self.process, self.prediction, self.all_times, error_in)
        batch = LatentBatch(latents=x_0.detach(), conditioning=self.with_guidance(conditioning, x_0, told))
        return training.loss("student", batch, rng)

    def align(self, student: Denoiser, decay: float) -> None:
        """Implicit distribution alignment: `critic <- decay critic + (1 - decay) student`
        (SenseFlow, arXiv 2506.00523)."""
        follow(self.network, student.network, decay)

    def check_alignable(self, student: Denoiser) -> None:
        """Raise `UserError` if the student's weights cannot be mixed into the critic's."""
        if _shapes(student.network) != _shapes(self.network):
            raise UserError(
                "ida_decay mixes the student's weights into the critic's, which needs two equal networks: "
                "leave out critic="
            )


FOLLOWING: Mapping[str, Any] = {"critic_learning_rate": 4e-4, "critic_updates": 2}
"""Defaults of the command by which the critic keeps up with its student: see docs/distillation.md
for the evidence."""


def two_time_scales(trains: Sequence[str], step: int, critic_updates: int) -> Sequence[str]:
    """Roles with a turn in `step`: all of `trains` in every `critic_updates`-th, else all but the
    first, the student (DMD2)."""
    return trains if step % critic_updates == 0 else trains[1:]


def _shapes(network: nn.Module) -> list[tuple[str, torch.Size]]:
    return [(name, parameter.shape) for name, parameter in network.named_parameters()]
