"""Improved distribution matching (DMD2; Yin et al. 2024, arXiv 2405.14867), with two options of SenseFlow (arXiv 2506.00523)."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from fastdistill.data.latents import LatentBatch
from fastdistill.diffusion.prediction import Prediction
from fastdistill.diffusion.process import noise_like
from fastdistill.diffusion.timesteps import Uniform
from fastdistill.distill.distillation import Setup, follow
from fastdistill.distill.distribution_matching import DistributionMatching
from fastdistill.distill.heads import Discriminator, blocks_at, image_features, inner_dim
from fastdistill.distill.losses import discriminator_loss, generator_loss, pseudo_huber
from fastdistill.distill.options import DMD2Options
from fastdistill.errors import UserError
from fastdistill.models.family import Family
from fastdistill.models.guidance import embeds_guidance, with_guidance_embedder, with_scale
from fastdistill.train.method import Loss

# SenseFlow's distance of the middle of a segment from its ends (20 of 1000 times).
SEGMENT_MARGIN = 0.02


@dataclass(frozen=True, kw_only=True)
class Visit:
    """Where the student is trained: states ``x_t`` (B, ...) at its time ``index``, and the guidance scale (B,) of their run."""

    x_t: Tensor
    t: Tensor
    index: int
    scale: Tensor | None


class DMD2(DistributionMatching):
    """Distribution matching without pairs, in several steps::

        L_student = L_matching + gan_weight L_G + isg_weight L_ISG          every fake_updates steps
        L_fake    = L_denoising + gan_fake_weight L_D                       every step
        L_heads   = L_D                                                     every step

    ``x``, which all judge, is the student's ``x_0`` at one of its times, the same for the whole batch and, where ``before_step`` is
    called, for all roles. It gets there by its own sampling from noise (backward simulation, section 4.5), as training on noised data
    leaves it unprepared for its own errors.

    The critic sees the samples of all steps as one distribution, so that the steps may share out the modes. With ``critic_knows_step`` it
    is given the time of the step as guidance, which it has no other use for, and each step is matched by itself; not in the paper.

    ``L_G`` and ``L_D`` read the critic's features of ``x`` and of data, each noised anew (section 4.3). The role ``discriminator`` is
    the heads; the body is trained with the critic.

    From SenseFlow: implicit distribution alignment (``ida_decay``) moves the critic along with the student,
    ``fake <- d fake + (1 - d) student``. Intra-segment guidance (``isg_weight``) compares the student's jump from ``t_k`` to ``t_k+1``
    with the teacher's to a random time between, ``t_k+1 + 0.02 .. t_k - 0.02``, and the student's from there, by the pseudo-Huber loss.
    """

    def __init__(
        self,
        options: DMD2Options = DMD2Options(),
        *,
        fake: nn.Module | None = None,
        discriminator: nn.Module | None = None,
        **setup: Unpack[Setup],
    ) -> None:
        self.tells_step = options.critic_knows_step and setup["steps"] > 1
        if self.tells_step:
            fake = copy.deepcopy(setup["student"]) if fake is None else fake
            fake = fake if embeds_guidance(fake) else with_guidance_embedder(fake)
        super().__init__(options, fake, **setup)
        self.options = options
        self.stochastic_sampling = options.rollout == "sde"
        self._drawn: tuple[int, bool] | None = None
        self._judged: dict[int, tuple[Visit, Tensor]] = {}
        self.trains: Sequence[str] = ("student", "fake")
        if options.gan_weight:
            fake = self.networks["fake"]
            self.blocks = blocks_at(fake, cast(Family, self.family), options.gan_depths)
            if discriminator is None:
                discriminator = Discriminator(inner_dim(fake), len(self.blocks)).to(next(fake.parameters()).device)
            self.networks["discriminator"] = discriminator
            self.trains = ("student", "fake", "discriminator")
        if options.ida_decay is not None and _shapes(self.networks["student"]) != _shapes(self.networks["fake"]):
            raise UserError("ida_decay mixes the student's weights into the critic's, which needs two equal networks: leave out fake=")
        if options.isg_weight:
            self.check_determined("teacher", self.times)

    def turns(self, step: int) -> Sequence[str]:
        return self.trains if step % self.options.fake_updates == 0 else self.trains[1:]

    def before_step(self, step: int, rng: torch.Generator) -> None:
        """Draw what processes that share the weights have to agree on, as it says how often the student is called."""
        self._drawn = self._draw(rng)
        self._judged.clear()

    def after_step(self, step: int) -> None:
        if self.options.ida_decay is not None and "student" in self.turns(step):
            follow(self.networks["fake"], self.networks["student"], self.options.ida_decay)

    def role_loss(self, role: str, batch: LatentBatch, rng: torch.Generator) -> Loss:
        match role:
            case "student":
                return self._student_loss(*self._sample(batch, rng), batch, rng)
            case "fake":
                return self._fake_loss(*self._sample_to_judge(batch, rng), batch, rng)
            case "discriminator":
                return Loss(total=self._discriminator_loss(*self._sample_to_judge(batch, rng), batch, rng))
        raise ValueError(f"DMD2 trains {', '.join(self.trains)}, not {role!r}")

    def _sample(self, batch: LatentBatch, rng: torch.Generator) -> tuple[Visit, Tensor]:
        """Where the student comes to, and the data (B, ...) that it sees there."""
        visit = self.visit(batch, rng)
        return visit, self.predict("student", visit.x_t, visit.t, batch.conditioning, Prediction.X0, visit.scale)

    @torch.no_grad()
    def _sample_to_judge(self, batch: LatentBatch, rng: torch.Generator) -> tuple[Visit, Tensor]:
        """The same for critic and heads, between whose turns the student does not change: the samples of one are the other's."""
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
        return index, float(torch.rand(1, generator=rng, device=rng.device)) < self.options.backward_simulation

    def _student_loss(self, visit: Visit, x_0: Tensor, batch: LatentBatch, rng: torch.Generator) -> Loss:
        fake_scale = self._fake_scale(visit)
        terms = {"matching": self.matching_loss(x_0, batch.conditioning, visit.scale, rng, fake_scale=fake_scale)}
        total = terms["matching"]
        if self.options.gan_weight:
            terms["gan"] = generator_loss(self._logits(x_0, batch.conditioning, fake_scale, rng), self.options.gan_loss)
            total = total + self.options.gan_weight * terms["gan"]
        if self.options.isg_weight:
            terms["isg"] = self._segment_loss(x_0, visit, batch.conditioning, rng)
            total = total + self.options.isg_weight * terms["isg"]
        return Loss(total=total, logs=terms)

    def _fake_loss(self, visit: Visit, x_0: Tensor, batch: LatentBatch, rng: torch.Generator) -> Loss:
        denoising = self.denoising_loss(x_0, batch.conditioning, self._fake_scale(visit), rng)
        if not self.options.gan_weight:
            return denoising
        gan = self._discriminator_loss(visit, x_0, batch, rng)
        return Loss(total=denoising.total + self.options.gan_fake_weight * gan, logs={"denoising": denoising.total, "gan": gan})

    def _discriminator_loss(self, visit: Visit, x_0: Tensor, batch: LatentBatch, rng: torch.Generator) -> Tensor:
        scale = self._fake_scale(visit)
        fake = self._logits(x_0, batch.conditioning, scale, rng)
        real = self._logits(batch.latents, batch.conditioning, scale, rng)
        return discriminator_loss(real, fake, self.options.gan_loss)

    def _fake_scale(self, visit: Visit) -> Tensor | None:
        """What the critic is given as guidance: the time of the step that a sample is from, if it is told."""
        return visit.t if self.tells_step else visit.scale

    def _logits(self, x_0: Tensor, conditioning: Any, scale: Tensor | None, rng: torch.Generator) -> Tensor:
        """What the heads say about ``x_0`` (B, ...) behind fresh noise."""
        x_t, t, _ = self.process.draw(x_0, Uniform(), rng)
        fake, family = self.networks["fake"], cast(Family, self.family)
        conditioning = with_scale(conditioning, fake, self.default_scale(x_0) if scale is None else scale)
        logits: Tensor = self.networks["discriminator"](image_features(fake, family, self.blocks, x_t, t, conditioning))
        return logits

    def _segment_loss(self, x_0: Tensor, visit: Visit, conditioning: Any, rng: torch.Generator) -> Tensor:
        x_t, t, scale = visit.x_t, visit.t, visit.scale
        end = self.times[visit.index + 1] if visit.index + 1 < self.steps else torch.zeros(())
        s = self.at(end, x_t)
        with torch.no_grad():
            # Narrow segments, of many steps or a strong shift, keep half of their width.
            margin = torch.minimum(torch.full_like(s, SEGMENT_MARGIN), (t - s) / 4)
            middle = s + margin + (t - s - 2 * margin) * torch.rand(len(t), generator=rng, device=rng.device).to(t)
            x_middle = self.process.ddim_step(x_t, self.teach(x_t, t, conditioning, Prediction.X0, scale), t, middle)
            x_0_middle = self.predict("student", x_middle, middle, conditioning, Prediction.X0, scale)
            target = self.process.ddim_step(x_middle, x_0_middle, middle, s)
        return pseudo_huber(self.process.ddim_step(x_t, x_0, t, s), target)


def _shapes(network: nn.Module) -> list[tuple[str, torch.Size]]:
    return [(name, parameter.shape) for name, parameter in network.named_parameters()]
