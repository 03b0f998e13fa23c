"""Recovery of a cut model by knowledge distillation from the full one, as a method of the trainer."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor

from fastdistill.compress.surgery import CutModel
from fastdistill.data.latents import LatentBatch
from fastdistill.diffusion.prediction import Prediction
from fastdistill.diffusion.process import RectifiedFlow
from fastdistill.diffusion.timesteps import LogitNormal
from fastdistill.models.blocks import block_ids
from fastdistill.models.hooks import Streams, captured
from fastdistill.ops import feature_kd_loss
from fastdistill.train.method import Loss, StudentMethod


@dataclass(frozen=True, kw_only=True)
class RecoveryWeights:
    """Weights of the losses on the data, the full model's output and its features; zero leaves a
    loss out."""

    task: float
    out: float
    feat: float


def feature_loss(student: Sequence[Streams], teacher: Sequence[Streams]) -> Tensor:
    """`mean over pairs and streams of ||f_S - f_T||^2 / ||f_T||^2`.

    Each term is divided by the teacher's norm, as features of FLUX differ by orders of magnitude
    between blocks and a plain sum sees only the last ones (LAPTOP-Diff, arXiv 2404.11098, section
    3.3). The text stream of the last pair is left out: nothing reads it.
    """
    terms = []
    for position, (f_s, f_t) in enumerate(zip(student, teacher, strict=True)):
        last = position == len(student) - 1
        for stream in f_t:
            if stream == "text" and last:
                continue
            terms.append(feature_kd_loss(f_s[stream], f_t[stream].to(f_s[stream].dtype), kind="relative_mse"))
    return torch.stack(terms).mean()


class Recovery(StudentMethod):
    """`L = task L_task + out L_OutKD + feat L_FeatKD` (BK-SDM, arXiv 2305.15798, equation 4; KOALA,
    arXiv 2312.04005)."""

    def __init__(self, model: CutModel, weights: RecoveryWeights) -> None:
        self.networks = {"student": model.student, "teacher": model.teacher}
        self.family, self.weights = model.family, weights
        self.process, self.times = RectifiedFlow(), LogitNormal()
        self.student_blocks = block_ids(model.student, model.family)
        self.teacher_blocks = list(model.boundaries.values())

    def loss(self, role: str, batch: LatentBatch, rng: torch.Generator) -> Loss:
        x_t, t, noise = self.process.draw(batch.latents, self.times, rng)
        data_velocity = Prediction.VELOCITY.target(self.process, batch.latents, noise, t)
        student, teacher = self.networks["student"], self.networks["teacher"]
        with ExitStack() as stack:
            student_features = stack.enter_context(
                captured(student, self.family, self.student_blocks if self.weights.feat else [])
            )
            teacher_features = stack.enter_context(
                captured(teacher, self.family, self.teacher_blocks if self.weights.feat else [])
            )
            with torch.no_grad():
                teacher_velocity = self.family.predict(teacher, x_t, t, batch.conditioning).float()
            velocity = self.family.predict(student, x_t, t, batch.conditioning).float()
        terms = {
            "task": (velocity - data_velocity).square().mean(),
            "out": (velocity - teacher_velocity).square().mean(),
        }
        if self.weights.feat:
            terms["feat"] = feature_loss(
                [student_features[block_id] for block_id in self.student_blocks],
                [teacher_features[block_id] for block_id in self.teacher_blocks],
            )
        total = torch.stack([getattr(self.weights, name) * value for name, value in terms.items()]).sum()
        return Loss(total=total, logs=terms)
