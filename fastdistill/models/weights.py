"""Checks that weights can be computed with."""

from __future__ import annotations

import torch
from torch import nn

from fastdistill.errors import UserError

COMPUTED = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def check_finite(module: nn.Module, name: str) -> None:
    """Raise `UserError`, naming the tensor, for a weight of `name` that is not finite.

    Quantised weights are not looked into.
    """
    for parameter_name, parameter in module.named_parameters():
        if parameter.dtype in COMPUTED and not parameter.is_meta and not bool(torch.isfinite(parameter).all()):
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
        # A quantised tensor may show the type that it stands for; its class tells.
        if parameter.dtype not in COMPUTED or type(parameter.data) is not torch.Tensor:
            kind = (
                type(parameter.data).__name__
                if parameter.dtype in COMPUTED
                else str(parameter.dtype).removeprefix("torch.")
            )
            raise UserError(
                f"{name} weight {parameter_name} is {kind}, which can be neither scored nor trained; "
                "load the model in bfloat16 or float32, compress it, and quantise the result"
            )
