"""Cutting blocks out of a transformer, so that what is left is a stock diffusers model."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from accelerate import init_empty_weights
from torch import Tensor, nn

from fastdistill.compress.naming import Drop, spelled_out
from fastdistill.compress.settings import check_present, keep_settings, new_name_of
from fastdistill.errors import UserError
from fastdistill.models.blocks import block_ids, blocks_of, tied
from fastdistill.models.families import anatomy_of
from fastdistill.models.families.family import Anatomy, BlockId, Family
from fastdistill.models.weights import is_plain


@dataclass(frozen=True, kw_only=True)
class CutModel:
    """A cut model, the full one, and where both should agree.

    Attributes:
        student: the cut model.
        teacher: the full one.
        boundaries: for each kept block of the full model, in the order of the cut one's, the block
            whose output it should give.
    """

    student: nn.Module
    teacher: nn.Module
    family: Family
    boundaries: Mapping[BlockId, BlockId]


def cut_model(teacher: nn.Module, family: Family, dropped: Iterable[BlockId]) -> CutModel:
    """The teacher with a copy of it that lacks `dropped`."""
    gone = list(dropped)
    boundaries = boundary_map(block_ids(teacher, family), gone)
    return CutModel(student=cut(teacher, gone), teacher=teacher, family=family, boundaries=boundaries)


def cut(transformer: Any, drop: Drop) -> Any:
    """A new transformer without the dropped blocks; the kept ones are re-indexed without gaps and
    copied bit by bit.

    The result computes what the whole transformer computes with these blocks skipped. It is a model
    of the same class with a smaller config, so that `save_pretrained` and stock `from_pretrained`
    work. What depends on a block's place follows (`Anatomy.adapt_to_cut`).

    Every parameter keeps its dtype, its device and whether it is trained, every module whether it
    is in training. Gradient checkpointing, attention processors with their backends, quantised
    layers and layerwise casting are kept. Patches, forward hooks, caches, offloading and
    compilation are not: set them up on the result.

    Args:
        transformer: a diffusers transformer of a supported family; it is left as it is.
        drop: the blocks, as the command takes them (`"double:1 single:0,2"`), as lists of blocks by
            attribute or short name with the indices
            (`{"transformer_blocks": [1], "single": [0, 2]}`), or as `BlockId`.

    Raises:
        UserError: an unsupported class, an unknown block, nothing left, lists with one count cut
            unequally, weights that are not in memory, or parameters that the config does not
            describe, as adapters and fused projections are.
    """
    anatomy = anatomy_of(transformer)
    dropped = spelled_out(drop, anatomy)
    check(transformer, anatomy, dropped)
    check_present(transformer)
    stacks = [stack for stack in anatomy.stacks if blocks_of(transformer, stack)]
    kept = {
        stack.attribute: [
            index
            for index in range(len(blocks_of(transformer, stack)))
            if BlockId(stack=stack.attribute, index=index) not in dropped
        ]
        for stack in stacks
    }
    # from_config puts the defaults back where the record says that they were used.
    config = {name: value for name, value in transformer.config.items() if name != "_use_default_values"}
    config |= {stack.config_field: len(kept[stack.attribute]) for stack in stacks}
    layers = _quantised_layers(transformer, kept)
    state = {
        new_name: tensor.detach().clone()
        for name, tensor in transformer.state_dict().items()
        if (new_name := new_name_of(name, kept)) is not None and _owner(new_name, layers) is None
    }
    try:
        anatomy.adapt_to_cut(transformer, kept, config, state)
    except (KeyError, RuntimeError, NotImplementedError) as error:
        if all(map(is_plain, transformer.parameters())):
            raise
        raise UserError(
            f"this cut changes weights of the {type(transformer).__name__} that are quantised; "
            "cut the model first, and quantise the result"
        ) from error
    # Initialising billions of weights only to overwrite them takes minutes. What is no parameter is
    # built as it will be when stock diffusers, which does the same, loads the result: Qwen-Image's
    # rotary tables, Chroma's row numbers.
    with init_empty_weights():
        result = type(transformer).from_config(config)
    described = {name for name in result.state_dict() if _owner(name, layers) is None}
    strangers = sorted(state.keys() ^ described)
    if strangers:
        raise UserError(
            f"the config of this {type(transformer).__name__} does not account for {strangers[0]} and "
            f"{len(strangers) - 1} more; load it again, or unload adapters and unfuse projections before cutting"
        )
    result.load_state_dict(state, assign=True, strict=not layers)
    _place_buffers(result, transformer, state)
    for name, layer in layers.items():
        result.set_submodule(name, _copied(layer))
    keep_settings(result, transformer, kept)
    return result


def check(transformer: nn.Module, anatomy: Anatomy, dropped: Iterable[BlockId]) -> None:
    """Raise `UserError` for a block that does not exist, a cut that leaves nothing, or lists with
    one count cut unequally."""
    existing = block_ids(transformer, anatomy)
    short = {stack.attribute: stack.short for stack in anatomy.stacks}
    dropped = set(dropped)
    for block_id in sorted(dropped):
        if block_id not in existing:
            ends = {stack.short: len(blocks_of(transformer, stack)) - 1 for stack in anatomy.stacks}
            counts = ", ".join(f"{name}: 0-{end}" for name, end in ends.items() if end >= 0)
            raise UserError(
                f"there is no block {short.get(block_id.stack, block_id.stack)}:{block_id.index}; "
                f"this model has {counts}"
            )
    check_count(len(dropped), len(existing))
    kept = Counter(block_id.stack for block_id in existing if block_id not in dropped)
    for field, stacks in tied(transformer, anatomy).items():
        left = {stack.short: kept[stack.attribute] for stack in stacks}
        if len(set(left.values())) > 1:
            counts = ", ".join(f"{name}: {count}" for name, count in left.items())
            raise UserError(
                f"{' and '.join(left)} have one count, {field}; drop equally many of each (left would be {counts})"
            )


def check_count(drops: int, blocks: int) -> None:
    """Raise `UserError` if so many of so many blocks cannot be dropped."""
    if drops >= blocks:
        raise UserError(f"dropping all {blocks} blocks leaves no model; drop at most {blocks - 1}")


def boundary_map(existing: Sequence[BlockId], dropped: Iterable[BlockId]) -> dict[BlockId, BlockId]:
    """For each kept block, the block of the full model whose output it should reproduce.

    The kept block takes over the span up to the next kept one: block `k_j` is matched to block
    `k_{j+1} - 1` in the order of the forward pass (TinyFusion and PPCL pair the last block of the
    replaced span; field's convention (c)). Leading dropped blocks have no kept block before them
    and are taken over by the first one.
    """
    gone = set(dropped)
    kept = [position for position, block_id in enumerate(existing) if block_id not in gone]
    ends = [*(position - 1 for position in kept[1:]), len(existing) - 1]
    return {existing[start]: existing[end] for start, end in zip(kept, ends, strict=True)}


def _quantised_layers(transformer: nn.Module, kept: Mapping[str, Sequence[int]]) -> dict[str, nn.Module]:
    """Layers of a class for quantised weights, by their names after the cut: of bitsandbytes,
    quanto, GGUF.

    torchao's weights are in stock layers, and are copied as others are.
    """
    return {
        new_name: module
        for name, module in transformer.named_modules()
        if isinstance(module, nn.Linear)
        and type(module) is not nn.Linear
        and not is_plain(module.weight)
        and (new_name := new_name_of(name, kept)) is not None
    }


def _copied(layer: nn.Module) -> nn.Module:
    """Copy of a quantised layer, whose weights `copy.deepcopy` may not know how to copy."""
    copies = {id(weight): _copied_weight(weight) for weight in layer.parameters()}
    return copy.deepcopy(layer, {key: weight for key, weight in copies.items() if weight is not None})


def _copied_weight(weight: nn.Parameter) -> nn.Parameter | None:
    """Copy of a quantised weight, or None if its class says how it is copied."""
    class_: Any = type(weight)
    if hasattr(weight, "__tensor_flatten__"):
        # quanto's cannot be cloned, but its inner tensors can.
        names, context = weight.__tensor_flatten__()
        inner = {name: getattr(weight, name).detach().clone() for name in names}
        whole = class_.__tensor_unflatten__(inner, context, weight.size(), weight.stride())
        return nn.Parameter(whole, requires_grad=weight.requires_grad)
    if class_ is nn.Parameter or class_.__deepcopy__ is not nn.Parameter.__deepcopy__:
        return None
    # GGUF's has its type as an attribute, which Parameter leaves behind.
    numbers = Tensor._make_subclass(Tensor, weight.detach()).clone()
    twin: nn.Parameter = Tensor._make_subclass(class_, numbers, weight.requires_grad)
    vars(twin).update(vars(weight))
    return twin


def _owner(name: str, layers: Mapping[str, nn.Module]) -> str | None:
    """The one of `layers` that has the tensor `name`; `None` if none has."""
    while name := name.rpartition(".")[0]:
        if name in layers:
            return name
    return None


def _place_buffers(result: nn.Module, source: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Buffers that no state dict holds go where those of `source` are, with their dtype."""
    for name, buffer in result.named_buffers():
        if name not in state:
            owner, _, leaf = name.rpartition(".")
            setattr(result.get_submodule(owner), leaf, buffer.to(source.get_buffer(name)))
