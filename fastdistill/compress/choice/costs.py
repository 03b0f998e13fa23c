"""Costs of a transformer's blocks: parameters, bytes, operations, and time measured on the model
itself."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fastdistill.models.blocks import block, block_ids
from fastdistill.models.families.family import Anatomy, BlockId, Workload
from fastdistill.models.sampling import SamplingDefaults
from fastdistill.models.skeleton import skeleton_of

WARM_UP, ROUNDS = 2, 7


@dataclass(frozen=True, kw_only=True)
class Cost:
    """One quantity, in whole units: of each block in the order of the forward pass, and of
    everything outside them."""

    blocks: Mapping[BlockId, int]
    outside: int

    @property
    def total(self) -> int:
        return self.outside + sum(self.blocks.values())

    def left(self, dropped: Iterable[BlockId]) -> int:
        """The cost without `dropped`."""
        return self.total - sum(self.blocks[block_id] for block_id in set(dropped))


Costs = dict[str, Cost]
"""Costs by quantity: `params`, `memory` (bytes), `flops`, `latency` (nanoseconds), `blocks`."""


def workload(sampling: SamplingDefaults, vae_scale_factor: int, batch: int = 1) -> Workload:
    """Workload of one forward pass for `batch` images of `sampling`'s size; `vae_scale_factor` is
    in pixels per latent."""
    return Workload(
        height=sampling.height // vae_scale_factor,
        width=sampling.width // vae_scale_factor,
        text_tokens=sampling.max_sequence_length,
        batch=batch,
    )


def sizes(network: nn.Module, anatomy: Anatomy, bytes_each: int) -> Costs:
    """`blocks`, `params` and `memory`: the weights at `bytes_each` bytes. What activations take
    does not depend on the depth."""
    ids = block_ids(network, anatomy)
    counts = {block_id: sum(p.numel() for p in block(network, block_id).parameters()) for block_id in ids}
    parameters = _cost(network, anatomy, counts, sum(p.numel() for p in network.parameters()))
    return {
        "blocks": Cost(blocks=dict.fromkeys(ids, 1), outside=0),
        "params": parameters,
        "memory": Cost(
            blocks={block_id: count * bytes_each for block_id, count in parameters.blocks.items()},
            outside=parameters.outside * bytes_each,
        ),
    }


def flops(network: Any, anatomy: Anatomy, load: Workload) -> Cost:
    """Floating-point operations of one forward pass, a multiplication and an addition counting two;
    matrix products and attention only.

    Counted on the `meta` device: nothing is computed, and the network may be without weights.
    """
    skeleton = skeleton_of(type(network), network.config)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        skeleton(**anatomy.example(skeleton, load), return_dict=False)
    counts = counter.get_flop_counts()
    root = type(network).__name__
    blocks = {
        block_id: sum(counts.get(f"{root}.{block_id.stack}.{block_id.index}", {}).values())
        for block_id in block_ids(skeleton, anatomy)
    }
    return _cost(skeleton, anatomy, blocks, counter.get_total_flops())


@torch.no_grad()
def latency(network: Any, anatomy: Anatomy, load: Workload, dtype: torch.dtype | None = None) -> Cost:
    """Nanoseconds of one forward pass: medians over rounds of every block's own time, and of what
    is left of the whole.

    Equal blocks get the median of all of them. What differs between their times is noise, and a
    choice must not follow noise. The network is timed where it is, in `dtype`, for which it is
    copied, or in its own.
    """
    if dtype not in (None, network.dtype):
        network = copy.deepcopy(network).to(dtype)
    arguments = anatomy.example(network, load)
    times: dict[BlockId, list[int]] = {block_id: [] for block_id in block_ids(network, anatomy)}
    whole = []
    for measured in range(WARM_UP + ROUNDS):
        with _timed(network, times, network.device) as elapsed:
            start = _mark(network.device)
            network(**arguments, return_dict=False)
            end = _mark(network.device)
        if measured >= WARM_UP:
            of_blocks = elapsed()
            for block_id, own in times.items():
                # A block that this pass does not run takes no time.
                own.append(of_blocks.get(block_id, 0))
            whole.append(_between(start, end))
    outside = statistics.median(
        max(0, total - sum(own[round_] for own in times.values())) for round_, total in enumerate(whole)
    )
    medians: dict[BlockId, int] = {}
    for kind in _equal(network, anatomy):
        medians |= dict.fromkeys(
            kind, round(statistics.median(duration for block_id in kind for duration in times[block_id]))
        )
    blocks = {block_id: medians[block_id] for block_id in times}
    return _cost(network, anatomy, blocks, round(outside) + sum(blocks.values()))


def kinds(network: nn.Module, anatomy: Anatomy) -> list[list[BlockId]]:
    """The blocks in groups of those that cost the same."""
    twins = anatomy.full_size_twins(network)
    groups = [[block_id for block_id in group if block_id not in twins] for group in _equal(network, anatomy)]
    for group in groups:
        group += [block_id for block_id, twin in twins.items() if twin in group]
    return [sorted(group) for group in groups if group]


def _equal(network: nn.Module, anatomy: Anatomy) -> list[list[BlockId]]:
    """The blocks in groups of one stack, with parameters of the same shapes."""
    groups: dict[Any, list[BlockId]] = {}
    for block_id in block_ids(network, anatomy):
        shapes = tuple((name, parameter.shape) for name, parameter in block(network, block_id).named_parameters())
        groups.setdefault((block_id.stack, shapes), []).append(block_id)
    return list(groups.values())


def _cost(network: nn.Module, anatomy: Anatomy, blocks: Mapping[BlockId, int], total: int) -> Cost:
    """A block that its place makes smaller costs what it would elsewhere; what the place saves, it
    saves whichever block is there."""
    blocks = dict(blocks) | {block_id: blocks[twin] for block_id, twin in anatomy.full_size_twins(network).items()}
    return Cost(blocks=blocks, outside=total - sum(blocks.values()))


@contextmanager
def _timed(network: nn.Module, blocks: Iterable[BlockId], device: torch.device) -> Iterator[Any]:
    """Yields a function that tells the nanoseconds of each block in the forward pass inside the
    `with`."""
    starts: dict[BlockId, Any] = {}
    ends: dict[BlockId, Any] = {}

    def into(marks: dict[BlockId, Any], block_id: BlockId) -> Any:
        def hook(*_: Any) -> None:
            marks[block_id] = _mark(device)

        return hook

    with ExitStack() as stack:
        for block_id in blocks:
            module = block(network, block_id)
            stack.callback(module.register_forward_pre_hook(into(starts, block_id)).remove)
            stack.callback(module.register_forward_hook(into(ends, block_id)).remove)
        yield lambda: {block_id: _between(starts[block_id], ends[block_id]) for block_id in starts}


def _mark(device: torch.device) -> Any:
    """A point in time; on a GPU one of its own clock, as calls return before the work is done."""
    if device.type == "cuda":
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(device))
        return event
    return time.perf_counter_ns()


def _between(start: Any, end: Any) -> int:
    """Nanoseconds between two points in time."""
    if isinstance(start, torch.cuda.Event):
        end.synchronize()
        return round(float(start.elapsed_time(end)) * 1e6)
    return int(end - start)
