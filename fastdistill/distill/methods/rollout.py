"""What DMD2 and TDM have in common: a student that is trained where its own sampling takes it, and a critic that follows it closely."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from fastdistill.data.latents import LatentBatch
from fastdistill.diffusion.prediction import Prediction
from fastdistill.diffusion.process import noise_like
from fastdistill.distill.methods.distillation import Setup, follow
from fastdistill.distill.methods.distribution_matching import DistributionMatching
from fastdistill.distill.options import RolloutOptions
from fastdistill.errors import UserError
from fastdistill.train.method import Loss


@dataclass(frozen=True, kw_only=True)
class Visit:
    """Where the student is trained: states ``x_t`` (B, ...) at its time ``index``, and the guidance scale (B,) of their run."""

    x_t: Tensor
    t: Tensor
    index: int
    scale: Tensor | None


class Rollout(DistributionMatching):
    """Distribution matching in several steps, on two time scales: the critic is trained in every step, the student in every
    ``critic_updates``-th.

    What all roles judge is the student's ``x_0`` at one of its times, the same for the whole batch and, where ``before_step`` is
    called, for all roles. It gets there by its own sampling from noise (backward simulation; DMD2, arXiv 2405.14867, section 4.5), as
    training on noised data leaves it unprepared for its own errors.

    From SenseFlow (arXiv 2506.00523): implicit distribution alignment (``ida_decay``) moves the critic along with the student,
    ``critic <- d critic + (1 - d) student``.
    """

    trains: Sequence[str] = ("student", "critic")

    def __init__(self, options: RolloutOptions, critic: nn.Module | None, **setup: Unpack[Setup]) -> None:
        super().__init__(options, critic, **setup)
        self.following = options
        self.stochastic_sampling = options.rollout == "sde"
        self._drawn: tuple[int, bool] | None = None
        self._judged: dict[int, tuple[Visit, Tensor]] = {}
        if options.ida_decay is not None and _shapes(self.networks["student"]) != _shapes(self.networks["critic"]):
            raise UserError("ida_decay mixes the student's weights into the critic's, which needs two equal networks: leave out critic=")

    @abstractmethod
    def student_loss(self, visit: Visit, x_0: Tensor, batch: LatentBatch, rng: torch.Generator) -> Loss:
        """Of ``x_0`` (B, ...), the data that the student sees at ``visit``."""

    @abstractmethod
    def critic_loss(self, visit: Visit, x_0: Tensor, batch: LatentBatch, rng: torch.Generator) -> Loss:
        """Of the critic, on the same, a constant."""

    def turns(self, step: int) -> Sequence[str]:
        return self.trains if step % self.following.critic_updates == 0 else self.trains[1:]

    def before_step(self, step: int, rng: torch.Generator) -> None:
        """Draw what processes that share the weights have to agree on, as it says how often the student is called."""
        self._drawn = self._draw(rng)
        self._judged.clear()

    def after_step(self, step: int) -> None:
        if self.following.ida_decay is not None and "student" in self.turns(step):
            follow(self.networks["critic"], self.networks["student"], self.following.ida_decay)

    def role_loss(self, role: str, batch: LatentBatch, rng: torch.Generator) -> Loss:
        match role:
            case "student":
                return self.student_loss(*self._sample(batch, rng), batch, rng)
            case "critic":
                return self.critic_loss(*self.sample_to_judge(batch, rng), batch, rng)
        raise ValueError(f"{type(self).__name__} trains {', '.join(self.trains)}, not {role!r}")

    def end(self, visit: Visit) -> Tensor:
        """The time (B,) to which the student steps from ``visit``."""
        end = self.times[visit.index + 1] if visit.index + 1 < self.steps else torch.zeros(())
        return self.at(end, visit.x_t)

    def _sample(self, batch: LatentBatch, rng: torch.Generator) -> tuple[Visit, Tensor]:
        """Where the student comes to, and the data (B, ...) that it sees there."""
        visit = self.visit(batch, rng)
        return visit, self.predict("student", visit.x_t, visit.t, batch.conditioning, Prediction.X0, visit.scale)

    @torch.no_grad()
    def sample_to_judge(self, batch: LatentBatch, rng: torch.Generator) -> tuple[Visit, Tensor]:
        """The same for the roles that judge, between whose turns the student does not change: they share it."""
        if self._drawn is None:
            return self._sample(batch, rng)
        if id(batch) not in self._judged:
            self._judged[id(batch)] = self._sample(batch, rng)
        return self._judged[id(batch)]

    @torch.no_grad()
    def visit(self, batch: LatentBatch, rng: torch.Generator) -> Visit:
        """A state that the student's own sampling reaches, or noised data where ``backward_simulation`` is below 1."""
        index, simulated = self._draw(rng) if self._drawn is None else self._drawn
        scale, noise = self.draw_scale(batch.latents, rng), noise_like(batch.latents, rng)
        times = [self.at(time, noise) for time in self.times[: index + 1]]
        if not simulated:
            return Visit(x_t=self.process.add_noise(batch.latents, noise, times[-1]), t=times[-1], index=index, scale=scale)
        x_t = self.process.add_noise(torch.zeros_like(noise), noise, times[0])
        for t, s in pairwise(times):
            x_0 = self.predict("student", x_t, t, batch.conditioning, Prediction.X0, scale)
            if self.stochastic_sampling:
                x_t = self.process.add_noise(x_0, noise_like(x_0, rng), s)
            else:
                x_t = self.process.ddim_step(x_t, x_0, t, s)
        return Visit(x_t=x_t, t=times[-1], index=index, scale=scale)

    def _draw(self, rng: torch.Generator) -> tuple[int, bool]:
        """The index of the time to train at, and whether the student samples its way there."""
        index = int(torch.randint(self.steps, (1,), generator=rng, device=rng.device))
        return index, float(torch.rand(1, generator=rng, device=rng.device)) < self.following.backward_simulation


def _shapes(network: nn.Module) -> list[tuple[str, torch.Size]]:
    return [(name, parameter.shape) for name, parameter in network.named_parameters()]
