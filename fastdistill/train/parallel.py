"""Several processes with a part of every network each: torchrun, FSDP2.

One process runs the same code and needs no process group.

Every process draws a step's whole batch and takes its share of the `micro_batches`, each of which
has noise of its own. The process that computes a part changes nothing but the order in which
gradients are added. A run gives the same losses in every layout, and checkpoints, which hold whole
tensors, go from one layout to another.

A process has to call a network as often as the others do, as the processes exchange its weights. A
method that draws how often a network is called does so in `before_step` of `BeforeStep`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, distributed, nn

# What is imported in the functions below costs half a second, and most runs are of one process.


@contextmanager
def processes() -> Iterator[None]:
    """Join the processes that torchrun has started into a group inside the block.

    Each process has a GPU of its own if there are GPUs.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    distributed.init_process_group()
    try:
        yield
    finally:
        distributed.destroy_process_group()


def world_size() -> int:
    """Number of processes."""
    return distributed.get_world_size() if _grouped() else 1


def rank() -> int:
    """Number of this process, from 0."""
    return distributed.get_rank() if _grouped() else 0


def shard(network: nn.Module) -> None:
    """Give every one of several processes a part of each tensor of `network`, trained or frozen.

    A network's blocks, the members of its outermost module lists, are put together one at a time
    where they run, and then all that is outside of the blocks. Gradients are averaged over the
    processes. The classes of these modules get other names: a network is patched and its family
    looked up before.
    """
    if world_size() == 1:
        return
    from torch.distributed.fsdp import FSDPModule, fully_shard

    if isinstance(network, FSDPModule):
        return  # a network with two roles
    # By default what is outside of blocks would stay whole until a backward pass that may never
    # come, and be no parameter to a method.
    for module in (*blocks(network), network):
        fully_shard(module, reshard_after_forward=True)


def blocks(network: nn.Module) -> list[nn.Module]:
    """Members with parameters of the outermost module lists."""
    if isinstance(network, nn.ModuleList):
        return [block for block in network if any(True for _ in block.parameters())]
    return [block for child in network.children() for block in blocks(child)]


def full(tensor: Tensor) -> Tensor:
    """Whole tensor of one that may be sharded; all processes call this together."""
    if world_size() == 1:
        return tensor
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gathered(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Whole tensors in the memory of the first process, and an empty dict in the others.

    All processes call this together. Whole tensors are put together one at a time: a GPU needs room
    for the largest, and the first process's host for all.
    """
    if world_size() == 1:
        return dict(tensors)
    whole = ((name, full(tensor)) for name, tensor in tensors.items())
    return {name: tensor.cpu() for name, tensor in whole if rank() == 0}


def placed(whole: Tensor, like: Tensor) -> Tensor:
    """Part of `whole` for this process, on the device of `like`; all of it unless `like` is
    sharded.
    """
    if world_size() > 1:
        from torch.distributed.tensor import DTensor, distribute_tensor

        if isinstance(like, DTensor):
            # Every process has read all of it, so that nothing need be sent.
            return distribute_tensor(whole.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
    return whole.to(like.device)


def averaged(values: Mapping[str, Tensor]) -> dict[str, float]:
    """Mean over the processes of scalars that have the same names in each."""
    numbers = {name: float(full(value)) for name, value in values.items()}
    if world_size() > 1 and numbers:
        total = torch.tensor(list(numbers.values()), dtype=torch.float64)
        distributed.all_reduce(total)
        numbers = dict(zip(numbers, (total / world_size()).tolist(), strict=True))
    return numbers


def agreed(decision: bool) -> bool:
    """Decision of the first process, in every process; all call this together."""
    if world_size() == 1:
        return decision
    told = torch.tensor([decision], dtype=torch.float64)
    if rank() > 0:
        told.zero_()
    distributed.all_reduce(told)
    return bool(told.item())


def wait() -> None:
    """Wait until all processes are here."""
    if world_size() > 1:
        distributed.barrier()


def _grouped() -> bool:
    return distributed.is_available() and distributed.is_initialized()
