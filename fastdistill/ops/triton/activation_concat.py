"""Triton kernels of `activation_concat`.

Formulas, shapes and dtypes: fastdistill/ops/activation_concat.py. One program per row and block of
the row's channels, both for x and for the activation.
"""

import triton
import triton.language as tl
from torch import Tensor

from fastdistill.ops.triton.rows import batched_shape, register, row_strides

BLOCK = 1024
LINEAR, CUBIC = tl.constexpr(1.5957691216057308), tl.constexpr(0.07135481627260025)


@triton.jit
def _forward_kernel(
    x_ptr, y_ptr, out_ptr,
    S, before, size, before_blocks,
    x_stride_b, x_stride_s, y_stride_b, y_stride_s,
    GATED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    b, s = row // S, row % S
    out = out_ptr + row * (before + size)
    if block < before_blocks:
        i = block * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + b * x_stride_b + s * x_stride_s + i, mask=i < before)
        tl.store(out + i, x, mask=i < before)
    else:
        i = (block - before_blocks) * BLOCK + tl.arange(0, BLOCK)
        y_row = y_ptr + b * y_stride_b + s * y_stride_s + i
        y = tl.load(y_row, mask=i < size, other=0.0).to(tl.float32)
        if GATED:
            y *= tl.sigmoid(y) * tl.load(y_row + size, mask=i < size, other=0.0).to(tl.float32)
        else:
            y *= tl.sigmoid(y * (LINEAR + CUBIC * y * y))
        tl.store(out + before + i, y.to(out_ptr.dtype.element_ty), mask=i < size)


@triton.jit
def _backward_kernel(
    grad_ptr, y_ptr, dy_ptr,
    S, size,
    grad_stride_b, grad_stride_s, y_stride_b, y_stride_s,
    GATED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    b, s = row // S, row % S
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    y_row = y_ptr + b * y_stride_b + s * y_stride_s + i
    y = tl.load(y_row, mask=i < size, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr + b * grad_stride_b + s * grad_stride_s + i, mask=i < size, other=0.0).to(tl.float32)
    if GATED:
        dy = dy_ptr + row * 2 * size + i
        p = tl.sigmoid(y)
        other = tl.load(y_row + size, mask=i < size, other=0.0).to(tl.float32)
        tl.store(dy + size, (grad * y * p).to(dy_ptr.dtype.element_ty), mask=i < size)
        slope = other * (p + y * p * tl.sigmoid(-y))
    else:
        dy = dy_ptr + row * size + i
        w = y * (LINEAR + CUBIC * y * y)
        p = tl.sigmoid(w)
        # sigmoid(-w) and not 1 - p, which rounds away what is left.
        slope = p + y * p * tl.sigmoid(-w) * (LINEAR + 3.0 * CUBIC * y * y)
    tl.store(dy, (grad * slope).to(dy_ptr.dtype.element_ty), mask=i < size)


def activation_concat(y: Tensor, x: Tensor | None, gated: bool) -> Tensor:
    B, S, channels = batched_shape(y)
    size, before = channels // 2 if gated else channels, 0 if x is None else x.shape[-1]
    out = y.new_empty((*y.shape[:-1], before + size))
    before_blocks = triton.cdiv(before, BLOCK)
    if out.numel() > 0:
        first = y if x is None else x
        _forward_kernel[(B * S, before_blocks + triton.cdiv(size, BLOCK))](
            first,
            y,
            out,
            S,
            before,
            size,
            before_blocks,
            *row_strides(first, y),
            *row_strides(y, y),
            GATED=gated,
            BLOCK=BLOCK,
        )
    return out


def activation_concat_backward(grad: Tensor, y: Tensor, gated: bool) -> Tensor:
    B, S, channels = batched_shape(y)
    size = channels // 2 if gated else channels
    dy = y.new_empty(y.shape)
    if dy.numel() > 0:
        _backward_kernel[(B * S, triton.cdiv(size, BLOCK))](
            grad, y, dy, S, size, *row_strides(grad, y), *row_strides(y, y), GATED=gated, BLOCK=BLOCK
        )
    return dy


register("activation_concat", activation_concat, activation_concat_backward)
