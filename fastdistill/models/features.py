"""Look into, and step over, the blocks of a network without changing it: both undo themselves."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from operator import attrgetter
from typing import Any

from torch import Tensor, nn

from fastdistill.models.family import Anatomy, BlockId, Family, Stack

Streams = dict[str, Tensor]


def blocks_of(network: nn.Module, stack: Stack) -> list[nn.Module]:
    """The blocks of ``stack``; none if this network goes without."""
    return list(attrgetter(stack.attribute)(network) or ())


def block_ids(network: nn.Module, anatomy: Anatomy) -> list[BlockId]:
    """Every block in the order of the forward pass."""
    return [BlockId(stack=stack.attribute, index=index) for stack in anatomy.stacks for index in range(len(blocks_of(network, stack)))]


def block(network: nn.Module, block_id: BlockId) -> nn.Module:
    found: nn.Module = attrgetter(block_id.stack)(network)[block_id.index]
    return found


@contextmanager
def captured(network: nn.Module, family: Family, blocks: Iterable[BlockId]) -> Iterator[dict[BlockId, Streams]]:
    """The outputs of ``blocks``, by stream, of the latest forward pass inside the ``with``."""
    outputs: dict[BlockId, Streams] = {}

    def hook(block_id: BlockId) -> Any:
        def keep(_module: nn.Module, _args: Any, output: Any) -> None:
            outputs[block_id] = dict(family.streams(output))

        return keep

    with ExitStack() as stack:
        for block_id in blocks:
            stack.callback(block(network, block_id).register_forward_hook(hook(block_id)).remove)
        yield outputs


@contextmanager
def captured_inputs(network: nn.Module, family: Family, blocks: Iterable[BlockId]) -> Iterator[dict[BlockId, Streams]]:
    """The inputs of ``blocks``, by stream, of the latest forward pass inside the ``with``."""
    inputs: dict[BlockId, Streams] = {}

    def hook(block_id: BlockId) -> Any:
        def keep(_module: nn.Module, args: Any, kwargs: Any) -> None:
            inputs[block_id] = dict(family.streams(family.stack(block_id.stack).pass_through(*args, **kwargs)))

        return keep

    with ExitStack() as stack:
        for block_id in blocks:
            stack.callback(block(network, block_id).register_forward_pre_hook(hook(block_id), with_kwargs=True).remove)
        yield inputs


@contextmanager
def skipped(network: nn.Module, anatomy: Anatomy, blocks: Iterable[BlockId]) -> Iterator[None]:
    """Inside the ``with``, ``blocks`` hand their inputs on unchanged, as if they had been cut out."""
    pairs = [(block(network, block_id), anatomy.stack(block_id.stack).pass_through) for block_id in blocks]
    with ExitStack() as stack:
        for module, pass_through in pairs:
            earlier = module.__dict__.get("forward")
            # On the instance: the class, and every other model of it, stays as it is.
            module.forward = pass_through
            stack.callback(_restore, module, earlier)
        yield


def _restore(module: nn.Module, earlier: Any) -> None:
    if earlier is None:
        del module.forward
    else:
        module.forward = earlier
