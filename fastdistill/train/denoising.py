"""Training from data: one loss for DDPM, denoising score matching and flow matching."""

from __future__ import annotations

import torch
from torch import nn

from fastdistill.data.latents import LatentBatch
from fastdistill.diffusion.prediction import Prediction, convert
from fastdistill.diffusion.process import Process
from fastdistill.diffusion.timesteps import TimeDistribution
from fastdistill.models.families.family import Predicts
from fastdistill.train.method import Loss, StudentMethod


class Denoising(StudentMethod):
    """Denoising loss `L = E || p(x_t, t, c) - (a x_0 + b eps) ||^2`.

    It is minimal at the conditional mean of the target, by which the score is known.

    | loss | process | prediction | error_in | source |
    |---|---|---|---|---|
    | DDPM | variance preserving | `EPSILON` | | Ho et al. 2020, equation 14 |
    | score matching | any | `SCORE` | `EPSILON` | Song et al. 2021, equation 7 |
    | flow matching | rectified flow | `VELOCITY` | | Lipman et al. 2023; Esser et al. 2024 |

    Args:
        family: calls the student. Networks of a `Family` predict the velocity of rectified flow.
        error_in: prediction to measure the error in; by default the network's. Another one weights
            the error: in `EPSILON` for a score, by `sigma^2`; in `X0` for rectified flow's
            velocity, by `t^2`.
    """

    def __init__(
        self,
        student: nn.Module,
        family: Predicts,
        process: Process,
        prediction: Prediction,
        times: TimeDistribution,
        error_in: Prediction | None = None,
    ) -> None:
        self.networks = {"student": student}
        self.family, self.process, self.prediction, self.times = family, process, prediction, times
        self.error_in = prediction if error_in is None else error_in

    def loss(self, role: str, batch: LatentBatch, rng: torch.Generator) -> Loss:
        x_0 = batch.latents
        x_t, t, noise = self.process.draw(x_0, self.times, rng)
        output = self.family.predict(self.networks[role], x_t, t, batch.conditioning)
        predicted = convert(output, x_t, t, self.process, self.prediction, self.error_in)
        return Loss(total=(predicted - self.error_in.target(self.process, x_0, noise, t)).square().mean())
