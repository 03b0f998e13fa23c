"""Progressive distillation (Salimans & Ho 2022, arXiv 2202.00512)."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack

from fastdistill.data.latents import LatentBatch
from fastdistill.diffusion.prediction import Prediction
from fastdistill.diffusion.process import noise_like
from fastdistill.diffusion.timesteps import few_step_times
from fastdistill.distill.methods.distillation import Distillation, Setup, follow, without_prefix
from fastdistill.distill.methods.losses import error_weight, weighted_mse
from fastdistill.distill.options import ProgressiveOptions
from fastdistill.train.method import Loss


class ProgressiveDistillation(Distillation):
    """``L = E w(t) |x_0 - x~|^2``, with ``x~`` the data by which one DDIM step equals two of the teacher (algorithm 2)::

        x_m = step(x_t, t -> m)      x_s = step(x_m, m -> s)      x~ = (x_s - (sigma_s/sigma_t) x_t) / (alpha_s - (sigma_s/sigma_t) alpha_t)

    On rectified flow the student's velocity is asked to be the mean of the teacher's two. In the first phase the teacher takes
    ``teacher_steps``, guided, and the student half of them. After each phase but the last the student is copied into the role ``target``,
    which teaches the next, unguided, as it has learned guidance; the number of steps is halved. Train for :attr:`total_steps`.
    """

    def __init__(self, options: ProgressiveOptions = ProgressiveOptions(), **setup: Unpack[Setup]) -> None:
        super().__init__(options, **setup)
        self.options = options
        self.phases = options.phases(self.steps)
        self.phase = 0
        self.check_determined("teacher", self.times)
        if self.phases > 1:
            # There from the beginning, so that it is sharded with the others.
            self.networks["target"] = copy.deepcopy(self.networks["student"]).requires_grad_(False)
            self.predictions["target"] = self.predictions["student"]

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
            follow(self.networks["target"], self.networks["student"], decay=0.0)

    def state_dict(self) -> Mapping[str, Tensor]:
        target = self.networks["target"].state_dict(prefix="target.") if "target" in self.networks else {}
        return {"phase": torch.tensor(self.phase), **target}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.phase = int(state.get("phase", 0))
        if "target" in self.networks and state:
            self.networks["target"].load_state_dict(without_prefix(state, "target."))

    def role_loss(self, role: str, batch: LatentBatch, rng: torch.Generator) -> Loss:
        x_0, steps = batch.latents, self.student_steps
        noise = noise_like(x_0, rng)
        index = 2 * torch.randint(steps, (len(x_0),), generator=rng, device=rng.device).cpu()
        grid = torch.cat([few_step_times(2 * steps, self.shift), torch.zeros(1)])
        t, middle, s = (grid[index + offset].to(x_0.device) for offset in range(3))
        scale = self.draw_scale(x_0, rng)
        x_t = self.process.add_noise(x_0, noise, t)
        x_middle = self.process.ddim_step(x_t, self._taught(x_t, t, batch.conditioning, scale), t, middle)
        x_s = self.process.ddim_step(x_middle, self._taught(x_middle, middle, batch.conditioning, scale), middle, s)
        target = self.process.ddim_data(x_t, x_s, t, s)
        found = self.predict("student", x_t, t, batch.conditioning, Prediction.X0, scale)
        loss = weighted_mse(found, target, error_weight(self.process, t, self.options.weighting))
        return Loss(total=loss, logs={"student_steps": torch.tensor(float(steps))})

    @torch.no_grad()
    def _taught(self, x_t: Tensor, t: Tensor, conditioning: Any, scale: Tensor | None) -> Tensor:
        if self.phase:
            return self.predict("target", x_t, t, conditioning, Prediction.X0, scale)
        return self.teach(x_t, t, conditioning, Prediction.X0, scale)
