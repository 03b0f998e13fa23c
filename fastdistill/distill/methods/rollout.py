"""The student's own sampling, by which it gets to where it is trained (backward simulation)."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from fastdistill.data.latents import LatentBatch
from fastdistill.diffusion.prediction import Prediction
from fastdistill.diffusion.process import noise_like
from fastdistill.diffusion.timesteps import time_of_batch
from fastdistill.distill.methods.denoiser import Denoiser, Teacher
from fastdistill.distill.options import RolloutOptions


@dataclass(frozen=True, kw_only=True)
class Visit:
    """State at which the student is trained: `x_t` (B, ...) at its time `index`, and the guidance
    scale (B,) of their run."""

    x_t: Tensor
    t: Tensor
    index: int
    scale: Tensor | None


@dataclass(frozen=True, kw_only=True, eq=False)
class Stop:
    """End of the way to it, on which processes that share the weights agree, as it says how often
    the student is called."""

    index: int
    """Index of the time to train at."""
    simulated: bool
    """Whether the student samples its way there, or data are noised."""


class Rollout:
    """The student's way from noise to one of its `times`, the same time for the whole batch.

    The student gets there by its own sampling from noise (backward simulation; DMD2, arXiv
    2405.14867, section 4.5), as training on noised data leaves it unprepared for its own errors.

    Args:
        teacher: says which guidance is drawn.
        times: of the student's steps (K,), falling.
    """

    def __init__(self, student: Denoiser, teacher: Teacher, times: Tensor, options: RolloutOptions) -> None:
        self.student, self.teacher, self.times, self.options = student, teacher, times, options
        self.stochastic = options.rollout == "sde"
        self._agreed: Stop | None = None

    def agree(self, rng: torch.Generator) -> None:
        """Draw where all processes, parts of a batch and roles stop until the next call."""
        self._agreed = self.draw(rng)

    def draw(self, rng: torch.Generator) -> Stop:
        """Stop at a time with equal odds, reached by sampling with odds
        `backward_simulation`."""
        index = int(torch.randint(len(self.times), (1,), generator=rng, device=rng.device))
        simulated = float(torch.rand(1, generator=rng, device=rng.device)) < self.options.backward_simulation
        return Stop(index=index, simulated=simulated)

    @torch.no_grad()
    def visit(self, batch: LatentBatch, rng: torch.Generator) -> Visit:
        """State that the student's own sampling reaches, or noised data where `backward_simulation`
        is below 1."""
        stop = self.draw(rng) if self._agreed is None else self._agreed
        scale, noise = self.teacher.draw_scale(batch.latents, rng), noise_like(batch.latents, rng)
        process, times = self.student.process, [time_of_batch(time, noise) for time in self.times[: stop.index + 1]]
        if not stop.simulated:
            return Visit(
                x_t=process.add_noise(batch.latents, noise, times[-1]), t=times[-1], index=stop.index, scale=scale
            )
        x_t = process.add_noise(torch.zeros_like(noise), noise, times[0])
        for t, s in pairwise(times):
            x_0 = self.student.predict(x_t, t, batch.conditioning, Prediction.X0, scale)
            x_t = (
                process.add_noise(x_0, noise_like(x_0, rng), s)
                if self.stochastic
                else process.ddim_step(x_t, x_0, t, s)
            )
        return Visit(x_t=x_t, t=times[-1], index=stop.index, scale=scale)

    def sample(self, batch: LatentBatch, rng: torch.Generator) -> tuple[Visit, Tensor]:
        """State that the student comes to, and the data (B, ...) that it sees there, with their
        gradient."""
        visit = self.visit(batch, rng)
        return visit, self.student.predict(visit.x_t, visit.t, batch.conditioning, Prediction.X0, visit.scale)

    @torch.no_grad()
    def sample_to_judge(self, batch: LatentBatch, rng: torch.Generator) -> tuple[Visit, Tensor]:
        """The `sample` of `batch` that all judging roles of a step share, as the student does not
        change between their turns."""
        if self._agreed is None:
            return self.sample(batch, rng)
        if batch.shared.get("stop") is not self._agreed:
            batch.shared.update(stop=self._agreed, judged=self.sample(batch, rng))
        visit, x_0 = batch.shared["judged"]
        return visit, x_0

    def end(self, visit: Visit) -> Tensor:
        """Time (B,) to which the student steps from `visit`."""
        end = self.times[visit.index + 1] if visit.index + 1 < len(self.times) else torch.zeros(())
        return time_of_batch(end, visit.x_t)
