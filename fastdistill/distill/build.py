"""From the options of a run to its method and its training, with networks that may be without weights."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable
from typing import Any

import torch

from fastdistill.distill.config import REFERENCE_WIDTH, DistillConfig
from fastdistill.distill.methods import METHODS
from fastdistill.distill.methods.discriminator import inner_dim
from fastdistill.distill.methods.distillation import Distillation
from fastdistill.errors import UserError
from fastdistill.models.families import family_of
from fastdistill.models.guidance_embedder import embeds_guidance, with_guidance_embedder
from fastdistill.models.loading import default_device, dtype_on
from fastdistill.models.sampling import SamplingDefaults
from fastdistill.models.skeleton import read_config, skeleton_of
from fastdistill.train.config import RoleConfig, TrainConfig
from fastdistill.train.estimate import Item, dry_run, memory

# What teacher and student take and return has to be the same.
INTERFACE = ("in_channels", "out_channels", "patch_size", "joint_attention_dim", "pooled_projection_dim")


def build(
    config: DistillConfig, teacher: Any, student: Any | None, sampling: SamplingDefaults, *, shift: float = 1.0, unconditional: Any
) -> Distillation:
    """The method of ``config`` on ``teacher``, with a float32 student that starts from the weights of ``student``, or of the teacher.

    Args:
        sampling: of the teacher, with which guidance it teaches.
        unconditional: the conditioning of the empty prompt, of one sample.

    Raises:
        UserError: teacher and student, or one of them and the method, do not go together.
    """
    method = METHODS[config.method]
    fitted = config.options.resolved(config.steps, config.training_steps)
    options = dataclasses.replace(fitted, true_cfg_scale=sampling.true_cfg_scale, guidance_scale=sampling.guidance_scale)
    if student is not None:
        _check_interface(teacher, student)
    student = copy.deepcopy(teacher if student is None else student).float()
    if options.guidance_range is not None and not method.may_average_guidance and not embeds_guidance(student):
        student = with_guidance_embedder(student)
    # The heads of a discriminator begin at random.
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
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
    """How the roles of ``method`` are trained; only the student's weights are averaged."""
    scale = REFERENCE_WIDTH / inner_dim(method.networks["student"])
    common: dict[str, Any] = {
        "warmup_steps": min(20, config.training_steps),
        "optimizer": config.optimizer,
        "betas": config.betas,
    }
    rates = config.options.learning_rates
    roles = {
        role: RoleConfig(learning_rate=rates.get(role, config.learning_rate) * scale, ema_decay=None, **common)
        for role in method.trains
        if role != "student"
    }
    return TrainConfig(
        steps=config.training_steps,
        learning_rate=config.learning_rate * scale,
        ema_decay=config.ema_decay,
        roles=roles,
        micro_batches=config.micro_batches,
        precision=config.precision,
        seed=config.seed,
        log_every=10,
        checkpoint_every=100,
        tensorboard=config.tensorboard,
        **common,
    )


def plan(config: DistillConfig) -> str:
    """``--dry-run``: the resolved settings of training and the memory it needs, by the models' configs alone."""
    teacher, sampling, _ = read_config(config.model)
    student = read_config(config.student)[0] if config.student else None
    teacher.to(dtype_on(config.device or default_device()))
    method = build(config, teacher, student, sampling.replaced(config.sampling), unconditional=())
    return dry_run(method, training(config, method))


def requirements(config: DistillConfig, teacher: Any, student: Any | None, sampling: SamplingDefaults) -> tuple[int, int]:
    """Bytes of memory that training takes beside the teacher, without activations, and bytes of disk for its checkpoints.

    Raises:
        UserError: :func:`build` does.
    """
    bare_teacher = skeleton_of(type(teacher), teacher.config).to(teacher.dtype)
    bare_student = None if student is None else skeleton_of(type(student), student.config)
    method = build(config, bare_teacher, bare_student, sampling, unconditional=())
    items = memory(method, training(config, method))
    # The newest checkpoint is there until the next one is written.
    kept = _total(item for item in items if item.role != "teacher" and item.what != "gradients")
    return _total(item for item in items if item.role != "teacher"), 2 * kept


def _total(items: Iterable[Item]) -> int:
    return sum(item.bytes for item in items)


def _check_interface(teacher: Any, student: Any) -> None:
    if type(teacher) is not type(student):
        raise UserError(
            f"the teacher is a {type(teacher).__name__} and the student a {type(student).__name__}; give a --student of its class"
        )
    for name in INTERFACE:
        wanted, found = teacher.config.get(name), student.config.get(name)
        if wanted != found:
            raise UserError(f"the teacher has {name} {wanted} and the student {found}; give a --student that takes what the teacher does")
