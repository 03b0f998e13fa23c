"""From the options of a run to its method and its training, with networks that may be without
weights."""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass
from typing import Any

import torch

from fastdistill.distill.config import REFERENCE_WIDTH, DistillConfig
from fastdistill.distill.methods import METHODS
from fastdistill.distill.methods.discriminator import inner_dim
from fastdistill.distill.methods.distillation import Distillation
from fastdistill.errors import UserError
from fastdistill.job import train_config
from fastdistill.models.families import family_of
from fastdistill.models.guidance_embedder import embeds_guidance, with_guidance_embedder
from fastdistill.models.loading import default_device, dtype_on
from fastdistill.models.sampling import SamplingDefaults
from fastdistill.models.skeleton import read_config, skeleton_of
from fastdistill.train.config import RoleConfig, TrainConfig
from fastdistill.train.estimate import dry_run

INTERFACE = ("in_channels", "out_channels", "patch_size", "joint_attention_dim", "pooled_projection_dim")
"""Config fields in which teacher and student have to agree."""


@dataclass(frozen=True, kw_only=True)
class Models:
    """Transformers that a run begins with, and how the teacher is sampled."""

    teacher: Any
    student: Any | None
    """Weights to start from; None: the teacher's."""
    sampling: SamplingDefaults

    def without_weights(self) -> Models:
        """Equal models on the meta device."""
        teacher = skeleton_of(type(self.teacher), self.teacher.config).to(self.teacher.dtype)
        student = None if self.student is None else skeleton_of(type(self.student), self.student.config)
        return dataclasses.replace(self, teacher=teacher, student=student)


def build(config: DistillConfig, models: Models, *, shift: float = 1.0, unconditional: Any = ()) -> Distillation:
    """Method of `config` on `models`, with a float32 student.

    Args:
        unconditional: the conditioning of the empty prompt, of one sample.

    Raises:
        UserError: teacher and student, or one of them and the method, do not go together.
    """
    method, teacher, sampling = METHODS[config.method], models.teacher, models.sampling
    resolved = config.options.resolved(config.steps, config.training.training_steps)
    options = dataclasses.replace(
        resolved, true_cfg_scale=sampling.true_cfg_scale, guidance_scale=sampling.guidance_scale
    )
    if models.student is not None:
        _check_interface(teacher, models.student)
    student = copy.deepcopy(teacher if models.student is None else models.student).float()
    if options.guidance_range is not None and not method.may_average_guidance and not embeds_guidance(student):
        student = with_guidance_embedder(student)
    # The heads of a discriminator begin at random.
    with torch.random.fork_rng():
        torch.manual_seed(config.run.seed)
        return method(
            options,
            student=student.train(),
            teacher=teacher,
            family=family_of(teacher),
            steps=config.steps,
            shift=shift,
            unconditional=unconditional,
        )


def training(config: DistillConfig, method: Distillation) -> TrainConfig:
    """Training of the roles of `method`; only the student's weights are averaged."""
    scale = REFERENCE_WIDTH / inner_dim(method.student.network)
    student = train_config(config.training, steps=config.training.training_steps, seed=config.run.seed, scale=scale)
    rates = config.options.learning_rates
    roles = {
        role: RoleConfig(
            learning_rate=rates.get(role, config.training.learning_rate) * scale,
            ema_decay=None,
            warmup_steps=student.warmup_steps,
            optimizer=student.optimizer,
            betas=student.betas,
        )
        for role in method.trains
        if role != "student"
    }
    return dataclasses.replace(student, roles=roles)


def plan(config: DistillConfig) -> str:
    """Resolved settings of training and the memory it needs, by the models' configs alone
    (`--dry-run`)."""
    teacher, sampling, _ = read_config(config.run.model)
    student = read_config(config.student)[0] if config.student else None
    teacher.to(dtype_on(config.run.device or default_device()))
    method = build(config, Models(teacher=teacher, student=student, sampling=sampling.replaced(config.sampling)))
    return dry_run(method, training(config, method))


def _check_interface(teacher: Any, student: Any) -> None:
    if type(teacher) is not type(student):
        raise UserError(
            f"the teacher is a {type(teacher).__name__} and the student a {type(student).__name__}; "
            "give a --student of its class"
        )
    for name in INTERFACE:
        wanted, found = teacher.config.get(name), student.config.get(name)
        if wanted != found:
            raise UserError(
                f"the teacher has {name} {wanted} and the student {found}; "
                "give a --student that takes what the teacher does"
            )
