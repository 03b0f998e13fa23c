"""The options of every method. Imports no torch, so that `--help` answers at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, TypeVar

import tyro
from typing_extensions import Self

from fastdistill.errors import UserError
from fastdistill.run.options import at_least, positive

TrainingData = Literal["pairs", "images", "prompts"]
ValueT = TypeVar("ValueT")
Known = Annotated[ValueT, tyro.conf.Fixed, tyro.conf.Suppress]
"""No flag of the command, which knows it from other options."""


@dataclass(frozen=True, kw_only=True)
class MethodOptions:
    """Guidance of the teacher while it teaches. By default the student learns the guided field as
    its own."""

    true_cfg_scale: Known[float] = 1.0
    """Classifier-free guidance of the teacher, u + w (c - u); 1 is off."""
    guidance_scale: Known[float] = 3.5
    """Embedded guidance of each network that takes it."""
    guidance_range: tuple[float, float] | None = None
    """Draw the scale of each sample evenly from this range: the embedded one of a teacher that
    takes it, else the classifier-free one. The student learns to follow it, and must take guidance."""

    def __post_init__(self) -> None:
        at_least(self, 0, "true_cfg_scale", "guidance_scale", "guidance_range")
        if self.guidance_range is not None and not self.guidance_range[0] <= self.guidance_range[1]:
            raise UserError(
                f"--guidance-range goes from low to high, got {self.guidance_range[0]:g} to {self.guidance_range[1]:g}"
            )

    @property
    def training_data(self) -> TrainingData:
        """Data to train on: pairs of noise and the teacher's image from it, images of any origin,
        or nothing but prompts."""
        return "images"

    @property
    def learning_rates(self) -> Mapping[str, float]:
        """Learning rate of each role that has one of its own."""
        return {}

    def idle(self) -> Mapping[str, Sequence[str]]:
        """Names of options that do nothing next to the others, by the reason."""
        return {}

    def check_steps(self, steps: int) -> None:
        """Raise `UserError` if the method does not make a student of so many steps."""
        if steps < 1:
            raise UserError(f"a student is sampled in at least one step, got {steps}")

    def resolved(self, steps: int, training_steps: int) -> Self:
        """Options for a student of `steps` that is trained for `training_steps`."""
        self.check_steps(steps)
        return self


TimesName = Literal["uniform", "logit_normal"]
RolloutName = Literal["ode", "sde"]


@dataclass(frozen=True, kw_only=True)
class MatchingOptions(MethodOptions):
    """Distribution matching, of DMD and DMD2."""

    times: TimesName = "uniform"
    """Times at which scores are compared: uniform (DMD, DMD2) or logit_normal (SenseFlow)."""
    time_low: float = 0.02
    time_high: float = 0.98
    """The uniform times lie between these two, before the shift."""
    time_shift: float = 1.0
    """Moves the times towards noise if above 1."""
    normaliser: Literal["sample", "batch", "none"] = "sample"
    """The mean that divides the difference of the scores: over each sample, over the batch, or
    none."""
    critic_learning_rate: float | None = None
    """Learning rate of the critic, and of the discriminator that reads its features; default: the
    student's."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.time_low < self.time_high <= 1:
            raise UserError(
                f"--time-low and --time-high: 0 <= low < high <= 1, got {self.time_low:g} and {self.time_high:g}"
            )
        positive(self, "time_shift", "critic_learning_rate")

    def idle(self) -> Mapping[str, Sequence[str]]:
        return {"with --times logit_normal": ("time_low", "time_high")} if self.times == "logit_normal" else {}

    @property
    def learning_rates(self) -> Mapping[str, float]:
        rate = self.critic_learning_rate
        return {} if rate is None else {"critic": rate, "discriminator": rate}


@dataclass(frozen=True, kw_only=True)
class RolloutOptions(MatchingOptions):
    """Distribution matching where the few-step student samples, of DMD2 and TDM."""

    critic_updates: int = 5
    """Updates of the critic for each of the student (the two time scales)."""
    backward_simulation: float = 1.0
    """Share of the student's training on the states that its own sampling visits, instead of noised
    data: 1 is DMD2, 0.5 SenseFlow."""
    rollout: RolloutName = "ode"
    """Steps of the student from time to time: ode, as FlowMatchEulerDiscreteScheduler does by
    default, or sde, with new noise at each step, as it does with stochastic_sampling."""
    ida_decay: float | None = None
    """Implicit distribution alignment: after each of the student's updates the critic keeps this
    much of itself and takes the rest from the student (SenseFlow: 0.97)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "critic_updates")
        if not 0 <= self.backward_simulation <= 1:
            raise UserError(f"--backward-simulation is a probability, got {self.backward_simulation:g}")
        if self.ida_decay is not None and not 0 <= self.ida_decay <= 1:
            raise UserError(f"--ida-decay is between 0 and 1, got {self.ida_decay:g}")

    def idle(self) -> Mapping[str, Sequence[str]]:
        found = super().idle()
        return found if self.backward_simulation else {**found, "without --backward-simulation": ("rollout",)}

    @property
    def training_data(self) -> TrainingData:
        return "images" if self.backward_simulation < 1 else "prompts"
