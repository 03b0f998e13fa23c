"""Adaptive layer-norm modulation: LN(x) * (1 + scale) + shift.

Shapes: B batch, S tokens, D channels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdistill.ops.backend import Request
from fastdistill.ops.op import Operator, Sample, describe


def modulate(x: Tensor, scale: Tensor, shift: Tensor, eps: float = 1e-6, *, backend: Request | None = None) -> Tensor:
    """`LN(x) * (1 + scale) + shift`, where `LN(x) = (x - mean) / sqrt(var + eps)` over D, without affine.

    The adaptive layer norm (adaLN) of DiT, arXiv 2212.09748, section 3.2, as diffusers computes it in
    `AdaLayerNormZero`, `AdaLayerNormContinuous` and every FLUX block. Differentiable in x, scale and shift.

    Args:
        x: (B, S, D) or (S, D), float32, bfloat16, float16 or (on CPU) float64. D must be contiguous, the
            other axes may have any stride.
        scale, shift: of one shape, (D), (B, D), (B, 1, D) or (B, S, D), B may be 1; for an (S, D) x: (D) or
            (S, D). The dtype of x, or float32 beside a bfloat16 or float16 x: a modulation kept in float32
            is not rounded.
        eps: added to the variance.
        backend: `eager`, `native`, `triton` or `auto`; the default is that of `use_backend`, else `auto`.

    Returns:
        A contiguous tensor (eager: strided as torch pleases) of the shape and dtype of x.

    Statistics and sums are float32 (float64 for float64), rounded once at the end. The gradients of scale and
    shift are summed over tokens in an order given by the shape alone, so they are bitwise repeatable. The
    gradients themselves cannot be differentiated, except on `eager`.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, device, shape or stride; the
            message says which.
        RuntimeError: `backend` was named and cannot run here; the message says why.
    """
    return MODULATE(x, scale, shift, eps, backend=backend)  # type: ignore[no-any-return]


class Modulate(Operator):
    name = "modulate"
    schema = "(Tensor x, Tensor scale, Tensor shift, float eps) -> (Tensor out, Tensor stats)"
    backward_schema = (
        "(Tensor grad, Tensor x, Tensor scale, Tensor stats, bool modulation_grads) -> (Tensor dx, Tensor dscale, Tensor dshift)"
    )

    def check(self, x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> None:
        shape, modulation = x.shape, scale.shape
        if len(shape) not in (2, 3):
            raise ValueError(f"x: expected (B, S, D) or (S, D), got {describe(x)}")
        if modulation != shape and not _broadcasts(modulation, shape):
            raise ValueError(f"scale: expected {_expected(shape)} beside x of {describe(x)}, got {describe(scale)}")
        if shift.shape != modulation:
            raise ValueError(f"shift: expected the shape of scale, {tuple(modulation)}, got {describe(shift)}")
        dtype, modulation_dtype = x.dtype, scale.dtype
        if modulation_dtype != dtype and (modulation_dtype != torch.float32 or dtype == torch.float64):
            raise TypeError(f"scale: expected the dtype of x, {dtype}, or float32, got {describe(scale)}")
        if shift.dtype != modulation_dtype:
            raise TypeError(f"shift: expected the dtype of scale, {modulation_dtype}, got {describe(shift)}")
        device = x.device
        if scale.device != device or shift.device != device:
            raise ValueError(f"scale, shift: expected on the device of x, {device}, got {scale.device}, {shift.device}")
        if shape[-1] > 1 and not (x.stride(-1) == scale.stride(-1) == shift.stride(-1) == 1):
            name, t = next(p for p in (("x", x), ("scale", scale), ("shift", shift)) if p[1].stride(-1) != 1)
            raise ValueError(f"{name}: expected a contiguous last dimension, got strides {t.stride()}")

    def reference(self, x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
        if x.dim() == 3 and scale.dim() == 2:
            scale, shift = scale.unsqueeze(1), shift.unsqueeze(1)
        return (F.layer_norm(x, x.shape[-1:], eps=eps) * (1 + scale) + shift).to(x.dtype)

    def fake(self, x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        # stats is (2, ...): mean and 1/sqrt(var + eps) of every row.
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        return x.new_empty(x.shape), x.new_empty((2, *x.shape[:-1]), dtype=dtype)

    def fake_backward(self, grad: Tensor, x: Tensor, scale: Tensor, stats: Tensor, modulation_grads: bool) -> tuple[Tensor, Tensor, Tensor]:
        shape = scale.shape if modulation_grads else (0,)
        return x.new_empty(x.shape), scale.new_empty(shape), scale.new_empty(shape)

    def save(self, ctx: Any, arguments: tuple[Any, ...], results: tuple[Tensor, Tensor]) -> None:
        x, scale, _, _ = arguments
        ctx.save_for_backward(x, scale, results[1])

    def backward(self, ctx: Any, backward_op: Callable[..., Any], *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        if grad.stride(-1) != 1:
            # out.sum().backward() sends one number expanded to the whole shape.
            grad = grad.contiguous()
        x, scale, stats = ctx.saved_tensors
        modulation_grads = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        dx, dscale, dshift = backward_op(grad, x, scale, stats, modulation_grads)
        return (dx, dscale, dshift, None) if modulation_grads else (dx, None, None, None)

    def bytes_moved(self, x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> tuple[int, int]:
        rows, modulation = x.nbytes, scale.nbytes + shift.nbytes
        return 2 * rows + modulation, 3 * rows + modulation + scale.nbytes

    def samples(self) -> Sequence[Sample]:
        return (
            _sample("B2-S5-D7-D", (2, 5, 7), (7,)),
            _sample("B2-S5-D64-BD", (2, 5, 64), (2, 64)),
            _sample("B3-S37-D33-B1D", (3, 37, 33), (3, 1, 33)),
            _sample("B2-S9-D130-BSD", (2, 9, 130), (2, 9, 130)),
            _sample("B1-S70-D100-1D", (1, 70, 100), (1, 100)),
            _sample("B2-S3-D5-11D", (2, 3, 5), (1, 1, 5)),
            _sample("S6-D48-D", (6, 48), (48,)),
            _sample("S6-D19-SD", (6, 19), (6, 19)),
            _sample("B2-S1-D8-BD", (2, 1, 8), (2, 8)),
            _sample("B2-S0-D8-B1D", (2, 0, 8), (2, 1, 8)),
            _sample("B0-S4-D8-BD", (0, 4, 8), (0, 8)),
            _sample("B1-S4-D1-D", (1, 4, 1), (1,)),
            _sample("B2-S21-D96-B1D-strided", (2, 21, 96), (2, 1, 96), strided=True),
            _sample("B2-S21-D37-BSD-strided", (2, 21, 37), (2, 21, 37), strided=True),
            _sample("B2-S5-D64-BD-offset100", (2, 5, 64), (2, 64), offset=100.0),
            _sample("B2-S5-D64-B1D-float32", (2, 5, 64), (2, 1, 64), modulation_dtype=torch.float32),
        )

    def workloads(self) -> Sequence[Sample]:
        return tuple(_sample(f"B1-S{S}-D3072", (1, S, 3072), (1, 3072)) for S in (1152, 4608))


def _broadcasts(modulation: Sequence[int], x: Sequence[int]) -> bool:
    """Whether a modulation of this shape, other than x's own, applies to x."""
    if modulation[-1:] != x[-1:]:
        return False
    if len(modulation) == 1:
        return True
    if len(x) == 2:
        return len(modulation) == 2 and modulation[0] == 1
    if len(modulation) == 2 or (len(modulation) == 3 and modulation[1] == 1):
        return modulation[0] in (1, x[0])
    return False


def _expected(x: Sequence[int]) -> str:
    if len(x) == 2:
        return f"({x[1]},) or {tuple(x)}"
    B, S, D = x
    return f"({D},), ({B}, {D}), ({B}, 1, {D}) or ({B}, {S}, {D})"


def _sample(
    id: str,
    x_shape: tuple[int, ...],
    modulation_shape: tuple[int, ...],
    *,
    strided: bool = False,
    offset: float = 0.0,
    modulation_dtype: torch.dtype | None = None,
) -> Sample:
    """`strided`: x, scale and shift are slices, as chunks of one projection are. `offset`: the mean of x, in
    sigmas."""

    def draw(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        if not strided:
            return torch.randn(shape, device=device).to(dtype)
        *rows, D = shape
        return torch.randn(*rows, 3 * D, device=device).to(dtype)[..., D : 2 * D]

    def make(dtype: torch.dtype, device: torch.device) -> tuple[Any, ...]:
        wide = dtype if modulation_dtype is None or dtype == torch.float64 else modulation_dtype
        x = draw(x_shape, dtype, device).add(offset) if offset else draw(x_shape, dtype, device)
        scale, shift = (draw(modulation_shape, wide, device) for _ in range(2))
        return x.requires_grad_(), scale.requires_grad_(), shift.requires_grad_(), 1e-6

    return Sample(id=id, make=make)


MODULATE = Modulate()
