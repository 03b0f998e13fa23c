"""Rows of images of a student in training, always from the same noise."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastdistill.diffusion.prediction import Prediction
from fastdistill.diffusion.timesteps import shifted, time_of_batch
from fastdistill.distill.methods.critic import Critic
from fastdistill.distill.methods.distillation import Distillation
from fastdistill.models.families import family_of
from fastdistill.models.families.family import Conditioning
from fastdistill.models.sampling import SamplingDefaults
from fastdistill.models.saving import swapped


@dataclass(frozen=True, kw_only=True)
class Start:
    """Beginning of every row: noise (N, C, H, W) and the conditioning of each image."""

    noise: Tensor
    conditioning: Conditioning


class SampleRows:
    """Rows `teacher` and `student`, and for a method with a critic `x0_real` and `x0_critic`.

    The last two are what teacher and critic see in the student's images behind noise, at `t = 1/2`
    before the shift; their difference is what the student learns from.
    """

    def __init__(self, method: Distillation, pipeline: Any, scheduler: Any, start: Start) -> None:
        self.method, self.pipeline, self.scheduler = method, pipeline, scheduler
        self.family = family_of(pipeline.transformer)
        self.noise, self.conditioning = start.noise, start.conditioning
        self._teacher: Tensor | None = None

    @torch.no_grad()
    def draw(self, teacher: SamplingDefaults, student: SamplingDefaults) -> Mapping[str, Tensor]:
        """Images (N, 3, H, W) of each row, by how teacher and student are sampled; the teacher
        draws in the first call only."""
        if self._teacher is None:
            self._teacher = self._decoded(self._end(teacher))
        with swapped(self.pipeline, self.method.student.network, self.scheduler):
            x_0 = self._end(student)
        rows = {"teacher": self._teacher, "student": self._decoded(x_0)}
        critic: Critic | None = getattr(self.method, "critic", None)
        if critic is not None:
            t = shifted(torch.full((len(x_0),), 0.5), self.method.shift).to(x_0.device)
            x_t = self.method.process.add_noise(x_0, self.noise.flip(0), t)
            rows["x0_real"] = self._decoded(self.method.teacher.guided(x_t, t, self.conditioning, Prediction.X0))
            # The samples are from the last step, if it asks.
            told = time_of_batch(self.method.times[-1], x_0) if critic.knows_step else None
            rows["x0_critic"] = self._decoded(critic.predict(x_t, t, self.conditioning, Prediction.X0, told))
        return rows

    def _end(self, sampling: SamplingDefaults) -> Tensor:
        states, _ = self.family.trajectory(
            self.pipeline,
            self.noise,
            self.conditioning,
            self.method.teacher.unconditional[torch.zeros(len(self.noise), dtype=torch.long, device=self.noise.device)],
            steps=sampling.num_inference_steps,
            true_cfg_scale=sampling.true_cfg_scale,
            guidance_scale=sampling.guidance_scale,
        )
        return states[-1]

    def _decoded(self, latents: Tensor) -> Tensor:
        return self.family.decode(self.pipeline, latents).float().cpu()
