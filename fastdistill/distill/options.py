"""The options of every method. Imports no torch, so that ``--help`` answers at once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Literal, TypeVar

import tyro
from typing_extensions import Self

from fastdistill.errors import UserError
from fastdistill.run.options import at_least

TrainingData = Literal["pairs", "images", "prompts"]
ValueT = TypeVar("ValueT")
Known = Annotated[ValueT, tyro.conf.Fixed, tyro.conf.Suppress]
"""No flag of the command, which knows it from other options."""


@dataclass(frozen=True, kw_only=True)
class MethodOptions:
    """What every method asks: how the teacher is guided while it teaches. By default the student learns the guided field as its own."""

    true_cfg_scale: Known[float] = 1.0
    """Classifier-free guidance of the teacher, u + w (c - u); 1 is off."""
    guidance_scale: Known[float] = 3.5
    """Embedded guidance of each network that takes it."""
    guidance_range: tuple[float, float] | None = None
    """Draw the scale of each sample evenly from this range: the embedded one of a teacher that takes it, else the classifier-free one.
    The student learns to follow it, and must take guidance."""

    def __post_init__(self) -> None:
        if self.guidance_range is not None and not self.guidance_range[0] <= self.guidance_range[1]:
            raise UserError(f"--guidance-range goes from low to high, got {self.guidance_range[0]:g} to {self.guidance_range[1]:g}")

    @property
    def training_data(self) -> TrainingData:
        """What to train on: pairs of noise and the teacher's image from it, images of any origin, or nothing but prompts."""
        return "images"

    @property
    def learning_rates(self) -> Mapping[str, float]:
        """Of the roles that have one of their own."""
        return {}

    def check_steps(self, steps: int) -> None:
        """Raise :class:`UserError` if the method does not make a student of so many steps."""
        if steps < 1:
            raise UserError(f"a student is sampled in at least one step, got {steps}")

    def resolved(self, steps: int, training_steps: int) -> Self:
        """These for a student of ``steps`` that is trained for ``training_steps``."""
        self.check_steps(steps)
        return self


@dataclass(frozen=True, kw_only=True)
class OutputKDOptions(MethodOptions):
    """Imitate the teacher's output, which needs as many steps as the teacher's."""

    error_in: Literal["x0", "epsilon", "v", "score", "velocity"] = "velocity"
    """The prediction in which student and teacher are compared, which weighs the times."""


@dataclass(frozen=True, kw_only=True)
class GuidanceOptions(OutputKDOptions):
    """Build classifier-free guidance of any scale into a student that takes the scale as an input."""

    guidance_range: tuple[float, float] | None = (1.0, 8.0)


TimesName = Literal["uniform", "logit_normal"]
RolloutName = Literal["ode", "sde"]


@dataclass(frozen=True, kw_only=True)
class MatchingOptions(MethodOptions):
    """Distribution matching, of DMD and DMD2."""

    times: TimesName = "uniform"
    """Where scores are compared: uniform (DMD, DMD2) or logit_normal (SenseFlow)."""
    time_low: float = 0.02
    time_high: float = 0.98
    """The uniform times lie between these two, before the shift."""
    time_shift: float = 1.0
    """Moves the times towards noise if above 1."""
    normaliser: Literal["sample", "batch", "none"] = "sample"
    """The mean that divides the difference of the scores: over each sample, over the batch, or none."""
    critic_learning_rate: float | None = None
    """Of the critic, and of the discriminator that reads its features; default: the student's."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.time_low < self.time_high <= 1:
            raise UserError(f"--time-low and --time-high: 0 <= low < high <= 1, got {self.time_low:g} and {self.time_high:g}")
        if self.critic_learning_rate is not None and self.critic_learning_rate <= 0:
            raise UserError(f"--critic-learning-rate must be positive, got {self.critic_learning_rate:g}")

    @property
    def learning_rates(self) -> Mapping[str, float]:
        rate = self.critic_learning_rate
        return {} if rate is None else {"critic": rate, "discriminator": rate}


@dataclass(frozen=True, kw_only=True)
class DMDOptions(MatchingOptions):
    """Match the teacher's distribution in one step, held to pairs of noise and the teacher's sample."""

    regression_weight: float = 0.25
    """Of the distance to the teacher's sample from the same noise."""
    regression_loss: Literal["mse", "pseudo_huber"] = "mse"
    """That distance, in the latent space; the paper's is LPIPS between images."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 0, "regression_weight")

    @property
    def training_data(self) -> TrainingData:
        return "pairs"

    def check_steps(self, steps: int) -> None:
        if steps != 1:
            raise UserError(f"DMD distils into one step, not {steps}; choose tdm or dmd2 for more")


@dataclass(frozen=True, kw_only=True)
class RolloutOptions(MatchingOptions):
    """Distribution matching where the few-step student samples, of DMD2 and TDM."""

    critic_updates: int = 5
    """Updates of the critic for each of the student (the two time scales)."""
    backward_simulation: float = 1.0
    """How often the student trains on the states that its own sampling visits, instead of noised data: 1 is DMD2, 0.5 SenseFlow."""
    rollout: RolloutName = "ode"
    """How the student steps from time to time: ode, as FlowMatchEulerDiscreteScheduler does by default, or sde, with new noise at each
    step, as it does with stochastic_sampling."""
    ida_decay: float | None = None
    """Implicit distribution alignment: after each of the student's updates the critic keeps this much of itself and takes the rest from
    the student (SenseFlow: 0.97)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "critic_updates")
        if not 0 <= self.backward_simulation <= 1:
            raise UserError(f"--backward-simulation is a probability, got {self.backward_simulation:g}")
        if self.ida_decay is not None and not 0 <= self.ida_decay <= 1:
            raise UserError(f"--ida-decay is between 0 and 1, got {self.ida_decay:g}")

    @property
    def training_data(self) -> TrainingData:
        return "images" if self.backward_simulation < 1 else "prompts"


@dataclass(frozen=True, kw_only=True)
class DMD2Options(RolloutOptions):
    """Match the teacher's distribution where the few-step student samples, with a critic that follows it closely, and with a GAN."""

    critic_knows_step: bool = False
    """Tell the critic which of several steps a sample is from, by its input for guidance. Then each step has to match the teacher, and not
    only, as in the paper, all of them together."""
    gan_weight: float = 5e-3
    """Of the adversarial loss in the student's; 0: no GAN, and no data is needed."""
    gan_critic_weight: float = 1e-2
    """Of the discriminator's loss in that of the critic, whose features it reads."""
    gan_loss: Literal["non_saturating", "hinge"] = "non_saturating"
    gan_depths: tuple[float, ...] = (0.5,)
    """The blocks whose features have a head: 0 the first, 1 the last."""
    isg_weight: float = 0.0
    """Intra-segment guidance: of the distance between the student's jump and one by way of the teacher (SenseFlow: 1)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 0, "gan_weight", "gan_critic_weight", "isg_weight")
        if self.critic_knows_step and self.guidance_range is not None:
            raise UserError("--critic-knows-step uses the critic's input for guidance: give one scale, or --no-critic-knows-step")
        if not self.gan_depths or not all(0 <= depth <= 1 for depth in self.gan_depths):
            raise UserError(f"--gan-depths are between 0, the first block, and 1, the last, got {self.gan_depths}")

    @property
    def training_data(self) -> TrainingData:
        return "images" if self.gan_weight else super().training_data


@dataclass(frozen=True, kw_only=True)
class TDMOptions(RolloutOptions):
    """Match the teacher's distribution at every step of the student's way from noise to data, where the scores are compared at times
    between those of the step; they are counted from 0, its end, to 1, its start. TrainingData no data."""

    critic_target: Literal["x_0", "score"] = "x_0"
    """What the critic learns: the mean of the student's x_0, which varies little (TDM), or the score of its states, which is exact in the
    limit of long training."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.time_low == 0:
            raise UserError("scores are compared behind noise, of which the end of the last step has none: give a --time-low above 0")


@dataclass(frozen=True, kw_only=True)
class ConsistencyOptions(MethodOptions):
    """Map every point of a trajectory of the teacher to its end. The result is sampled with stochastic_sampling."""

    grid_steps: int = 48
    """Steps into which the trajectory is cut; a multiple of the steps to sample in."""
    skip: int = 1
    """Of those, how many one step of the teacher spans."""
    solver: Literal["ddim", "heun"] = "ddim"
    """The teacher's step: one call (LCM), or two and of second order (consistency distillation)."""
    loss: Literal["pseudo_huber", "mse"] = "pseudo_huber"
    huber_c: float = 1e-3
    """Below this difference the pseudo-Huber loss is quadratic, above it linear."""
    target_decay: float = 0.95
    """Of the moving average that is the target network; 0: the student itself."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "grid_steps", "skip")
        if not 0 <= self.target_decay < 1:
            raise UserError(f"--target-decay is at least 0 and less than 1, got {self.target_decay:g}")
        if self.huber_c <= 0:
            raise UserError(f"--huber-c must be positive, got {self.huber_c:g}")

    def check_steps(self, steps: int) -> None:
        super().check_steps(steps)
        if self.grid_steps % steps:
            raise UserError(
                f"the times of {steps} steps are not among those of {self.grid_steps}: --grid-steps must be a multiple of the steps, "
                f"such as {steps * max(1, round(self.grid_steps / steps))}"
            )


Weighting = Literal["x0", "truncated_snr", "snr_plus_one", "velocity"]


@dataclass(frozen=True, kw_only=True)
class ProgressiveOptions(MethodOptions):
    """Halve the number of steps again and again: one step of the student is two of its teacher, the student of the phase before."""

    teacher_steps: int = 32
    """Steps of the first teacher: the steps to reach, doubled at least once."""
    phase_length: Known[int] = 1000
    """Training steps of each phase but the last, which goes on to the end; the command gives equal parts of its training to all."""
    weighting: Weighting = "velocity"
    """Of the error of x_0: max(SNR, 1), SNR + 1, that of the velocity, or none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "teacher_steps", "phase_length")

    def phases(self, steps: int) -> int:
        """How often ``teacher_steps`` is halved to come to ``steps``.

        Raises:
            UserError: it cannot be.
        """
        phases = max(1, round(self.teacher_steps / steps)).bit_length() - 1
        if phases < 1 or self.teacher_steps != steps << phases:
            raise UserError(
                f"{self.teacher_steps} steps cannot be halved to {steps}: set --teacher-steps to {steps} times 2, 4, 8, ..., "
                f"such as {steps << max(1, phases)}"
            )
        return phases

    def check_steps(self, steps: int) -> None:
        super().check_steps(steps)
        self.phases(steps)

    def resolved(self, steps: int, training_steps: int) -> Self:
        phases = self.phases(steps)
        if training_steps < phases:
            raise UserError(f"{self.teacher_steps} steps are halved {phases} times: give at least as many --training-steps")
        return replace(self, phase_length=training_steps // phases)


@dataclass(frozen=True, kw_only=True)
class PairOptions:
    """How the teacher's samples are drawn for reflow and dmd."""

    count: int = 4096
    """Pairs of noise and sample."""
    steps: int = 28
    """Sampling steps of the teacher."""
    sampler: Literal["flow_euler", "ode_heun"] = "flow_euler"
    """As FLUX is sampled, or with twice the calls and an error of second order."""
    batch: int = 64
    """Pairs at once, which are kept when a run is interrupted."""

    def __post_init__(self) -> None:
        at_least(self, 1, "count", "steps", "batch")


@dataclass(frozen=True, kw_only=True)
class ReflowOptions(MethodOptions):
    """Straighten the flow between noise and the teacher's samples from it, then train where few steps look."""

    straighten: int | None = None
    """Training steps of flow matching at all times; those after them see the times of the few steps only. 0: distil at once; default:
    half of the training."""
    times: TimesName = "uniform"
    """Of the straightening."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 0, "straighten")

    @property
    def training_data(self) -> TrainingData:
        return "pairs"

    def resolved(self, steps: int, training_steps: int) -> Self:
        self.check_steps(steps)
        return replace(self, straighten=training_steps // 2) if self.straighten is None else self


OPTIONS: dict[str, type[MethodOptions]] = {
    "output_kd": OutputKDOptions,
    "guidance": GuidanceOptions,
    "dmd2": DMD2Options,
    "tdm": TDMOptions,
    "consistency": ConsistencyOptions,
    "progressive": ProgressiveOptions,
    "reflow": ReflowOptions,
    "dmd": DMDOptions,
}
