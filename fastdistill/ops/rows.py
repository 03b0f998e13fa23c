"""Checks of rows, (B, S, D) or (S, D), and of the modulations that broadcast over them.

Shapes: B batch, S tokens, D channels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastdistill.ops.op import describe


def check_rows(name: str, x: Tensor) -> None:
    """Raise `ValueError` unless x is (B, S, D) or (S, D) with a contiguous D."""
    if x.dim() not in (2, 3):
        raise ValueError(f"{name}: expected (B, S, D) or (S, D), got {describe(x)}")
    check_contiguous(name, x)


def check_like(name: str, t: Tensor, x: Tensor, x_name: str = "x") -> None:
    """Raise unless t has the shape, dtype and device of x, and a contiguous D."""
    if t.shape != x.shape or t.device != x.device:
        raise ValueError(
            f"{name}: expected the shape and device of {x_name}, {tuple(x.shape)} on {x.device}, got {describe(t)}"
        )
    if t.dtype != x.dtype:
        raise TypeError(f"{name}: expected the dtype of {x_name}, {x.dtype}, got {describe(t)}")
    check_contiguous(name, t)


def check_modulation(name: str, t: Tensor, x: Tensor) -> None:
    """Raise unless t broadcasts over the rows of x, in the dtype of x or float32."""
    if t.shape != x.shape and not _broadcasts(t.shape, x.shape):
        raise ValueError(f"{name}: expected {_expected(x.shape)} for x of {describe(x)}, got {describe(t)}")
    if t.dtype != x.dtype and (t.dtype != torch.float32 or x.dtype == torch.float64):
        raise TypeError(f"{name}: expected the dtype of x, {x.dtype}, or float32, got {describe(t)}")
    if t.device != x.device:
        raise ValueError(f"{name}: expected on the device of x, {x.device}, got {describe(t)}")
    check_contiguous(name, t)


def check_same_modulation(name: str, t: Tensor, other_name: str, other: Tensor) -> None:
    """Raise unless t has the shape, dtype and device of another modulation, and a contiguous D."""
    if t.shape != other.shape:
        raise ValueError(f"{name}: expected the shape of {other_name}, {tuple(other.shape)}, got {describe(t)}")
    if t.dtype != other.dtype:
        raise TypeError(f"{name}: expected the dtype of {other_name}, {other.dtype}, got {describe(t)}")
    if t.device != other.device:
        raise ValueError(f"{name}: expected on the device of {other_name}, {other.device}, got {describe(t)}")
    check_contiguous(name, t)


def check_contiguous(name: str, t: Tensor) -> None:
    if t.stride(-1) != 1 and t.shape[-1] > 1:
        raise ValueError(f"{name}: expected a contiguous last dimension, got strides {t.stride()}")


def over_rows(t: Tensor, x: Tensor) -> Tensor:
    """Modulation with the axes that plain PyTorch needs to broadcast it over x."""
    return t.unsqueeze(1) if x.dim() == 3 and t.dim() == 2 else t


def contiguous_rows(grad: Tensor) -> Tensor:
    """Gradient with contiguous rows, as kernels read it.

    `out.sum().backward()` sends one number expanded to the whole shape.
    """
    return grad if grad.stride(-1) == 1 else grad.contiguous()


def _broadcasts(modulation: Sequence[int], x: Sequence[int]) -> bool:
    """Whether a modulation of this shape, other than x's own, applies to x."""
    if modulation[-1:] != x[-1:]:
        return False
    if len(modulation) == 1:
        return True
    if len(x) == 2:
        return len(modulation) == 2 and modulation[0] == 1
    if len(modulation) == 2 or (len(modulation) == 3 and modulation[1] == 1):
        # Not `in (1, x[0])`, for which torch.compile does not guard on the sizes.
        return modulation[0] == 1 or modulation[0] == x[0]
    return False


def _expected(x: Sequence[int]) -> str:
    if len(x) == 2:
        return f"({x[1]},) or {tuple(x)}"
    B, S, D = x
    return f"({D},), ({B}, {D}), ({B}, 1, {D}) or ({B}, {S}, {D})"
