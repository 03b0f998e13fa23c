"""Output distillation: the student imitates what the teacher returns (Hinton et al. 2015; OutKD of
BK-SDM, arXiv 2305.15798)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from typing_extensions import Unpack

from fastdistill.data.latents import LatentBatch
from fastdistill.diffusion.prediction import Prediction
from fastdistill.distill.methods.distillation import Distillation, Setup, time_distribution
from fastdistill.distill.options import MethodOptions
from fastdistill.train.method import Loss


@dataclass(frozen=True, kw_only=True)
class OutputKDOptions(MethodOptions):
    """Imitate the teacher's output, which needs as many steps as the teacher's."""

    error_in: Literal["x0", "epsilon", "v", "score", "velocity"] = "velocity"
    """The prediction in which student and teacher are compared, which weighs the times."""


class OutputKD(Distillation):
    """`L = E |p_S(x_t, t, c) - p_T(x_t, t, c)|^2`, `p` the prediction `error_in` and `p_T` the
    guided teacher's.

    `x_t` is noised data, `t` logit-normal under `shift`. It makes no network faster but a smaller
    one; with a guided teacher the student needs one call for the teacher's two.
    """

    Options = OutputKDOptions
    options: OutputKDOptions

    def __init__(self, options: OutputKDOptions, **setup: Unpack[Setup]) -> None:
        super().__init__(options, **setup)
        self.error_in = Prediction(options.error_in)
        self.distribution = time_distribution("logit_normal", self.shift)

    def loss(self, role: str, batch: LatentBatch, rng: torch.Generator) -> Loss:
        x_t, t, _ = self.process.draw(batch.latents, self.distribution, rng)
        scale = self.teacher.draw_scale(x_t, rng)
        target = self.teacher.guided(x_t, t, batch.conditioning, self.error_in, scale)
        return Loss(
            total=(self.student.predict(x_t, t, batch.conditioning, self.error_in, scale) - target).square().mean()
        )
