"""What a transformer's blocks cost: parameters, bytes, operations, and time measured on the model itself."""

from __future__ import annotations

import copy
import dataclasses
import statistics
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fastdistill.models.family import BlockId, Conditioning, Family
from fastdistill.models.features import block, block_ids
from fastdistill.models.sampling import SamplingDefaults

WARM_UP, ROUNDS = 2, 7


@dataclass(frozen=True, kw_only=True)
class Cost:
    """One quantity, in whole units: of each block in the order of the forward pass, and of everything outside them."""

    blocks: Mapping[BlockId, int]
    outside: int

    @property
    def total(self) -> int:
        return self.outside + sum(self.blocks.values())

    def left(self, dropped: Iterable[BlockId]) -> int:
        """The cost without ``dropped``."""
        return self.total - sum(self.blocks[block_id] for block_id in set(dropped))


Costs = dict[str, Cost]
"""By quantity: ``params``, ``memory`` (bytes), ``flops``, ``latency`` (nanoseconds), ``blocks``."""


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What one forward pass takes."""

    x_t: Tensor
    t: Tensor
    conditioning: Conditioning

    def map(self, change: Any) -> Inputs:
        """With every tensor changed."""
        fields = {field.name: getattr(self.conditioning, field.name) for field in dataclasses.fields(self.conditioning)}
        conditioning = dataclasses.replace(
            self.conditioning, **{name: change(value) for name, value in fields.items() if isinstance(value, Tensor)}
        )
        return Inputs(x_t=change(self.x_t), t=change(self.t), conditioning=conditioning)


def inputs_of(pipeline: Any, family: Family, sampling: SamplingDefaults, batch: int) -> Inputs:
    """Inputs of a pipeline's transformer as it gets them when it draws ``batch`` pictures of ``sampling``'s size."""
    conditioning = family.encode_prompts(pipeline, [""] * batch, sampling.guidance_scale, sampling.max_sequence_length)
    shape = family.latent_shape(pipeline, sampling.height, sampling.width)
    x_t = torch.randn(batch, *shape, generator=torch.Generator().manual_seed(0)).to(conditioning.prompt_embeds)
    return Inputs(x_t=x_t, t=x_t.new_full((batch,), 0.5), conditioning=conditioning)


def sizes(network: nn.Module, family: Family, bytes_each: int) -> Costs:
    """``blocks``, ``params`` and ``memory``: the weights at ``bytes_each`` bytes. What activations take does not depend on the depth."""
    parameters = {block_id: sum(p.numel() for p in block(network, block_id).parameters()) for block_id in block_ids(network, family)}
    outside = sum(p.numel() for p in network.parameters()) - sum(parameters.values())
    return {
        "blocks": Cost(blocks=dict.fromkeys(parameters, 1), outside=0),
        "params": Cost(blocks=parameters, outside=outside),
        "memory": Cost(blocks={block_id: count * bytes_each for block_id, count in parameters.items()}, outside=outside * bytes_each),
    }


def flops(network: Any, family: Family, inputs: Inputs) -> Cost:
    """Floating-point operations of one forward pass, a multiplication and an addition counting two; matrix products and attention only.

    Counted on the ``meta`` device: nothing is computed, and the network may be without weights.
    """
    skeleton = skeleton_of(type(network), network.config)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        # In the dtype of the skeleton: products of two dtypes are refused even where nothing is computed.
        meta = inputs.map(lambda tensor: torch.empty_like(tensor, device="meta", dtype=skeleton.dtype))
        family.predict(skeleton, meta.x_t, meta.t, meta.conditioning)
    counts = counter.get_flop_counts()
    root = type(network).__name__
    blocks = {
        block_id: sum(counts.get(f"{root}.{block_id.stack}.{block_id.index}", {}).values()) for block_id in block_ids(skeleton, family)
    }
    return Cost(blocks=blocks, outside=counter.get_total_flops() - sum(blocks.values()))


def skeleton_of(transformer_class: Any, config: Mapping[str, Any]) -> Any:
    """A transformer without weights."""
    with torch.device("meta"):
        return transformer_class.from_config(config).eval()


@torch.no_grad()
def latency(network: nn.Module, family: Family, inputs: Inputs) -> Cost:
    """Nanoseconds of one forward pass: medians over rounds of every block's own time, and of what is left of the whole.

    Equal blocks get the median of all of them. What differs between their times is noise, and a choice must not follow noise.
    """
    times: dict[BlockId, list[int]] = {block_id: [] for block_id in block_ids(network, family)}
    outside = []
    for measured in range(WARM_UP + ROUNDS):
        with _timed(network, times, inputs.x_t.device) as elapsed:
            start = _mark(inputs.x_t.device)
            family.predict(network, inputs.x_t, inputs.t, inputs.conditioning)
            end = _mark(inputs.x_t.device)
        if measured >= WARM_UP:
            of_blocks = elapsed()
            for block_id, duration in of_blocks.items():
                times[block_id].append(duration)
            outside.append(max(0, _between(start, end) - sum(of_blocks.values())))
    blocks: dict[BlockId, int] = {}
    for kind in kinds(network, family):
        median = round(statistics.median(duration for block_id in kind for duration in times[block_id]))
        blocks |= dict.fromkeys(kind, median)
    return Cost(blocks={block_id: blocks[block_id] for block_id in times}, outside=round(statistics.median(outside)))


def as_dtype(network: Any, inputs: Inputs, dtype: torch.dtype) -> tuple[Any, Inputs]:
    """The network, or a copy of it, and the inputs in ``dtype``."""
    if network.dtype != dtype:
        network = copy.deepcopy(network).to(dtype)
    return network, inputs.map(lambda tensor: tensor.to(dtype))


def kinds(network: nn.Module, family: Family) -> list[list[BlockId]]:
    """The blocks in groups of equal ones: of one stack, with parameters of the same shapes."""
    groups: dict[Any, list[BlockId]] = {}
    for block_id in block_ids(network, family):
        shapes = tuple((name, parameter.shape) for name, parameter in block(network, block_id).named_parameters())
        groups.setdefault((block_id.stack, shapes), []).append(block_id)
    return list(groups.values())


@contextmanager
def _timed(network: nn.Module, blocks: Iterable[BlockId], device: torch.device) -> Iterator[Any]:
    """Yields a function that tells the nanoseconds of each block in the forward pass inside the ``with``."""
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
    """Nanoseconds."""
    if isinstance(start, torch.cuda.Event):
        end.synchronize()
        return round(float(start.elapsed_time(end)) * 1e6)
    return int(end - start)
