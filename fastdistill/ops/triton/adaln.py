"""Triton kernels of `modulate`, `modulate_for_two` and `gated_residual_modulate`.

Formulas, shapes and dtypes: fastdistill/ops/modulate.py and gated_residual_modulate.py. The
operators differ by what is normalised: x, or `h = x + gate * y`.

Forward: one program per row. Backward: grid (B, P). Each program walks one chunk of the tokens of
one batch element, holds the sums over tokens in registers and writes the sums once to (B, P, 2 or
3, D); a second kernel adds the chunks in order. There are no atomics, so two runs agree to the bit.
A program holds whole rows, hence D <= MAX_CHANNELS.
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
    x_ptr, y_ptr, gate_ptr, scale_ptr, shift_ptr, h_ptr, out_ptr, stats_ptr,
    rows, S, D, eps, clip,
    x_stride_b, x_stride_s, y_stride_b, y_stride_s, gate_stride_b, gate_stride_s,
    scale_stride_b, scale_stride_s, shift_stride_b, shift_stride_s,
    RESIDUAL: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    b, s = row // S, row % S
    d = tl.arange(0, BLOCK_D)
    inside = d < D

    x = tl.load(x_ptr + b * x_stride_b + s * x_stride_s + d, mask=inside, other=0.0).to(tl.float32)
    if RESIDUAL:
        y = tl.load(y_ptr + b * y_stride_b + s * y_stride_s + d, mask=inside, other=0.0).to(tl.float32)
        gate = tl.load(gate_ptr + b * gate_stride_b + s * gate_stride_s + d, mask=inside, other=0.0).to(tl.float32)
        h = x + gate * y
        h = tl.where(h > clip, clip, tl.where(h < -clip, -clip, h)).to(h_ptr.dtype.element_ty)
        tl.store(h_ptr + row * D + d, h, mask=inside)
        # The norm is taken of h as the caller and the backward pass see it.
        x = h.to(tl.float32)
    scale = tl.load(scale_ptr + b * scale_stride_b + s * scale_stride_s + d, mask=inside, other=0.0).to(tl.float32)
    shift = tl.load(shift_ptr + b * shift_stride_b + s * shift_stride_s + d, mask=inside, other=0.0).to(tl.float32)

    mean = tl.sum(x, axis=0) / D
    centred = tl.where(inside, x - mean, 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=0) / D + eps)
    out = centred * rstd * (1.0 + scale) + shift

    tl.store(out_ptr + row * D + d, out.to(out_ptr.dtype.element_ty), mask=inside)
    tl.store(stats_ptr + row, mean)
    tl.store(stats_ptr + rows + row, rstd)


@triton.jit
def _backward_kernel(
    grad_ptr, x_ptr, scale_ptr, stats_ptr, other_grad_ptr, y_ptr, gate_ptr,
    dx_ptr, dy_ptr, dscale_ptr, dshift_ptr, dgate_ptr, partials_ptr,
    rows, S, D, P, clip,
    grad_stride_b, grad_stride_s, x_stride_b, x_stride_s, scale_stride_b, scale_stride_s,
    other_grad_stride_b, other_grad_stride_s, y_stride_b, y_stride_s, gate_stride_b, gate_stride_s,
    RESIDUAL: tl.constexpr, FORKED: tl.constexpr, SUMMED: tl.constexpr, PER_TOKEN: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    b, p = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    inside = d < D
    dscale_sum = tl.zeros((BLOCK_D,), dtype=tl.float32)
    dshift_sum = tl.zeros((BLOCK_D,), dtype=tl.float32)
    dgate_sum = tl.zeros((BLOCK_D,), dtype=tl.float32)

    for s in range(p * S // P, (p + 1) * S // P):
        row = b * S + s
        dout = tl.load(grad_ptr + b * grad_stride_b + s * grad_stride_s + d, mask=inside, other=0.0).to(tl.float32)
        if FORKED or RESIDUAL:
            other_grad = other_grad_ptr + b * other_grad_stride_b + s * other_grad_stride_s
            other = tl.load(other_grad + d, mask=inside, other=0.0).to(tl.float32)
        if FORKED:
            dout += other
        x = tl.load(x_ptr + b * x_stride_b + s * x_stride_s + d, mask=inside, other=0.0).to(tl.float32)
        scale = tl.load(scale_ptr + b * scale_stride_b + s * scale_stride_s + d, mask=inside, other=0.0).to(tl.float32)
        mean = tl.load(stats_ptr + row)
        rstd = tl.load(stats_ptr + rows + row)

        normed = tl.where(inside, (x - mean) * rstd, 0.0)
        g = dout * (1.0 + scale)
        mean_g = tl.sum(g, axis=0) / D
        mean_gn = tl.sum(g * normed, axis=0) / D
        dx = (g - mean_g - normed * mean_gn) * rstd
        if RESIDUAL:
            dx = tl.where((x >= clip) | (x <= -clip), 0.0, dx + other)
            y = tl.load(y_ptr + b * y_stride_b + s * y_stride_s + d, mask=inside, other=0.0).to(tl.float32)
            gate = tl.load(gate_ptr + b * gate_stride_b + s * gate_stride_s + d, mask=inside, other=0.0).to(tl.float32)
            tl.store(dy_ptr + row * D + d, (dx * gate).to(dy_ptr.dtype.element_ty), mask=inside)
            if PER_TOKEN:
                tl.store(dgate_ptr + row * D + d, (dx * y).to(dgate_ptr.dtype.element_ty), mask=inside)
            if SUMMED:
                dgate_sum += dx * y
        tl.store(dx_ptr + row * D + d, dx.to(dx_ptr.dtype.element_ty), mask=inside)

        if PER_TOKEN:
            tl.store(dscale_ptr + row * D + d, (dout * normed).to(dscale_ptr.dtype.element_ty), mask=inside)
            tl.store(dshift_ptr + row * D + d, dout.to(dshift_ptr.dtype.element_ty), mask=inside)
        if SUMMED:
            dscale_sum += dout * normed
            dshift_sum += dout

    if SUMMED:
        kinds = 3 if RESIDUAL else 2
        partial = partials_ptr + (b * P + p) * kinds * D + d
        tl.store(partial, dscale_sum, mask=inside)
        tl.store(partial + D, dshift_sum, mask=inside)
        if RESIDUAL:
            tl.store(partial + 2 * D, dgate_sum, mask=inside)


def modulate(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    # Without a residual the kernel reads none of the residual's pointers.
    _, out, stats = _forward(x, x, scale, scale, shift, x, eps, float("inf"), residual=False)
    return out, stats


def modulate_backward(
    grad: Tensor, x: Tensor, scale: Tensor, stats: Tensor, modulation_grads: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dx, _, _, dscale, dshift = _backward(grad, x, scale, stats, grad, x, scale, float("inf"), modulation_grads)
    return dx, dscale, dshift


def modulate_for_two_backward(
    grad: Tensor, second: Tensor, x: Tensor, scale: Tensor, stats: Tensor, modulation_grads: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dx, _, _, dscale, dshift = _backward(
        grad, x, scale, stats, second, x, scale, float("inf"), modulation_grads, forked=True
    )
    return dx, dscale, dshift


def gated_residual_modulate(
    x: Tensor, y: Tensor, gate: Tensor, scale: Tensor, shift: Tensor, eps: float, clip: float
) -> tuple[Tensor, Tensor, Tensor]:
    return _forward(x, y, gate, scale, shift, x.new_empty(x.shape), eps, clip, residual=True)


def gated_residual_modulate_backward(
    grad_h: Tensor,
    grad_out: Tensor,
    h: Tensor,
    y: Tensor,
    gate: Tensor,
    scale: Tensor,
    stats: Tensor,
    clip: float,
    modulation_grads: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _backward(grad_out, h, scale, stats, grad_h, y, gate, clip, modulation_grads, residual=True)


def _forward(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    scale: Tensor,
    shift: Tensor,
    h: Tensor,
    eps: float,
    clip: float,
    *,
    residual: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    B, S, D = batched_shape(x)
    out = x.new_empty(x.shape)
    stats = x.new_empty((2, *x.shape[:-1]), dtype=torch.float32)
    if B * S > 0:
        block, warps = row_block(D)
        _forward_kernel[(B * S,)](
            x, y, gate, scale, shift, h, out, stats,
            B * S, S, D, eps, clip,
            *row_strides(x, x), *row_strides(y, x), *row_strides(gate, x), *row_strides(scale, x), *row_strides(shift, x),
            RESIDUAL=residual, BLOCK_D=block, num_warps=warps,
        )  # fmt: skip
    return h, out, stats


def _backward(
    grad: Tensor, x: Tensor, scale: Tensor, stats: Tensor, other_grad: Tensor, y: Tensor, gate: Tensor, clip: float,
    modulation_grads: bool, *, forked: bool = False, residual: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    B, S, D = batched_shape(x)
    per_token = modulation_grads and is_per_token(scale, x)
    summed = modulation_grads and not per_token
    dx = x.new_empty(x.shape)
    dy = x.new_empty(x.shape if residual else (0,))
    shape = scale.shape if modulation_grads else (0,)
    dscale, dshift = scale.new_empty(shape), scale.new_empty(shape)
    dgate = scale.new_empty(shape if residual else (0,))
    if B * S == 0:
        return dx, dy, dgate.zero_(), dscale.zero_(), dshift.zero_()

    P = token_chunks(B, S, x.device)
    partials = x.new_empty((B, P, 3 if residual else 2, D) if summed else (0,), dtype=torch.float32)
    block, warps = row_block(D)
    _backward_kernel[(B, P)](
        grad, x, scale, stats, other_grad, y, gate,
        dx, dy, dscale, dshift, dgate, partials,
        B * S, S, D, P, clip,
        *row_strides(grad, x), *row_strides(x, x), *row_strides(scale, x),
        *row_strides(other_grad, x), *row_strides(y, x), *row_strides(gate, x),
        RESIDUAL=residual, FORKED=forked, SUMMED=summed, PER_TOKEN=per_token, BLOCK_D=block, num_warps=warps,
    )  # fmt: skip
    if summed:
        sum_partials(partials, [dscale, dshift, dgate] if residual else [dscale, dshift])
    return dx, dy, dgate, dscale, dshift


register("modulate", modulate, modulate_backward)
register("modulate_for_two", modulate, modulate_for_two_backward)
register("gated_residual_modulate", gated_residual_modulate, gated_residual_modulate_backward)
