"""Check that what is trained is what diffusers loads again, before a step is done for nothing."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from fastdistill.errors import UserError
from fastdistill.models.skeleton import skeleton_of

NAMED = 3
"""Weights that a message names."""


def check_restorable(network: nn.Module) -> None:
    """Raise `UserError` if `save_pretrained` and `from_pretrained` would lose weights of `network`.

    diffusers builds a model by its config and fills in the weights of the names that it finds
    there. What was added by hand (fused projections, adapters, parametrisations) or replaced,
    removed or tied is not in the config. A network without a config is not diffusers' to load, and
    is not looked at.
    """
    network = getattr(network, "_orig_mod", network)  # compiled
    config: Any = getattr(network, "config", None)
    if config is None or not hasattr(type(network), "from_config"):
        return
    built = skeleton_of(type(network), config)
    found, expected = _shapes(network), _shapes(built)
    name = type(network).__name__
    if lost := [key for key in found if key not in expected]:
        raise UserError(f"what is trained in {_some(lost)} of this {name} would be lost, {_remedy(network, lost)}")
    if missing := [key for key in expected if key not in found]:
        raise UserError(
            f"this {name} has no {_some(missing)}, which its config asks for and loading would draw at random; "
            "give a model whose config counts what it has, as fastdistill.compress.cut makes"
        )
    if other := [key for key in found if found[key] != expected[key]]:
        shapes = f"{found[other[0]]} here and {expected[other[0]]} by its config"
        raise UserError(f"{_some(other)} of this {name} would not load again, being {shapes}; correct its config")
    if tied := _tied(network) - _tied(built):
        raise UserError(
            f"{_some(sorted(next(iter(tied))))} of this {name} are one weight, which its config does not make one; "
            "give each a copy of its own"
        )


def _shapes(network: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shape of each parameter, as a state dict names it."""
    return {name: tuple(parameter.shape) for name, parameter in network.named_parameters(remove_duplicate=False)}


def _tied(network: nn.Module) -> set[frozenset[str]]:
    """Names of each parameter that has several."""
    names: dict[int, list[str]] = {}
    for name, parameter in network.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {frozenset(group) for group in names.values() if len(group) > 1}


def _remedy(network: nn.Module, lost: Iterable[str]) -> str:
    if any(getattr(module, "fused_projections", False) for module in network.modules()):
        return "as diffusers does not load fused projections: call unfuse_qkv_projections() before training"
    if any("lora_" in key or ".base_layer." in key for key in lost):
        return "as its config does not name adapters: merge them first (fuse_lora, then unload_lora_weights)"
    return "as its config does not build it: train a model as from_pretrained loads it"


def _some(names: list[str]) -> str:
    more = len(names) - NAMED
    return ", ".join(names[:NAMED]) + (f" and {more} more" if more > 0 else "")
