"""One-step distribution matching held to pairs (DMD; Yin et al. 2024, arXiv 2311.18828)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from fastdistill.data.pairs import PairBatch
from fastdistill.diffusion.prediction import Prediction
from fastdistill.diffusion.process import noise_like
from fastdistill.diffusion.timesteps import time_of_batch
from fastdistill.distill.methods.critic import Critic
from fastdistill.distill.methods.distillation import Distillation, Setup
from fastdistill.distill.methods.losses import pseudo_huber
from fastdistill.distill.methods.teacher_pairs import require_pairs
from fastdistill.distill.options import MatchingOptions, TrainingData
from fastdistill.errors import UserError
from fastdistill.run.options import at_least
from fastdistill.train.method import Loss


@dataclass(frozen=True, kw_only=True)
class DMDOptions(MatchingOptions):
    """Match the teacher's distribution in one step, held to pairs of noise and the teacher's
    sample."""

    regression_weight: float = 0.25
    """Weight of the distance to the teacher's sample from the same noise."""
    regression_loss: Literal["mse", "pseudo_huber"] = "mse"
    """Measure of that distance, in the latent space; the paper's is LPIPS between images."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 0, "regression_weight")

    def idle(self) -> Mapping[str, Sequence[str]]:
        none = {} if self.regression_weight else {"without --regression-weight": ("regression_loss",)}
        return {**super().idle(), **none}

    @property
    def training_data(self) -> TrainingData:
        return "pairs"

    def check_steps(self, steps: int) -> None:
        if steps != 1:
            raise UserError(f"DMD distils into one step, not {steps}; choose tdm or dmd2 for more")


class DMD(Distillation):
    """`L_student = L_matching + regression_weight L_regression` and `L_critic = L_denoising`, both
    in every step (algorithm 1).

    `L_regression` is the distance of the student's sample from the teacher's, from the same noise.
    It keeps modes that matching alone, which seeks them, may lose. The paper measures it by LPIPS
    between images; here, in the latent space, it is the squared error or the pseudo-Huber loss.
    `L_matching` is of samples from noise of its own, under the same prompts.

    Trained on `fastdistill.data.pairs.PairBatch`, from
    `fastdistill.distill.methods.teacher_pairs.teacher_pairs`.
    """

    Options = DMDOptions
    options: DMDOptions
    command_defaults = {"learning_rate": 1e-4, "betas": (0.0, 0.99)}
    # Two networks that disagree about the scale average over it in the same way (SenseFlow draws
    # its teacher's embedded guidance).
    may_average_guidance = True
    trains: Sequence[str] = ("student", "critic")

    def __init__(self, options: DMDOptions, *, critic: nn.Module | None = None, **setup: Unpack[Setup]) -> None:
        super().__init__(options, **setup)
        self.critic = Critic.of(self.student, options, critic)
        self.networks["critic"] = self.critic.network

    def loss(self, role: str, batch: Any, rng: torch.Generator) -> Loss:
        pairs = require_pairs(batch, "DMD")
        with torch.set_grad_enabled(role == "student"):
            generated = self._generate(noise_like(pairs.noise, rng), pairs)
        if role == "critic":
            return self.critic.denoising_loss(generated, pairs.conditioning, pairs.scale, rng)
        point = self.critic.noised(generated, pairs.conditioning, pairs.scale, rng)
        matching = self.critic.difference(point, self.teacher, told=pairs.scale)
        regression = self._distance(self._generate(pairs.noise, pairs), pairs.latents)
        return Loss(
            total=matching + self.options.regression_weight * regression,
            logs={"matching": matching, "regression": regression},
        )

    def _distance(self, found: Tensor, target: Tensor) -> Tensor:
        return (
            (found - target).square().mean() if self.options.regression_loss == "mse" else pseudo_huber(found, target)
        )

    def _generate(self, noise: Tensor, pairs: PairBatch) -> Tensor:
        t = time_of_batch(self.times[0], noise)
        x_t = self.process.add_noise(torch.zeros_like(noise), noise, t)
        return self.student.predict(x_t, t, pairs.conditioning, Prediction.X0, pairs.scale)
