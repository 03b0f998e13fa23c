"""Estimate of the memory that a run needs, before the run begins."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor, nn

from fastdistill.run.resources import GIB
from fastdistill.train import parallel
from fastdistill.train.config import RoleConfig, TrainConfig
from fastdistill.train.method import Method

# bitsandbytes' AdamW8bit: a byte a moment with a float32 for each 256, and float32 for small
# tensors.
EIGHT_BIT_BLOCK, EIGHT_BIT_LEAST = 256, 4096


@dataclass(frozen=True, kw_only=True)
class Item:
    """Part of the device's memory in each process, in bytes."""

    role: str
    what: str
    dtype: str
    bytes: int


def memory(method: Method, config: TrainConfig, processes: int = 1) -> list[Item]:
    """Memory of weights, gradients, moments and averages.

    The method's networks may be on the meta device. One role has gradients at a time, so that only
    the largest set is in the list. Each of several processes puts together a part of the network
    that runs: all that is outside of blocks, and two blocks, the one that runs and the next, with
    their gradients. The largest such part is in the list.

    Not in the list are activations, which depend on the method, the batch size and gradient
    checkpointing; networks that the method does not hold (text encoders, autoencoder); and, while
    an average is evaluated, another set of the student's trained weights.
    """
    items: list[Item] = []
    gradients: list[list[Item]] = []
    together: list[Item] = []
    seen: set[int] = set()
    for role, network in method.networks.items():
        tensors = [tensor for tensor in (*network.parameters(), *network.buffers()) if id(tensor) not in seen]
        seen |= {id(tensor) for tensor in tensors}
        items += _by_dtype(role, "weights", tensors, processes)
        copies = 2 if role in method.trains else 1
        together.append(Item(role=role, what="put together", dtype="", bytes=_together(network) * copies))
        if role in method.trains:
            parameters = list(network.parameters())
            gradients.append(_by_dtype(role, "gradients", parameters, processes))
            items += _moments(role, parameters, config.of(role), processes)
            if config.of(role).ema_decay is not None:
                average = sum(parameter.numel() for parameter in parameters) * torch.float32.itemsize // processes
                items.append(Item(role=role, what="average", dtype="float32", bytes=average))
    items += max(gradients, key=lambda found: sum(item.bytes for item in found))
    return [*items, max(together, key=lambda item: item.bytes)] if processes > 1 else items


def dry_run(method: Method, config: TrainConfig, processes: int = 1) -> str:
    """Resolved configuration and `memory`, as text."""
    items = memory(method, config, processes)
    rows = [(item.role, item.what, item.dtype, item.bytes) for item in items]
    rows.append(("in all", "", "", sum(item.bytes for item in items)))
    lines = [f"{role:14} {what:22} {dtype:10} {size / GIB:9.3f} GiB" for role, what, dtype, size in rows]
    share = f"in each of {processes} processes, " if processes > 1 else ""
    return "\n".join(
        [json.dumps(dataclasses.asdict(config), indent=1), "", f"memory {share}without activations:", *lines]
    )


def _by_dtype(role: str, what: str, tensors: Iterable[Tensor], processes: int) -> list[Item]:
    def name(tensor: Tensor) -> str:
        return str(tensor.dtype).removeprefix("torch.")

    groups = groupby(sorted(tensors, key=name), key=name)
    return [
        Item(role=role, what=what, dtype=dtype, bytes=sum(tensor.nbytes for tensor in group) // processes)
        for dtype, group in groups
    ]


def _moments(role: str, parameters: list[nn.Parameter], config: RoleConfig, processes: int) -> list[Item]:
    if config.optimizer == "adamw":
        items = _by_dtype(role, "two moments", parameters, processes)
        return [dataclasses.replace(item, bytes=2 * item.bytes) for item in items]
    large = [parameter.numel() for parameter in parameters if parameter.numel() >= EIGHT_BIT_LEAST]
    small = sum(parameter.numel() for parameter in parameters) - sum(large)
    scales = sum(-(-count // EIGHT_BIT_BLOCK) for count in large)
    return [
        Item(role=role, what="two moments", dtype="8 bits", bytes=2 * (sum(large) + scales * torch.float32.itemsize)),
        Item(role=role, what="two moments, small", dtype="float32", bytes=2 * small * torch.float32.itemsize),
    ]


def _together(network: nn.Module) -> int:
    sizes = sorted(_size(block) for block in parallel.blocks(network))
    return _size(network) - sum(sizes[:-2])


def _size(module: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in module.parameters())
