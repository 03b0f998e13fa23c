"""Cutting blocks out of a transformer, so that what is left is a stock diffusers model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from fastdistill.errors import UserError
from fastdistill.models.family import BlockId, Family
from fastdistill.models.features import block_ids
from fastdistill.models.registry import family_of


def cut(transformer: Any, drop: Mapping[str, Sequence[int]] | Iterable[BlockId]) -> Any:
    """A new transformer without the dropped blocks; the kept ones are re-indexed without gaps and copied bit by bit.

    Args:
        transformer: a diffusers transformer of a supported family; it is left as it is.
        drop: block lists with the indices to drop, ``{"transformer_blocks": [1], "single_transformer_blocks": [0, 2]}``,
            or the same as :class:`BlockId`.

    Raises:
        UserError: an unknown block, or nothing left.
    """
    family = family_of(transformer)
    dropped = _block_ids(drop)
    check(transformer, family, dropped)
    kept = [block_id for block_id in block_ids(transformer, family) if block_id not in dropped]
    config = dict(transformer.config)
    new_index: dict[tuple[str, int], int] = {}
    for stack in family.stacks:
        indices = [block_id.index for block_id in kept if block_id.stack == stack.attribute]
        config[stack.config_field] = len(indices)
        new_index |= {(stack.attribute, old): new for new, old in enumerate(indices)}
    state = {}
    for name, tensor in transformer.state_dict().items():
        attribute, _, rest = name.partition(".")
        if any(attribute == stack.attribute for stack in family.stacks):
            index, _, rest = rest.partition(".")
            if (attribute, int(index)) not in new_index:
                continue
            name = f"{attribute}.{new_index[attribute, int(index)]}.{rest}"
        state[name] = tensor.detach().clone()
    # Built without memory: initialising billions of weights only to overwrite them takes minutes.
    with torch.device("meta"):
        result = type(transformer).from_config(config)
    result.load_state_dict(state, strict=True, assign=True)
    return result.train(transformer.training)


def check(transformer: nn.Module, family: Family, dropped: Iterable[BlockId]) -> None:
    """Raise :class:`UserError` for a block that does not exist or a cut that leaves nothing."""
    existing = block_ids(transformer, family)
    short = {stack.attribute: stack.short for stack in family.stacks}
    dropped = set(dropped)
    for block_id in sorted(dropped):
        if block_id not in existing:
            counts = ", ".join(f"{stack.short}: 0-{len(getattr(transformer, stack.attribute)) - 1}" for stack in family.stacks)
            raise UserError(f"there is no block {short.get(block_id.stack, block_id.stack)}:{block_id.index}; this model has {counts}")
    if len(dropped) >= len(existing):
        raise UserError(f"dropping all {len(existing)} blocks leaves no model; drop at most {len(existing) - 1}")


def boundary_map(existing: Sequence[BlockId], dropped: Iterable[BlockId]) -> dict[BlockId, BlockId]:
    """For each kept block, the block of the full model whose output it should reproduce.

    The kept block takes over the span up to the next kept one: block ``k_j`` is matched to block ``k_{j+1} - 1`` in the order of the
    forward pass (TinyFusion and PPCL pair the last block of the replaced span; field's convention (c)). Leading dropped blocks have no
    kept block before them and are taken over by the first one.
    """
    gone = set(dropped)
    kept = [position for position, block_id in enumerate(existing) if block_id not in gone]
    ends = [*(position - 1 for position in kept[1:]), len(existing) - 1]
    return {existing[start]: existing[end] for start, end in zip(kept, ends, strict=True)}


def _block_ids(drop: Mapping[str, Sequence[int]] | Iterable[BlockId]) -> set[BlockId]:
    if isinstance(drop, Mapping):
        return {BlockId(stack=stack, index=index) for stack, indices in drop.items() for index in indices}
    return set(drop)
