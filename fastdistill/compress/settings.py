"""Settings of a transformer that are in no state dict, for `cut`: how its modules train, attend and
store their weights."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from diffusers.hooks.layerwise_casting import apply_layerwise_casting_hook
from torch import nn

from fastdistill.errors import UserError

CHECKPOINTING = ("gradient_checkpointing", "_gradient_checkpointing_func")
QUANTISATION = ("hf_quantizer", "quantization_method", "is_quantized", "is_loaded_in_4bit", "is_loaded_in_8bit")
"""Attributes by which diffusers knows how to save a quantised model."""


def new_name_of(name: str, kept: Mapping[str, Sequence[int]]) -> str | None:
    """Name of a module or tensor after the cut; `None` if it goes.

    Args:
        kept: the kept indices of each list of blocks.
    """
    for attribute, indices in kept.items():
        if name.startswith(f"{attribute}."):
            index, dot, rest = name.removeprefix(f"{attribute}.").partition(".")
            return f"{attribute}.{indices.index(int(index))}{dot}{rest}" if int(index) in indices else None
    return name


def check_present(transformer: nn.Module) -> None:
    """Raise `UserError` if the weights are not in this process's memory.

    A model that is on the meta device as a whole is a plan of a model, and can be cut.
    """
    parameters = dict(transformer.named_parameters())
    absent = [name for name, parameter in parameters.items() if parameter.is_meta]
    offloaded = any(hasattr(module, "_hf_hook") for module in transformer.modules())
    if absent and (offloaded or len(absent) < len(parameters)):
        raise UserError(f"the weight {absent[0]} is not in memory; cut the model before it is offloaded")
    for name, module in transformer.named_modules():
        offloading = _hook(module, "group_offloading")
        if offloading is not None and offloading.group.offload_to_disk_path:
            raise UserError(f"the weights of {name} are on disk; cut the model before it is offloaded")
    sharded = [name for name, parameter in parameters.items() if type(parameter.data).__name__ == "DTensor"]
    if sharded:
        raise UserError(f"the weight {sharded[0]} is sharded over processes; cut the model before `fully_shard`")


def keep_settings(result: Any, source: Any, kept: Mapping[str, Sequence[int]]) -> None:
    """Give `result`, which a cut made of `source`, the settings of the modules and parameters that
    it kept."""
    parameters, modules = dict(result.named_parameters()), dict(result.named_modules())
    for name, parameter in source.named_parameters():
        if (twin := parameters.get(new_name_of(name, kept) or "")) is not None:
            twin.requires_grad_(parameter.requires_grad)
    for name, module in source.named_modules():
        new_name = new_name_of(name, kept)
        if new_name is not None and new_name in modules:
            _keep(modules[new_name], module)
    for attribute in QUANTISATION:
        if hasattr(source, attribute):
            setattr(result, attribute, getattr(source, attribute))
    quantised = {name: source.config[name] for name in source.config if "quantization" in name}
    if quantised:
        result.register_to_config(**quantised)


def _keep(twin: nn.Module, module: nn.Module) -> None:
    twin.training = module.training
    for attribute in CHECKPOINTING:
        if attribute in vars(module):
            setattr(twin, attribute, vars(module)[attribute])
    processor = getattr(module, "processor", None)
    # One with weights of its own, such as IP-Adapter's, is in the state dict.
    if processor is not None and not isinstance(processor, nn.Module):
        twin.processor = copy.copy(processor)
    casting = _hook(module, "layerwise_casting")
    if casting is not None:
        apply_layerwise_casting_hook(twin, casting.storage_dtype, casting.compute_dtype, casting.non_blocking)


def _hook(module: nn.Module, name: str) -> Any:
    """Hook of diffusers on `module`, or None."""
    registry: Any = getattr(module, "_diffusers_hook", None)
    return None if registry is None else registry.get_hook(name)
