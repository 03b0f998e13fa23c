"""Whether a smaller model is the full one without the blocks that somebody names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastdistill.compress.surgery import CutModel
from fastdistill.errors import UserError
from fastdistill.models.blocks import block, block_ids
from fastdistill.models.families.family import Anatomy, BlockId
from fastdistill.models.weights import check_computable

CASTS = (torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2)
"""Types that a model may have been rounded to before it came to its own."""


def check_kept(model: CutModel) -> None:
    """Raise `UserError` unless the student has just the kept blocks, and is as the full model else.

    Tensors are compared bit by bit, in the student's dtype. The layers that a repair fits may have
    been repaired before.
    """
    student, teacher, family = model.student, model.teacher, model.family
    if type(student) is not type(teacher):
        raise UserError(
            f"the smaller model is a {type(student).__name__}; give the {type(teacher).__name__} that cut() returned"
        )
    check_computable(student, "the smaller model's")
    check_device(student, teacher)
    own, kept = block_ids(student, family), list(model.boundaries)
    if len(own) != len(kept):
        raise UserError(
            f"the smaller model has {len(own)} blocks, and without these {len(kept)} would be left; "
            "give the blocks that were cut"
        )
    for own_id, kept_id in zip(own, kept, strict=True):
        if own_id.stack != kept_id.stack or not _is_copy(model, own_id, kept_id):
            raise UserError(
                f"block {_spelled(own_id, family)} of the smaller model is not the full model's "
                f"{_spelled(kept_id, family)}, which would be there without these blocks{_found(model, own_id)}; "
                "give the blocks that were cut, and repair a model before it is trained"
            )
    stacks = tuple(f"{stack.attribute}." for stack in family.stacks)
    _check_rest(*(_tensors(network, without=stacks) for network in (student, teacher)))


def check_device(student: Any, teacher: Any) -> None:
    """Raise `UserError` unless both are on one device."""
    if student.device != teacher.device:
        raise UserError(
            f"the smaller model is on {student.device} and the full one on {teacher.device}; "
            f"give smaller.to({str(teacher.device)!r})"
        )


def _check_rest(own: dict[str, Tensor], full: dict[str, Tensor]) -> None:
    for name in sorted(own.keys() | full.keys()):
        if name not in own or name not in full or not _same(own[name], full[name]):
            raise UserError(
                f"{name} of the smaller model is not the full model's; repair what cut() returned, "
                "before it is trained or has adapters"
            )


def _is_copy(model: CutModel, own_id: BlockId, kept_id: BlockId) -> bool:
    fitted = tuple(f"{closing.linear}." for closing in model.family.stack(own_id.stack).closings)
    own, full = (
        _tensors(block(network, block_id), without=fitted)
        for network, block_id in ((model.student, own_id), (model.teacher, kept_id))
    )
    return own.keys() == full.keys() and all(_same(own[name], full[name]) for name in own)


def _found(model: CutModel, own_id: BlockId) -> str:
    """Which block of the full model it is, if it is one."""
    candidates: Sequence[BlockId] = [
        block_id for block_id in block_ids(model.teacher, model.family) if block_id.stack == own_id.stack
    ]
    found = next((block_id for block_id in candidates if _is_copy(model, own_id, block_id)), None)
    return f": it is {_spelled(found, model.family)}" if found else ""


def _spelled(block_id: BlockId, family: Anatomy) -> str:
    return f"{family.stack(block_id.stack).short}:{block_id.index}"


def _tensors(module: nn.Module, *, without: tuple[str, ...]) -> dict[str, Tensor]:
    return {name: value for name, value in module.state_dict().items() if not name.startswith(without)}


def _same(own: Tensor, full: Tensor) -> bool:
    """Whether `own` has the values of `full`, perhaps rounded to a shorter type on the way."""
    if own.shape != full.shape:
        return False
    return torch.equal(own, full.to(own.dtype)) or any(torch.equal(own, full.to(cast).to(own.dtype)) for cast in CASTS)
