"""Adaptive layer-norm modulation: LN(x) * (1 + scale) + shift.

Shapes: B batch, S tokens, D channels.

Kernels: csrc/cpu/adaln.cpp, csrc/cuda/adaln.cu, ops/triton/adaln.py
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdistill.ops import row_shapes, transforms
from fastdistill.ops.backend import Backend, Request
from fastdistill.ops.gated_residual import GATED_RESIDUAL
from fastdistill.ops.op import Arguments, Case, Operator, Tangents, Tensors, accumulator_of
from fastdistill.ops.row_shapes import RowShapes
from fastdistill.ops.rows import check_modulation, check_rows, check_same_modulation, contiguous_rows, over_rows


def modulate(x: Tensor, scale: Tensor, shift: Tensor, eps: float = 1e-6, *, backend: Request | None = None) -> Tensor:
    """`LN(x) * (1 + scale) + shift`, where `LN(x) = (x - mean) / sqrt(var + eps)` over D, without
    affine.

    The adaptive layer norm (adaLN) of DiT, arXiv 2212.09748, section 3.2, as diffusers computes it
    in `AdaLayerNormZero`, `AdaLayerNormContinuous` and every FLUX block. Differentiable in x, scale
    and shift, in reverse and in forward mode.

    Args:
        x: (B, S, D) or (S, D), float32, bfloat16, float16 or (on CPU) float64. D must be
            contiguous, the other axes may have any stride.
        scale, shift: both of one shape, (D), (B, D), (B, 1, D) or (B, S, D), B may be 1; for an (S,
            D) x: (D) or (S, D). The dtype of x, or float32 for a bfloat16 or float16 x: a
            modulation kept in float32 is not rounded.
        eps: added to the variance.
        backend: `eager`, `native`, `triton` or `auto`; by default the one of `use_backend`, else
            `auto`.

    Returns:
        A contiguous tensor (eager: strided as torch pleases) of the shape and dtype of x.

    Statistics and sums are float32 (float64 for float64), rounded once at the end. The gradients of
    scale and shift are summed over tokens in an order given by the shape alone, so they are bitwise
    repeatable. Higher derivatives are those of plain PyTorch: under torch.func on every backend,
    with `create_graph=True` on `eager` alone.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, device, shape or stride; the
            message says which.
        RuntimeError: `backend` was named and cannot run here; the message says why.
    """
    return MODULATE(x, scale, shift, eps, backend=backend)  # type: ignore[no-any-return]


def modulate_for_two(
    x: Tensor, scale: Tensor, shift: Tensor, eps: float = 1e-6, *, backend: Request | None = None
) -> tuple[Tensor, Tensor]:
    """`modulate` for a result with two consumers, as in a FLUX single block, where the result feeds
    attention and feed-forward.

    The two tensors share one memory; change neither in place. Give one to each consumer: the two
    gradients then arrive apart and the backward pass adds them in float32, where autograd would
    first write their sum, rounded. Arguments and errors are those of `modulate`.

    Returns:
        Two contiguous tensors on one memory, of the shape and dtype of x.
    """
    return MODULATE_FOR_TWO(x, scale, shift, eps, backend=backend)  # type: ignore[no-any-return]


class Modulate(Operator):
    name = "modulate"
    triton_module = "fastdistill.ops.triton.adaln"
    schema = "(Tensor x, Tensor scale, Tensor shift, float eps) -> (Tensor out, Tensor stats)"
    backward_schema = (
        "(Tensor grad, Tensor x, Tensor scale, Tensor stats, bool modulation_grads) "
        "-> (Tensor dx, Tensor dscale, Tensor dshift)"
    )

    def check(self, x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> None:
        check_rows("x", x)
        check_modulation("scale", scale, x)
        check_same_modulation("shift", shift, "scale", scale)

    def reference(self, x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
        normed = _plain_norm(x, eps) if transforms.active() else F.layer_norm(x, x.shape[-1:], eps=eps)
        return (normed * (1 + over_rows(scale, x)) + over_rows(shift, x)).to(x.dtype)

    def fake(self, x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        # stats is (2, ...): mean and 1 / sqrt(var + eps) of every row.
        return x.new_empty(x.shape), x.new_empty((2, *x.shape[:-1]), dtype=accumulator_of(x.dtype))

    def fake_backward(
        self, grad: Tensor, x: Tensor, scale: Tensor, stats: Tensor, modulation_grads: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        shape = scale.shape if modulation_grads else (0,)
        return x.new_empty(x.shape), scale.new_empty(shape), scale.new_empty(shape)

    def save(self, ctx: Any, arguments: tuple[Any, ...], results: tuple[Tensor, Tensor]) -> None:
        x, scale, _, _ = arguments
        ctx.save_for_backward(x, scale, results[1])

    def backward(self, ctx: Any, backward_op: Callable[..., Any], *grads: Tensor) -> tuple[Tensor | None, ...]:
        modulation_grads = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        dx, dscale, dshift = backward_op(
            *(contiguous_rows(grad) for grad in grads), *ctx.saved_tensors, modulation_grads
        )
        return (dx, dscale, dshift, None) if modulation_grads else (dx, None, None, None)

    def jvp(self, backend: Backend, arguments: Arguments, results: Tensors, tangents: Tangents) -> Tensors:
        x, scale, _, eps = arguments
        return (modulated_tangent(backend, x, scale, results[1], eps, *tangents[:3]),)

    def bytes_moved(self, x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> tuple[int, int]:
        rows, modulation = x.nbytes, scale.nbytes + shift.nbytes
        return 2 * rows + modulation, 3 * rows + modulation + scale.nbytes

    def cases(self) -> Sequence[Case]:
        return row_shapes.cases(_arguments)

    def workloads(self) -> Sequence[Case]:
        return row_shapes.cases(_arguments, row_shapes.FLUX)


class ModulateForTwo(Modulate):
    """Modulation whose backward op adds the gradients of two consumers."""

    name = "modulate_for_two"
    backward_schema = (
        "(Tensor grad, Tensor second, Tensor x, Tensor scale, Tensor stats, bool modulation_grads) "
        "-> (Tensor dx, Tensor dscale, Tensor dshift)"
    )

    def reference(self, x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        out = super().reference(x, scale, shift, eps)
        return out, out

    def fake_backward(  # type: ignore[override]
        self, grad: Tensor, second: Tensor, x: Tensor, scale: Tensor, stats: Tensor, modulation_grads: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        return super().fake_backward(grad, x, scale, stats, modulation_grads)

    def visible(self, results: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        # Two tensors on one memory, so that autograd keeps their gradients apart.
        return results[0], results[0].detach()

    def jvp(self, *arguments: Any) -> tuple[Tensor, ...]:
        (tangent,) = super().jvp(*arguments)
        return tangent, tangent

    def bytes_moved(self, x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> tuple[int, int]:
        forward, backward = super().bytes_moved(x, scale, shift, eps)
        return forward, backward + x.nbytes


def _plain_norm(x: Tensor, eps: float) -> Tensor:
    """Layer norm whose tangent can be differentiated: PyTorch's (2.13) takes mean and deviation for
    constants there."""
    wide = x.to(accumulator_of(x.dtype))
    centred = wide - wide.mean(dim=-1, keepdim=True)
    return (centred * torch.rsqrt(centred.square().mean(dim=-1, keepdim=True) + eps)).to(x.dtype)


def modulated_tangent(
    backend: Backend,
    x: Tensor,
    scale: Tensor,
    stats: Tensor,
    eps: float,
    dx: Tensor | None,
    dscale: Tensor | None,
    dshift: Tensor | None,
) -> Tensor:
    """Tangent of the modulated norm of x, `(1 + scale) dnormed + dscale normed + dshift`, from the
    statistics that the forward op saved."""
    add_product = GATED_RESIDUAL.forward_op(backend)
    tangent = _over_all(dshift, x)
    if dscale is not None:
        zero = torch.zeros_like(scale)
        normed, _ = MODULATE.forward_op(backend)(x, zero, zero, eps)
        tangent = add_product(tangent, normed, contiguous_rows(dscale), math.inf)
    if dx is not None:
        # The Jacobian of the norm is symmetric: the backward op without a scale is also its product
        # with a tangent.
        unscaled = torch.zeros_like(scale)
        dnormed, _, _ = MODULATE.backward_op(backend)(contiguous_rows(dx), x, unscaled, stats, False)
        tangent = add_product(tangent, dnormed, 1 + scale.to(stats.dtype), math.inf)
    return tangent


def _over_all(dshift: Tensor | None, x: Tensor) -> Tensor:
    """Tangent of the shift as rows like x, zero without one."""
    if dshift is None:
        return torch.zeros_like(x[..., :1, :]).expand(x.shape)
    return over_rows(contiguous_rows(dshift), x).to(x.dtype).expand(x.shape)


def _arguments(shapes: RowShapes, dtype: torch.dtype, device: torch.device) -> tuple[Any, ...]:
    return shapes.rows(dtype, device), *shapes.modulations(2, dtype, device), 1e-6


MODULATE = Modulate()
MODULATE_FOR_TWO = ModulateForTwo()
