"""Names of the blocks of a network: which there are, in which order, and where."""

from __future__ import annotations

from operator import attrgetter

from torch import nn

from fastdistill.models.families.family import Anatomy, BlockId, Stack


def blocks_of(network: nn.Module, stack: Stack) -> list[nn.Module]:
    """The blocks of `stack`; none if this network goes without."""
    return list(attrgetter(stack.attribute)(network) or ())


def block_ids(network: nn.Module, anatomy: Anatomy) -> list[BlockId]:
    """Every block in the order of the forward pass."""
    return [BlockId(stack=stack.attribute, index=index) for stack in anatomy.stacks for index in range(len(blocks_of(network, stack)))]


def block(network: nn.Module, block_id: BlockId) -> nn.Module:
    found: nn.Module = attrgetter(block_id.stack)(network)[block_id.index]
    return found


def tied(network: nn.Module, anatomy: Anatomy) -> dict[str, list[Stack]]:
    """Stacks of which one config field counts the blocks, by that field: a cut has to take equally many from each."""
    fields: dict[str, list[Stack]] = {}
    for stack in anatomy.stacks:
        if blocks_of(network, stack):
            fields.setdefault(stack.config_field, []).append(stack)
    return {field: stacks for field, stacks in fields.items() if len(stacks) > 1}
