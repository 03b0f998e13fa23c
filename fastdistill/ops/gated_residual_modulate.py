"""Gated residual and adaptive layer norm of the sum, between the halves of a DiT block.

Shapes: B batch, S tokens, D channels.

Kernels: csrc/cpu/adaln.cpp, csrc/cuda/adaln.cu, ops/triton/adaln.py
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastdistill.ops import row_shapes
from fastdistill.ops.backend import Backend, Request
from fastdistill.ops.gated_residual import GATED_RESIDUAL, clip_limit, residual_sum
from fastdistill.ops.modulate import MODULATE, modulated_tangent
from fastdistill.ops.op import Arguments, Case, Operator, Tangents, Tensors, accumulator_of
from fastdistill.ops.row_shapes import RowShapes
from fastdistill.ops.rows import check_like, check_modulation, check_rows, check_same_modulation, contiguous_rows


def gated_residual_modulate(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    scale: Tensor,
    shift: Tensor,
    eps: float = 1e-6,
    *,
    clip: bool = False,
    backend: Request | None = None,
) -> tuple[Tensor, Tensor]:
    """`h = x + gate * y` and `LN(h) * (1 + scale) + shift`, in one pass each way.

    The chain of adaLN-Zero, arXiv 2212.09748, section 3.2: `gated_residual`, then `modulate`. In a
    FLUX double block gate, scale and shift are `gate_msa`, `scale_mlp` and `shift_mlp`.
    Differentiable in x, y, gate, scale and shift, in reverse and in forward mode.

    Args:
        x, y: (B, S, D) or (S, D) of one dtype, float32, bfloat16, float16 or (on CPU) float64. D
            must be contiguous, the other axes may have any stride.
        gate, scale, shift: all of one shape, (D), (B, D), (B, 1, D) or (B, S, D), B may be 1; for
            an (S, D) x: (D) or (S, D). The dtype of x, or float32 for a bfloat16 or float16 x.
        eps: added to the variance.
        clip: clamp h to +-65504, as diffusers' blocks do in float16. An element on the limit passes
            no gradient and no tangent.
        backend: `eager`, `native`, `triton` or `auto`; by default the one of `use_backend`, else
            `auto`.

    Returns:
        h and the modulated norm, contiguous (eager: strided as torch pleases), of the shape and
        dtype of x. The norm is taken of h as it is returned, rounded to its dtype.

    Statistics and sums are float32 (float64 for float64). The gradients of gate, scale and shift
    are summed over tokens in an order given by the shape alone, so they are bitwise repeatable.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, device, shape or stride; the
            message says which.
        RuntimeError: `backend` was named and cannot run here; the message says why.
    """
    return GATED_RESIDUAL_MODULATE(x, y, gate, scale, shift, eps, clip_limit(clip), backend=backend)  # type: ignore[no-any-return]


class GatedResidualModulate(Operator):
    name = "gated_residual_modulate"
    triton_module = "fastdistill.ops.triton.adaln"
    schema = (
        "(Tensor x, Tensor y, Tensor gate, Tensor scale, Tensor shift, float eps, float clip) "
        "-> (Tensor h, Tensor out, Tensor stats)"
    )
    backward_schema = (
        "(Tensor grad_h, Tensor grad_out, Tensor h, Tensor y, Tensor gate, Tensor scale, Tensor stats, float clip, "
        "bool modulation_grads) -> (Tensor dx, Tensor dy, Tensor dgate, Tensor dscale, Tensor dshift)"
    )
    visible_results = 2

    def check(self, x: Tensor, y: Tensor, gate: Tensor, scale: Tensor, shift: Tensor, eps: float, clip: float) -> None:
        check_rows("x", x)
        check_like("y", y, x)
        check_modulation("gate", gate, x)
        check_same_modulation("scale", scale, "gate", gate)
        check_same_modulation("shift", shift, "gate", gate)

    def reference(
        self, x: Tensor, y: Tensor, gate: Tensor, scale: Tensor, shift: Tensor, eps: float, clip: float
    ) -> tuple[Tensor, Tensor]:
        h = residual_sum(x, y, gate, clip)
        return h, MODULATE.reference(h, scale, shift, eps)

    def fake(
        self, x: Tensor, y: Tensor, gate: Tensor, scale: Tensor, shift: Tensor, eps: float, clip: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        stats = x.new_empty((2, *x.shape[:-1]), dtype=accumulator_of(x.dtype))
        return x.new_empty(x.shape), x.new_empty(x.shape), stats

    def fake_backward(
        self,
        grad_h: Tensor,
        grad_out: Tensor,
        h: Tensor,
        y: Tensor,
        gate: Tensor,
        scale: Tensor,
        stats: Tensor,
        clip: float,
        modulation_grads: bool,
    ) -> tuple[Tensor, ...]:
        shape = gate.shape if modulation_grads else (0,)
        return h.new_empty(h.shape), h.new_empty(h.shape), *(gate.new_empty(shape) for _ in range(3))

    def save(self, ctx: Any, arguments: tuple[Any, ...], results: tuple[Tensor, Tensor, Tensor]) -> None:
        _, y, gate, scale, _, _, ctx.clip = arguments
        h, _, stats = results
        ctx.save_for_backward(h, y, gate, scale, stats)

    def backward(self, ctx: Any, backward_op: Callable[..., Any], *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_h, grad_out = (contiguous_rows(grad) for grad in grads)
        modulation_grads = any(ctx.needs_input_grad[2:5])
        results = backward_op(grad_h, grad_out, *ctx.saved_tensors, ctx.clip, modulation_grads)
        dx, dy, *modulation = results
        return dx, dy, *(modulation if modulation_grads else (None,) * 3), None, None

    def jvp(self, backend: Backend, arguments: Arguments, results: Tensors, tangents: Tangents) -> Tensors:
        x, y, gate, scale, _, eps, clip = arguments
        h, _, stats = results
        dx, dy, dgate, dscale, dshift, *_ = tangents
        dh = None
        if any(t is not None for t in (dx, dy, dgate)):
            (dh,) = GATED_RESIDUAL.jvp(backend, (x, y, gate, clip), (h,), (dx, dy, dgate, None))
        dout = modulated_tangent(backend, h, scale, stats, eps, dh, dscale, dshift)
        return torch.zeros_like(h) if dh is None else dh, dout

    def bytes_moved(
        self, x: Tensor, y: Tensor, gate: Tensor, scale: Tensor, shift: Tensor, eps: float, clip: float
    ) -> tuple[int, int]:
        modulation = gate.nbytes + scale.nbytes + shift.nbytes
        return 4 * x.nbytes + modulation, 6 * x.nbytes + modulation + gate.nbytes + scale.nbytes

    def cases(self) -> Sequence[Case]:
        return row_shapes.cases(_arguments)

    def workloads(self) -> Sequence[Case]:
        return row_shapes.cases(_arguments, row_shapes.FLUX)


def _arguments(shapes: RowShapes, dtype: torch.dtype, device: torch.device) -> tuple[Any, ...]:
    return shapes.rows(dtype, device), shapes.rows(dtype, device), *shapes.modulations(3, dtype, device), 1e-6, math.inf


GATED_RESIDUAL_MODULATE = GatedResidualModulate()
