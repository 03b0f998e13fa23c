"""Progressive distillation (Salimans & Ho 2022, arXiv 2202.00512)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from typing_extensions import Self, Unpack

from fastdistill.data.latents import LatentBatch
from fastdistill.diffusion.prediction import Prediction
from fastdistill.diffusion.process import noise_like
from fastdistill.diffusion.timesteps import few_step_times
from fastdistill.distill.methods.distillation import Distillation, Setup, follow, without_prefix
from fastdistill.distill.methods.losses import error_weight, weighted_mse
from fastdistill.distill.options import Known, MethodOptions
from fastdistill.errors import UserError
from fastdistill.run.options import at_least
from fastdistill.train.method import Loss

Weighting = Literal["x0", "truncated_snr", "snr_plus_one", "velocity"]


@dataclass(frozen=True, kw_only=True)
class ProgressiveOptions(MethodOptions):
    """Halve the number of steps again and again: one step of the student is two of its teacher, the
    student of the phase before."""

    teacher_steps: int = 32
    """Steps of the first teacher: the steps to reach, doubled at least once."""
    phase_length: Known[int] = 1000
    """Training steps of each phase but the last, which goes on to the end; the command gives equal
    parts of its training to all."""
    weighting: Weighting = "velocity"
    """Weight of the error of x_0: max(SNR, 1), SNR + 1, that of the velocity, or none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "teacher_steps", "phase_length")

    def phases(self, steps: int) -> int:
        """Number of times that `teacher_steps` is halved to come to `steps`.

        Raises:
            UserError: it cannot be.
        """
        phases = max(1, round(self.teacher_steps / steps)).bit_length() - 1
        if phases < 1 or self.teacher_steps != steps << phases:
            raise UserError(
                f"{self.teacher_steps} steps cannot be halved to {steps}: "
                f"set --teacher-steps to {steps} times 2, 4, 8, ..., such as {steps << max(1, phases)}"
            )
        return phases

    def check_steps(self, steps: int) -> None:
        super().check_steps(steps)
        self.phases(steps)

    def resolved(self, steps: int, training_steps: int) -> Self:
        phases = self.phases(steps)
        if training_steps < phases:
            raise UserError(
                f"{self.teacher_steps} steps are halved {phases} times: give at least as many --training-steps"
            )
        return replace(self, phase_length=training_steps // phases)


class ProgressiveDistillation(Distillation):
    """`L = E w(t) |x_0 - x~|^2`, with `x~` the data by which one DDIM step equals two of the
    teacher (algorithm 2):

        x_m = step(x_t, t -> m)
        x_s = step(x_m, m -> s)
        x~ = (x_s - (sigma_s/sigma_t) x_t) / (alpha_s - (sigma_s/sigma_t) alpha_t)

    On rectified flow the student's velocity is asked to be the mean of the teacher's two. In the
    first phase the teacher takes `teacher_steps`, guided, and the student half of them. After each
    phase but the last the student is copied into the role `target`, which teaches the next,
    unguided, as it has learned guidance; the number of steps is halved. Train for `total_steps`.
    """

    Options = ProgressiveOptions
    options: ProgressiveOptions

    def __init__(self, options: ProgressiveOptions, **setup: Unpack[Setup]) -> None:
        super().__init__(options, **setup)
        self.phases = options.phases(self.steps)
        self.phase = 0
        self.teacher.check_determined(self.times)
        if self.phases > 1:
            # There from the beginning, so that it is sharded with the others.
            self.target = self.student.copy("target")
            self.networks["target"] = self.target.network

    @property
    def total_steps(self) -> int:
        """Training steps of all phases."""
        return self.phases * self.options.phase_length

    @property
    def student_steps(self) -> int:
        """Sampling steps of the student in this phase."""
        return self.options.teacher_steps >> (self.phase + 1)

    def after_step(self, step: int) -> None:
        if (step + 1) % self.options.phase_length == 0 and self.phase + 1 < self.phases:
            self.phase += 1
            follow(self.target.network, self.student.network, decay=0.0)

    def state_dict(self) -> Mapping[str, Tensor]:
        target = self.target.network.state_dict(prefix="target.") if "target" in self.networks else {}
        return {"phase": torch.tensor(self.phase), **target}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.phase = int(state.get("phase", 0))
        if "target" in self.networks and state:
            self.target.network.load_state_dict(without_prefix(state, "target."))

    def loss(self, role: str, batch: LatentBatch, rng: torch.Generator) -> Loss:
        x_0, steps = batch.latents, self.student_steps
        noise = noise_like(x_0, rng)
        index = 2 * torch.randint(steps, (len(x_0),), generator=rng, device=rng.device).cpu()
        grid = torch.cat([few_step_times(2 * steps, self.shift), torch.zeros(1)])
        t, middle, s = (grid[index + offset].to(x_0.device) for offset in range(3))
        scale = self.teacher.draw_scale(x_0, rng)
        x_t = self.process.add_noise(x_0, noise, t)
        x_middle = self.process.ddim_step(x_t, self._taught(x_t, t, batch.conditioning, scale), t, middle)
        x_s = self.process.ddim_step(x_middle, self._taught(x_middle, middle, batch.conditioning, scale), middle, s)
        target = self.process.ddim_data(x_t, x_s, t, s)
        found = self.student.predict(x_t, t, batch.conditioning, Prediction.X0, scale)
        loss = weighted_mse(found, target, error_weight(self.process, t, self.options.weighting))
        return Loss(total=loss, logs={"student_steps": torch.tensor(float(steps))})

    @torch.no_grad()
    def _taught(self, x_t: Tensor, t: Tensor, conditioning: Any, scale: Tensor | None) -> Tensor:
        if self.phase:
            return self.target.predict(x_t, t, conditioning, Prediction.X0, scale)
        return self.teacher.guided(x_t, t, conditioning, Prediction.X0, scale)
