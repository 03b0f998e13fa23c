"""Gated residual of a DiT block: x + gate * y.

Shapes: B batch, S tokens, D channels.

Kernels: csrc/cpu/gated_residual.cpp, csrc/cuda/gated_residual.cu, ops/triton/gated_residual.py
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastdistill.ops import row_shapes
from fastdistill.ops.backend import Backend, Request
from fastdistill.ops.op import Arguments, Case, Operator, Tangents, Tensors
from fastdistill.ops.row_shapes import RowShapes
from fastdistill.ops.rows import check_like, check_modulation, check_rows, contiguous_rows, over_rows

FLOAT16_LIMIT = 65504.0


def gated_residual(x: Tensor, y: Tensor, gate: Tensor, *, clip: bool = False, backend: Request | None = None) -> Tensor:
    """`x + gate * y`, where y is what a block's attention or feed-forward adds to its stream x.

    The residual of adaLN-Zero, arXiv 2212.09748, section 3.2, as in every FLUX block of diffusers.
    Differentiable in x, y and gate, in reverse and in forward mode.

    Args:
        x, y: (B, S, D) or (S, D) of one dtype, float32, bfloat16, float16 or (on CPU) float64. D
            must be contiguous, the other axes may have any stride.
        gate: (D), (B, D), (B, 1, D) or (B, S, D), B may be 1; for an (S, D) x: (D) or (S, D). The
            dtype of x, or float32 for a bfloat16 or float16 x.
        clip: clamp the sum to +-65504, as diffusers' blocks do in float16 to keep it finite. An
            element on the limit passes no gradient and no tangent.
        backend: `eager`, `native`, `triton` or `auto`; by default the one of `use_backend`, else
            `auto`.

    Returns:
        A contiguous tensor (eager: strided as torch pleases) of the shape and dtype of x.

    Products and sums are float32 (float64 for float64), rounded once at the end. The gradient of
    gate is summed over tokens in an order given by the shape alone, so it is bitwise repeatable.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, device, shape or stride; the
            message says which.
        RuntimeError: `backend` was named and cannot run here; the message says why.
    """
    return GATED_RESIDUAL(x, y, gate, clip_limit(clip), backend=backend)  # type: ignore[no-any-return]


def clip_limit(clip: bool) -> float:
    """Largest magnitude of a sum that is clipped, or infinity."""
    return FLOAT16_LIMIT if clip else math.inf


def residual_sum(x: Tensor, y: Tensor, gate: Tensor, clip: float) -> Tensor:
    """Formula of the gated residual in plain PyTorch."""
    h = (x + over_rows(gate, x) * y).to(x.dtype)
    return h if math.isinf(clip) else h.clamp(-clip, clip)


class GatedResidual(Operator):
    name = "gated_residual"
    triton_module = "fastdistill.ops.triton.gated_residual"
    schema = "(Tensor x, Tensor y, Tensor gate, float clip) -> Tensor"
    backward_schema = "(Tensor grad, Tensor y, Tensor gate, bool gate_grad) -> (Tensor dy, Tensor dgate)"

    def check(self, x: Tensor, y: Tensor, gate: Tensor, clip: float) -> None:
        check_rows("x", x)
        check_like("y", y, x)
        check_modulation("gate", gate, x)

    def reference(self, x: Tensor, y: Tensor, gate: Tensor, clip: float) -> Tensor:
        return residual_sum(x, y, gate, clip)

    def fake(self, x: Tensor, y: Tensor, gate: Tensor, clip: float) -> Tensor:
        return x.new_empty(x.shape)

    def fake_backward(self, grad: Tensor, y: Tensor, gate: Tensor, gate_grad: bool) -> tuple[Tensor, Tensor]:
        return y.new_empty(y.shape), gate.new_empty(gate.shape if gate_grad else (0,))

    def save(self, ctx: Any, arguments: tuple[Any, ...], results: tuple[Tensor]) -> None:
        _, y, gate, ctx.clip = arguments
        ctx.save_for_backward(y, gate, *(() if math.isinf(ctx.clip) else results))

    def backward(self, ctx: Any, backward_op: Callable[..., Any], *grads: Tensor) -> tuple[Tensor | None, ...]:
        y, gate, *out = ctx.saved_tensors
        dx = contiguous_rows(grads[0])
        if out:
            # Not in the kernel: float16 without autocast is rare, and in every other case dx is the
            # incoming gradient itself.
            dx = dx.masked_fill(out[0].abs() >= ctx.clip, 0.0)
        if not (ctx.needs_input_grad[1] or ctx.needs_input_grad[2]):
            return dx, None, None, None
        gate_grad = ctx.needs_input_grad[2]
        dy, dgate = backward_op(dx, y, gate, gate_grad)
        return dx, dy, dgate if gate_grad else None, None

    def jvp(self, backend: Backend, arguments: Arguments, results: Tensors, tangents: Tangents) -> Tensors:
        x, y, gate, clip = arguments
        tangent, dy, dgate, _ = (t if t is None else contiguous_rows(t) for t in tangents)
        for branch, factor in ((dy, gate), (y, dgate)):
            if branch is None or factor is None:
                continue
            if tangent is None:
                tangent = (over_rows(factor, x) * branch).to(x.dtype)
            else:
                tangent = self.forward_op(backend)(tangent, branch, factor, math.inf)
        assert tangent is not None
        if math.isinf(clip):
            return (tangent,)
        return (tangent.masked_fill(results[0].abs() >= clip, 0.0),)

    def bytes_moved(self, x: Tensor, y: Tensor, gate: Tensor, clip: float) -> tuple[int, int]:
        return 3 * x.nbytes + gate.nbytes, 3 * x.nbytes + 2 * gate.nbytes

    def cases(self) -> Sequence[Case]:
        return row_shapes.cases(_arguments)

    def workloads(self) -> Sequence[Case]:
        return row_shapes.cases(_arguments, row_shapes.FLUX)


def _arguments(shapes: RowShapes, dtype: torch.dtype, device: torch.device) -> tuple[Any, ...]:
    return shapes.rows(dtype, device), shapes.rows(dtype, device), *shapes.modulations(1, dtype, device), math.inf


GATED_RESIDUAL = GatedResidual()
