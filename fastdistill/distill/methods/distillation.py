"""The base of all methods: a student and a guided teacher, in one prediction, for sampling in few
steps."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, TypedDict

import torch
from torch import Tensor, nn
from typing_extensions import Required

from fastdistill.diffusion.prediction import Prediction
from fastdistill.diffusion.process import Process, RectifiedFlow
from fastdistill.diffusion.timesteps import LogitNormal, Shifted, TimeDistribution, Uniform, few_step_times
from fastdistill.distill.methods.denoiser import Denoiser, Teacher
from fastdistill.distill.options import MethodOptions, TimesName
from fastdistill.errors import UserError
from fastdistill.models.families.family import Predicts
from fastdistill.models.guidance_embedder import embeds_guidance
from fastdistill.train.method import Loss, StudentMethod


class Setup(TypedDict, total=False):
    """Arguments that every method takes; `Distillation` says what they are."""

    student: Required[nn.Module]
    teacher: Required[nn.Module]
    family: Required[Predicts]
    steps: Required[int]
    process: Process
    shift: float
    unconditional: Any
    teacher_prediction: Prediction
    student_prediction: Prediction


class Distillation(StudentMethod, ABC):
    """A `Method` that teaches a student to be sampled in `steps` steps.

    A method states its `Options` and a `loss`, composed of parts: `self.student`, `self.teacher`,
    and where it needs them a `Critic`, a `Rollout`, a `Discriminator`.

    Args:
        student: of the teacher's family, of any size.
        family: calls every network. The networks of a `Family` predict the velocity of rectified
            flow.
        steps: the student is for `few_step_times(steps, shift)`, which is how
            `FlowMatchEulerDiscreteScheduler` samples it.
        unconditional: the conditioning of the empty prompt, of one sample, for classifier-free
            guidance of the teacher: anything that `unconditional[rows]` repeats, as a
            `Conditioning` or a tensor of labels.
        teacher_prediction: what the teacher's output means.
        student_prediction: what the student's output means, and that of networks that are copies of
            it.

    Raises:
        UserError: arguments and options do not go together; the message says what to do.
    """

    Options: ClassVar[type[MethodOptions]]
    """The options that the method takes, and that the command offers for it."""
    command_defaults: ClassVar[Mapping[str, Any]] = {}
    """Defaults of the command for this method, by option of training or of the method, where they
    depart from the general ones."""
    stochastic_sampling: bool = False
    """Sampling of the student: the option of `FlowMatchEulerDiscreteScheduler` by which
    each step brings new noise."""
    may_average_guidance: ClassVar[bool] = False
    """Whether guidance from a range makes sense for a student that is not told the scale."""

    def __init__(
        self,
        options: MethodOptions,
        *,
        student: nn.Module,
        teacher: nn.Module,
        family: Predicts,
        steps: int,
        process: Process = RectifiedFlow(),
        shift: float = 1.0,
        unconditional: Any = None,
        teacher_prediction: Prediction = Prediction.VELOCITY,
        student_prediction: Prediction = Prediction.VELOCITY,
    ) -> None:
        options.check_steps(steps)
        self.options: MethodOptions = options
        self.process, self.steps, self.shift = process, steps, shift
        self.times = few_step_times(steps, shift)
        self.networks: dict[str, nn.Module] = {"student": student, "teacher": teacher}
        self.student = Denoiser(
            role="student",
            network=student,
            prediction=student_prediction,
            family=family,
            process=process,
            guidance_scale=options.guidance_scale,
        )
        self.teacher = Teacher(
            role="teacher",
            network=teacher,
            prediction=teacher_prediction,
            family=family,
            process=process,
            guidance_scale=options.guidance_scale,
            true_cfg_scale=options.true_cfg_scale,
            guidance_range=options.guidance_range,
            unconditional=unconditional,
        )
        self._check_guidance()
        self.student.check_determined(self.times)

    @abstractmethod
    def loss(self, role: str, batch: Any, rng: torch.Generator) -> Loss:
        """Loss of `role` on `batch`; all randomness comes from `rng`."""

    def state_dict(self) -> Mapping[str, Tensor]:
        """State that a checkpoint needs in addition to the trained roles."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from what `state_dict` returned, or from nothing."""
        if state:
            raise ValueError(f"{type(self).__name__} keeps no state, got {', '.join(state)}")

    def _check_guidance(self) -> None:
        if self.teacher.guided_by_rule and self.teacher.unconditional is None:
            raise UserError(
                "classifier-free guidance needs what the teacher predicts for the empty prompt: "
                "give its conditioning as unconditional=, or set true_cfg_scale to 1 and no guidance_range"
            )
        if (
            self.options.guidance_range is not None
            and not embeds_guidance(self.student.network)
            and not self.may_average_guidance
        ):
            raise UserError(
                "a guidance_range needs a student that takes the scale: build one with "
                "fastdistill.models.guidance_embedder."
                "with_guidance_embedder, or give one scale as true_cfg_scale or guidance_scale"
            )


def time_distribution(name: TimesName, shift: float, *, low: float = 0.0, high: float = 1.0) -> TimeDistribution:
    """Times that an option names, under `shift`; `low` and `high` bound uniform ones before it."""
    return Shifted(base=Uniform(low=low, high=high) if name == "uniform" else LogitNormal(), shift=shift)


@torch.no_grad()
def follow(follower: nn.Module, leader: nn.Module, decay: float) -> None:
    """`follower <- decay follower + (1 - decay) leader`, parameter by parameter."""
    pair: list[list[Tensor]] = [list(network.parameters()) for network in (follower, leader)]
    torch._foreach_lerp_(pair[0], pair[1], 1 - decay)


def without_prefix(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Entries of `state` that begin with `prefix`, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
