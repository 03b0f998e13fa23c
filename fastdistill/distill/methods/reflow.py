"""Reflow and its distillation (Liu et al. 2022, arXiv 2209.03003; InstaFlow, arXiv 2309.06380)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self, Unpack

from fastdistill.diffusion.prediction import Prediction
from fastdistill.diffusion.process import RectifiedFlow
from fastdistill.distill.methods.distillation import Distillation, Setup, time_distribution
from fastdistill.distill.methods.teacher_pairs import require_pairs
from fastdistill.distill.options import MethodOptions, TimesName, TrainingData
from fastdistill.errors import UserError
from fastdistill.run.options import at_least
from fastdistill.train.method import Loss


@dataclass(frozen=True, kw_only=True)
class ReflowOptions(MethodOptions):
    """Straighten the flow between noise and the teacher's samples from it, then train where few
    steps look."""

    straighten: int | None = None
    """Training steps of flow matching at all times; those after them see the times of the few steps
    only. 0: distil at once; default: half of the training."""
    times: TimesName = "uniform"
    """Times of the straightening."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 0, "straighten")

    def idle(self) -> Mapping[str, Sequence[str]]:
        return {"with --straighten 0": ("times",)} if self.straighten == 0 else {}

    @property
    def training_data(self) -> TrainingData:
        return "pairs"

    def resolved(self, steps: int, training_steps: int) -> Self:
        self.check_steps(steps)
        return replace(self, straighten=training_steps // 2) if self.straighten is None else self


class Reflow(Distillation):
    """`L = E |v(x_t, t) - (z - x)|^2` along `x_t = (1 - t) x + t z` between noise `z` and the
    teacher's sample `x` from it.

    Flow matching on the teacher's coupling instead of independent data and noise, whose paths cross
    and so have to bend (equation 1). The flow of a coupling that a flow made is straighter; where
    it is straight one step is exact. Another round is a run whose teacher is this student
    (k-rectified flow).

    The first `straighten` steps (by default all) draw `t` from all times. After them only the times
    of the few steps are drawn, at
    which the same loss distils what is not straight yet: for one step, `t = 1`, it is `|(z - v) -
    x|^2` (section 2.2, distillation).

    Trained on `PairBatch`, from `teacher_pairs`.
    """

    Options = ReflowOptions
    options: ReflowOptions

    def __init__(self, options: ReflowOptions, **setup: Unpack[Setup]) -> None:
        super().__init__(options, **setup)
        if not isinstance(self.process, RectifiedFlow):
            raise UserError(
                f"reflow straightens rectified flow, not {type(self.process).__name__}; "
                "choose progressive or consistency"
            )
        self.distribution = time_distribution(options.times, self.shift)
        self.distilling = options.straighten == 0

    def after_step(self, step: int) -> None:
        self.distilling = self.options.straighten is not None and step + 1 >= self.options.straighten

    def state_dict(self) -> Mapping[str, Tensor]:
        return {"distilling": torch.tensor(self.distilling)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.distilling = bool(state.get("distilling", self.distilling))

    def loss(self, role: str, batch: Any, rng: torch.Generator) -> Loss:
        pairs = require_pairs(batch, "reflow")
        if self.distilling:
            t = self.times[torch.randint(self.steps, (len(pairs),), generator=rng, device=rng.device).cpu()]
        else:
            t = self.distribution(len(pairs), rng)
        t = t.to(pairs.latents.device)
        x_t = self.process.add_noise(pairs.latents, pairs.noise, t)
        target = Prediction.VELOCITY.target(self.process, pairs.latents, pairs.noise, t)
        return Loss(
            total=(self.student.predict(x_t, t, pairs.conditioning, Prediction.VELOCITY, pairs.scale) - target)
            .square()
            .mean()
        )
