"""Look into the blocks of a network, or skip them, without changing the network.

Each hook undoes itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

from torch import Tensor, nn

from fastdistill.models.blocks import block
from fastdistill.models.families.family import BlockId, Family, HasStacks, ReadsBlocks

Streams = dict[str, Tensor]
Result = TypeVar("Result")


@contextmanager
def captured(network: nn.Module, family: ReadsBlocks, blocks: Iterable[BlockId]) -> Iterator[dict[BlockId, Streams]]:
    """Yield the outputs of `blocks`, by stream, in the latest forward pass inside the `with`."""
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
    """Yield the inputs of `blocks`, by stream, in the latest forward pass inside the `with`."""
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
def skipped(network: nn.Module, anatomy: HasStacks, blocks: Iterable[BlockId]) -> Iterator[None]:
    """Skip `blocks` inside the `with`: they return their inputs, as if they had been cut out."""
    # Looked up before anything is replaced, so that an unknown block leaves all as it was.
    pairs = [(block(network, block_id), anatomy.stack(block_id.stack).pass_through) for block_id in blocks]
    with ExitStack() as stack:
        for module, pass_through in pairs:
            stack.enter_context(replaced(module, pass_through))
        yield


@contextmanager
def replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Run `forward` inside the `with`, in place of the module's own.

    The module's own may be its class's or a patch.
    """
    earlier = module.__dict__.get("forward")
    # On the instance: the class, and every other model of it, stays as it is.
    module.forward = forward
    try:
        yield
    finally:
        if earlier is None:
            del module.forward
        else:
            module.forward = earlier


def one_out(
    network: nn.Module, family: Family, blocks: Sequence[BlockId], run: Callable[[], Result], first: int = 0
) -> Iterator[Result]:
    """Yield `run()` without each one of `blocks[first:]` in turn.

    A run without block i differs from a run of the whole network only after block i, and starts
    there. The input of block i is kept from the run before, block i - 1 returns this input, and
    earlier blocks do nothing. Block i runs, too, for the input of the next block, but its output is
    not used. All runs without one of n blocks cost n (n + 1) / 2 - 1 blocks instead of n (n - 1),
    and hold the streams of one boundary. Between two results the network is as it was.

    Args:
        blocks: blocks that are left out, in the order of the forward pass; other blocks between
            them run as they do now.
        run: calls the network once, with the same inputs every time, without gradients.
        first: index of the block to start with. Other than 0 it costs one whole run more.
    """
    entering: Any = None

    def leave_out(index: int, keep: bool) -> Callable[..., Any]:
        own, pass_through = block(network, blocks[index]).forward, family.stack(blocks[index].stack).pass_through

        def forward(*args: Any, **kwargs: Any) -> Any:
            nonlocal entering
            if keep:
                entering = own(*args, **kwargs)
            return pass_through(*args, **kwargs)

        return forward

    if 0 < first < len(blocks):
        module = block(network, blocks[first - 1])
        own = module.forward

        def keep(*args: Any, **kwargs: Any) -> Any:
            nonlocal entering
            entering = own(*args, **kwargs)
            return entering

        with replaced(module, keep):
            run()
    for index in range(first, len(blocks)):
        with skipped(network, family, blocks[: max(0, index - 1)]), ExitStack() as stack:
            if index:
                stack.enter_context(replaced(block(network, blocks[index - 1]), lambda *_, **__: entering))
            forward = leave_out(index, keep=index + 1 < len(blocks))
            stack.enter_context(replaced(block(network, blocks[index]), forward))
            result = run()
        yield result
