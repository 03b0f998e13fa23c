"""Triton kernels of `gated_residual`.

Formula, shapes and dtypes: fastdistill/ops/gated_residual.py. Forward: one program per row.
Backward: grid (B, P) as in adaln.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdistill.ops.triton.rows import (
    batched_shape,
    is_per_token,
    register,
    row_block,
    row_strides,
    sum_partials,
    token_chunks,
)


@triton.jit
def _forward_kernel(
    x_ptr, y_ptr, gate_ptr, out_ptr,
    S, D, clip,
    x_stride_b, x_stride_s, y_stride_b, y_stride_s, gate_stride_b, gate_stride_s,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    b, s = row // S, row % S
    d = tl.arange(0, BLOCK_D)
    inside = d < D
    x = tl.load(x_ptr + b * x_stride_b + s * x_stride_s + d, mask=inside, other=0.0).to(tl.float32)
    y = tl.load(y_ptr + b * y_stride_b + s * y_stride_s + d, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + b * gate_stride_b + s * gate_stride_s + d, mask=inside, other=0.0).to(tl.float32)
    out = x + gate * y
    out = tl.where(out > clip, clip, tl.where(out < -clip, -clip, out))
    tl.store(out_ptr + row * D + d, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _backward_kernel(
    grad_ptr, y_ptr, gate_ptr, dy_ptr, dgate_ptr, partials_ptr,
    S, D, P,
    grad_stride_b, grad_stride_s, y_stride_b, y_stride_s, gate_stride_b, gate_stride_s,
    SUMMED: tl.constexpr, PER_TOKEN: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    b, p = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    inside = d < D
    dgate_sum = tl.zeros((BLOCK_D,), dtype=tl.float32)
    for s in range(p * S // P, (p + 1) * S // P):
        row = b * S + s
        dout = tl.load(grad_ptr + b * grad_stride_b + s * grad_stride_s + d, mask=inside, other=0.0).to(tl.float32)
        y = tl.load(y_ptr + b * y_stride_b + s * y_stride_s + d, mask=inside, other=0.0).to(tl.float32)
        gate = tl.load(gate_ptr + b * gate_stride_b + s * gate_stride_s + d, mask=inside, other=0.0).to(tl.float32)
        tl.store(dy_ptr + row * D + d, (dout * gate).to(dy_ptr.dtype.element_ty), mask=inside)
        if PER_TOKEN:
            tl.store(dgate_ptr + row * D + d, (dout * y).to(dgate_ptr.dtype.element_ty), mask=inside)
        if SUMMED:
            dgate_sum += dout * y
    if SUMMED:
        tl.store(partials_ptr + (b * P + p) * D + d, dgate_sum, mask=inside)


def gated_residual(x: Tensor, y: Tensor, gate: Tensor, clip: float) -> Tensor:
    B, S, D = batched_shape(x)
    out = x.new_empty(x.shape)
    if B * S > 0:
        block, warps = row_block(D)
        _forward_kernel[(B * S,)](
            x, y, gate, out, S, D, clip,
            *row_strides(x, x), *row_strides(y, x), *row_strides(gate, x),
            BLOCK_D=block, num_warps=warps,
        )  # fmt: skip
    return out


def gated_residual_backward(grad: Tensor, y: Tensor, gate: Tensor, gate_grad: bool) -> tuple[Tensor, Tensor]:
    B, S, D = batched_shape(y)
    per_token = gate_grad and is_per_token(gate, y)
    summed = gate_grad and not per_token
    dy, dgate = y.new_empty(y.shape), gate.new_empty(gate.shape if gate_grad else (0,))
    if B * S == 0:
        return dy, dgate.zero_()
    P = token_chunks(B, S, y.device)
    partials = y.new_empty((B, P, 1, D) if summed else (0,), dtype=torch.float32)
    block, warps = row_block(D)
    _backward_kernel[(B, P)](
        grad, y, gate, dy, dgate, partials,
        S, D, P,
        *row_strides(grad, y), *row_strides(y, y), *row_strides(gate, y),
        SUMMED=summed, PER_TOKEN=per_token, BLOCK_D=block, num_warps=warps,
    )  # fmt: skip
    if summed:
        sum_partials(partials, [dgate])
    return dy, dgate


register("gated_residual", gated_residual, gated_residual_backward)
