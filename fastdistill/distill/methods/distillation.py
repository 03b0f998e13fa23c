"""What all methods have in common: networks by role, called under their guidance and compared in one prediction."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, TypedDict

import torch
from torch import Tensor, nn
from typing_extensions import Required

from fastdistill.diffusion.guidance import guide
from fastdistill.diffusion.prediction import Prediction, convert
from fastdistill.diffusion.process import Process, RectifiedFlow
from fastdistill.diffusion.timesteps import LogitNormal, Shifted, TimeDistribution, Uniform, few_step_times
from fastdistill.distill.options import MethodOptions, TimesName
from fastdistill.errors import UserError
from fastdistill.models.families.family import Predicts
from fastdistill.models.guidance_embedder import embeds_guidance, with_scale
from fastdistill.train.method import Loss, StudentMethod


class Setup(TypedDict, total=False):
    """The arguments that every method takes; :class:`Distillation` says what they are."""

    student: Required[nn.Module]
    teacher: Required[nn.Module]
    family: Required[Predicts]
    steps: Required[int]
    process: Process
    shift: float
    unconditional: Any
    teacher_prediction: Prediction
    student_prediction: Prediction


def time_distribution(name: TimesName, shift: float, *, low: float = 0.0, high: float = 1.0) -> TimeDistribution:
    """The times that an option names, under ``shift``; ``low`` and ``high`` bound uniform ones before it."""
    return Shifted(base=Uniform(low=low, high=high) if name == "uniform" else LogitNormal(), shift=shift)


@torch.no_grad()
def follow(follower: nn.Module, leader: nn.Module, decay: float) -> None:
    """``follower <- decay follower + (1 - decay) leader``, parameter by parameter."""
    pair: list[list[Tensor]] = [list(network.parameters()) for network in (follower, leader)]
    torch._foreach_lerp_(pair[0], pair[1], 1 - decay)


def without_prefix(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The entries of ``state`` that begin with ``prefix``, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


class Distillation(StudentMethod, ABC):
    """A :class:`~fastdistill.train.method.Method` that teaches a student to be sampled in ``steps`` steps.

    Args:
        student: of the teacher's family, of any size.
        family: calls every network. Those of a :class:`~fastdistill.models.families.family.Family` predict the velocity of rectified flow.
        steps: the student is for ``few_step_times(steps, shift)``, which is how ``FlowMatchEulerDiscreteScheduler`` samples it.
        unconditional: the conditioning of the empty prompt, of one sample, for classifier-free guidance of the teacher: anything
            that ``unconditional[rows]`` repeats, as a :class:`~fastdistill.models.families.family.Conditioning` or a tensor of labels.
        teacher_prediction: what the teacher's output means.
        student_prediction: what the student's means, and that of networks that are copies of it.

    Raises:
        UserError: arguments and options do not go together; the message says what to do.
    """

    stochastic_sampling = False
    """How the student is to be sampled: the option of ``FlowMatchEulerDiscreteScheduler`` by which each step brings new noise."""
    may_average_guidance = False
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
        self.networks: dict[str, nn.Module] = {"student": student, "teacher": teacher}
        self.predictions = {"student": student_prediction, "teacher": teacher_prediction}
        self.family, self.process, self.unconditional = family, process, unconditional
        self.steps, self.shift = steps, shift
        self.times = few_step_times(steps, shift)
        self.guidance = options
        self._trainable: dict[str, list[nn.Parameter]] = {}
        self._check_guidance()
        self.check_determined("student", self.times)

    @abstractmethod
    def role_loss(self, role: str, batch: Any, rng: torch.Generator) -> Loss:
        """The loss of ``role``, whose parameters alone require gradients during the call."""

    def loss(self, role: str, batch: Any, rng: torch.Generator) -> Loss:
        self._train_only(role)
        return self.role_loss(role, batch, rng)

    def state_dict(self) -> Mapping[str, Tensor]:
        """What a checkpoint needs beside the trained roles."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from what :meth:`state_dict` returned, or from nothing."""
        if state:
            raise ValueError(f"{type(self).__name__} keeps no state, got {', '.join(state)}")

    def predict(self, role: str, x_t: Tensor, t: Tensor, conditioning: Any, prediction: Prediction, scale: Tensor | None = None) -> Tensor:
        """The output of ``role`` at ``x_t`` (B, ...) and ``t`` (B,), as a ``prediction``.

        ``scale`` (B,) is the embedded guidance of a network that takes it, by default ``guidance_scale``.
        """
        network = self.networks[role]
        conditioning = with_scale(conditioning, network, self.default_scale(x_t) if scale is None else scale)
        return convert(self.family.predict(network, x_t, t, conditioning), x_t, t, self.process, self.predictions[role], prediction)

    def teach(self, x_t: Tensor, t: Tensor, conditioning: Any, prediction: Prediction, scale: Tensor | None = None) -> Tensor:
        """The guided teacher's ``prediction`` (B, ...), a constant."""
        conditional, unconditional, weight = self.teach_apart(x_t, t, conditioning, prediction, scale)
        return conditional if unconditional is None else guide(unconditional, conditional, weight)

    @torch.no_grad()
    def teach_apart(
        self, x_t: Tensor, t: Tensor, conditioning: Any, prediction: Prediction, scale: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None, float | Tensor]:
        """The teacher's conditional and unconditional predictions, and the ``w`` that combines them: ``u + w (c - u)``.

        Args:
            scale: (B,), from :meth:`draw_scale`; by default the options' scales.
        """
        embedded, weight = scale, self.guidance.true_cfg_scale if scale is None or embeds_guidance(self.networks["teacher"]) else scale
        conditional = self.predict("teacher", x_t, t, conditioning, prediction, embedded)
        if not isinstance(weight, Tensor) and weight == 1:
            return conditional, None, weight
        rows = torch.zeros(x_t.shape[0], dtype=torch.long, device=x_t.device)
        return conditional, self.predict("teacher", x_t, t, self.unconditional[rows], prediction, embedded), weight

    def draw_scale(self, like: Tensor, rng: torch.Generator) -> Tensor | None:
        """A guidance scale for each sample of ``like`` (B, ...), if there is a range to draw from."""
        if self.guidance.guidance_range is None:
            return None
        low, high = self.guidance.guidance_range
        return (low + (high - low) * torch.rand(like.shape[0], generator=rng, device=rng.device)).to(like.device)

    def default_scale(self, like: Tensor) -> Tensor:
        """``guidance_scale`` for each sample of ``like`` (B, ...)."""
        return torch.full((like.shape[0],), self.guidance.guidance_scale, device=like.device)

    def check_determined(self, role: str, times: Tensor) -> None:
        """Raise :class:`UserError` if the output of ``role`` does not tell ``x_0`` at one of ``times``."""
        prediction, times = self.predictions[role], times.double()
        a, b = prediction.coefficients(self.process, times)
        if not bool((a * self.process.sigma(times) - b * self.process.alpha(times)).all()):
            raise UserError(
                f"the {role} predicts {prediction.value}, which says nothing about the data where there is only noise, as at t = 1 of "
                f"{type(self.process).__name__}; few-step sampling starts there, so it has to predict the velocity, v or x0"
            )

    def at(self, time: Tensor, like: Tensor) -> Tensor:
        """One time () of a grid for every sample of ``like`` (B, ...)."""
        return time.to(like.device).expand(like.shape[0])

    def _train_only(self, role: str) -> None:
        """Leave gradients to ``role``: the loss of one may lead through others, whose optimizers must not see it.

        They stay off until the next call, as a recomputed forward pass (gradient checkpointing) has to find what the first one found.
        """
        if not self._trainable:
            # On the first call, as it is the trainer that says which parameters are frozen.
            self._trainable = {name: [p for p in self.networks[name].parameters() if p.requires_grad] for name in self.trains}
        for name, parameters in self._trainable.items():
            for parameter in parameters:
                parameter.requires_grad_(name == role)

    def _check_guidance(self) -> None:
        options, student, teacher = self.guidance, self.networks["student"], self.networks["teacher"]
        ranged = options.guidance_range is not None
        by_rule = options.true_cfg_scale != 1 or (ranged and not embeds_guidance(teacher))
        if by_rule and self.unconditional is None:
            raise UserError(
                "classifier-free guidance needs what the teacher predicts for the empty prompt: give its conditioning as "
                "unconditional=, or set true_cfg_scale to 1 and no guidance_range"
            )
        if ranged and not embeds_guidance(student) and not self.may_average_guidance:
            raise UserError(
                "a guidance_range needs a student that takes the scale: build one with fastdistill.models.guidance_embedder."
                "with_guidance_embedder, or give one scale as true_cfg_scale or guidance_scale"
            )
