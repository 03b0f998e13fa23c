"""Local weight averaging (Amber-Image): a kept block becomes the mean of itself and of the dropped
blocks it has to stand for."""

from __future__ import annotations

import torch

from fastdistill.compress.repairs.damage import Damage
from fastdistill.models.blocks import block, block_ids


@torch.no_grad()
def repair(damage: Damage) -> None:
    """`W_l <- mean(W_l, ..., W_{l+k})` over every parameter; dropped blocks of another kind than
    the kept one cannot take part."""
    existing = block_ids(damage.teacher, damage.family)
    spans = damage.spans()
    for index, span in enumerate(spans):
        first, last = existing.index(span.kept), existing.index(span.target)
        alike = [block_id for block_id in existing[first : last + 1] if block_id.stack == span.kept.stack]
        sources = [block(damage.teacher, block_id).state_dict() for block_id in alike]
        for name, parameter in block(damage.student, span.block).named_parameters():
            parameter.copy_(torch.stack([source[name].float() for source in sources]).mean(dim=0))
        damage.tick((index + 1) / len(spans))
