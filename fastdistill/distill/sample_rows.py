"""Images of a student in training, always from the same noise."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastdistill.diffusion.prediction import Prediction
from fastdistill.diffusion.timesteps import shifted, time_of_batch
from fastdistill.distill.methods.critic import Critic
from fastdistill.distill.methods.distillation import Distillation
from fastdistill.models.families.family import Conditioning, Family
from fastdistill.models.sampling import SamplingDefaults
from fastdistill.models.saving import swapped


class Rows:
    """The rows ``teacher`` and ``student``, and for a method with a critic ``x0_real`` and ``x0_critic``.

    These are what teacher and critic see in the student's images behind noise, at ``t = 1/2`` before the shift; their difference is what
    the student learns from. Teacher and student are sampled by ``sampling`` and ``drawn``.
    """

    def __init__(
        self,
        method: Distillation,
        pipeline: Any,
        family: Family,
        scheduler: Any,
        sampling: SamplingDefaults,
        drawn: SamplingDefaults,
        conditioning: Conditioning,
        noise: Tensor,
    ) -> None:
        self.method, self.pipeline, self.family, self.scheduler = method, pipeline, family, scheduler
        self.sampling, self.drawn = sampling, drawn
        self.conditioning, self.noise = conditioning, noise
        self._teacher: Tensor | None = None

    @torch.no_grad()
    def __call__(self) -> Mapping[str, Tensor]:
        if self._teacher is None:
            self._teacher = self._decoded(self._end(self.sampling))
        with swapped(self.pipeline, self.method.networks["student"], self.scheduler):
            x_0 = self._end(self.drawn)
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
