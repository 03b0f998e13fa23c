"""Checks that weights can be computed with."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastdistill.errors import UserError

COMPUTED = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def is_plain(parameter: Tensor) -> bool:
    """Whether a weight is a tensor of numbers to compute with, and not quantised.

    A quantised tensor may show the dtype that it stands for; its class tells.
    """
    return parameter.dtype in COMPUTED and type(parameter.data) is Tensor


def check_finite(module: nn.Module, name: str) -> None:
    """Raise `UserError`, naming the tensor, for a weight of `name` that is not finite.

    Quantised weights are not looked into.
    """
    for parameter_name, parameter in module.named_parameters():
        if is_plain(parameter) and not parameter.is_meta and not bool(torch.isfinite(parameter).all()):
            raise UserError(
                f"{name} weight {parameter_name} has NaN or infinite values; get a sound copy of the weights"
            )


def check_computable(module: nn.Module, name: str) -> None:
    """Raise `UserError`, naming the tensor, for a weight of `name` that is quantised or not loaded."""
    for parameter_name, parameter in module.named_parameters():
        if parameter.is_meta:
            raise UserError(
                f"{name} weight {parameter_name} is not in memory; load the whole model, "
                "without sequential or disk offloading"
            )
        if not is_plain(parameter):
            kind = (
                type(parameter.data).__name__
                if parameter.dtype in COMPUTED
                else str(parameter.dtype).removeprefix("torch.")
            )
            raise UserError(
                f"{name} weight {parameter_name} is {kind}, which can be neither scored nor trained; "
                "load the model in bfloat16 or float32, compress it, and quantise the result"
            )


def check_loaded(module: nn.Module, loading: Mapping[str, Any], name: str) -> None:
    """Raise `UserError` unless the files of `name` held the weights of `module`, and no others.

    transformers leaves out the parts of a file that are none of its class, such as the image half
    of CLIP: these are not missed.

    Args:
        loading: what `from_pretrained(..., output_loading_info=True)` returns with the module.
    """
    missing = loading["missing_keys"]
    if missing:
        raise UserError(
            f"{name}: the weights of {_owners(missing)} are missing, which config.json describes; "
            "get config.json and weights of one model"
        )
    children = {child for child, _ in module.named_children()}
    is_diffusers = type(module).__module__.startswith("diffusers.")
    extra = [key for key in loading["unexpected_keys"] if is_diffusers or key.partition(".")[0] in children]
    if extra:
        raise UserError(
            f"{name}: config.json describes no {_owners(extra)}, whose weights are there; "
            "get config.json and weights of one model"
        )


def check_shapes(mismatched: Iterable[tuple[str, Any, Any]], name: str) -> None:
    """Raise `UserError`, naming the first, if weights of `name` have other shapes than config.json
    describes.

    Args:
        mismatched: name, shape in the file and described shape of each such weight.
    """
    for key, *shapes in sorted(mismatched, key=lambda each: each[0]):
        there, described = (f"({', '.join(re.findall('[0-9]+', str(shape)))})" for shape in shapes)
        raise UserError(
            f"{name}: its config.json and its weights are of different models ({key}: {described} and {there}); "
            "get both from one model"
        )


def _owners(keys: Iterable[str]) -> str:
    """Blocks that `keys` belong to, or the keys themselves; a few of them, and the number of
    others."""
    owners = sorted({re.sub(r"(\.\d+)\..*", r"\1", key) for key in keys})
    others = len(owners) - 3
    return ", ".join(owners[:3]) + (f" and {others} more" if others > 0 else "")
