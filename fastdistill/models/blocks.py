"""Blocks of a network by name, in the order of the forward pass."""

from __future__ import annotations

from operator import attrgetter

from torch import nn

from fastdistill.models.families.family import BlockId, HasStacks, Stack


def blocks_of(network: nn.Module, stack: Stack) -> list[nn.Module]:
    """Blocks of `stack`; none if the network has no such stack."""
    return list(attrgetter(stack.attribute)(network) or ())


def block_ids(network: nn.Module, anatomy: HasStacks) -> list[BlockId]:
    """Names of all blocks in the order of the forward pass."""
    return [
        BlockId(stack=stack.attribute, index=index)
        for stack in anatomy.stacks
        for index in range(len(blocks_of(network, stack)))
    ]


def block(network: nn.Module, block_id: BlockId) -> nn.Module:
    """Block of `network` by name."""
    found: nn.Module = attrgetter(block_id.stack)(network)[block_id.index]
    return found


def tied(network: nn.Module, anatomy: HasStacks) -> dict[str, list[Stack]]:
    """Stacks whose blocks one config field counts, by that field.

    A cut has to take equally many blocks from each.
    """
    fields: dict[str, list[Stack]] = {}
    for stack in anatomy.stacks:
        if blocks_of(network, stack):
            fields.setdefault(stack.config_field, []).append(stack)
    return {field: stacks for field, stacks in fields.items() if len(stacks) > 1}
