"""Triton kernels of modulate. Formula, shapes and dtypes: fastdistill/ops/modulate.py.

Forward: one program per row. Backward: grid (B, P), each program walks one chunk of the tokens of one batch
element, holds the sums for dscale and dshift in registers and writes them once to (B, P, 2, D); a second
kernel adds the chunks in order. No atomics, so two runs agree to the bit. Rows are held whole, hence D <=
MAX_CHANNELS.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

# Above a few thousand channels registers spill, which is slow and right; no model is near this.
MAX_CHANNELS = 65536


@triton.jit
def _forward_kernel(
    x_ptr, scale_ptr, shift_ptr, out_ptr, stats_ptr,
    rows, S, D, eps,
    x_stride_b, x_stride_s, scale_stride_b, scale_stride_s, shift_stride_b, shift_stride_s,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    b, s = row // S, row % S
    d = tl.arange(0, BLOCK_D)
    inside = d < D

    x = tl.load(x_ptr + b * x_stride_b + s * x_stride_s + d, mask=inside, other=0.0).to(tl.float32)
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
    grad_ptr, x_ptr, scale_ptr, stats_ptr, dx_ptr, dscale_ptr, dshift_ptr, partials_ptr,
    rows, S, D, P,
    grad_stride_b, grad_stride_s, x_stride_b, x_stride_s, scale_stride_b, scale_stride_s,
    SUMMED: tl.constexpr, PER_TOKEN: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    b, p = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    inside = d < D
    dscale_sum = tl.zeros((BLOCK_D,), dtype=tl.float32)
    dshift_sum = tl.zeros((BLOCK_D,), dtype=tl.float32)

    for s in range(p * S // P, (p + 1) * S // P):
        row = b * S + s
        dy = tl.load(grad_ptr + b * grad_stride_b + s * grad_stride_s + d, mask=inside, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + b * x_stride_b + s * x_stride_s + d, mask=inside, other=0.0).to(tl.float32)
        scale = tl.load(scale_ptr + b * scale_stride_b + s * scale_stride_s + d, mask=inside, other=0.0).to(tl.float32)
        mean = tl.load(stats_ptr + row)
        rstd = tl.load(stats_ptr + rows + row)

        normed = tl.where(inside, (x - mean) * rstd, 0.0)
        g = dy * (1.0 + scale)
        mean_g = tl.sum(g, axis=0) / D
        mean_gn = tl.sum(g * normed, axis=0) / D
        dx = (g - mean_g - normed * mean_gn) * rstd
        tl.store(dx_ptr + row * D + d, dx.to(dx_ptr.dtype.element_ty), mask=inside)

        if PER_TOKEN:
            tl.store(dscale_ptr + row * D + d, (dy * normed).to(dscale_ptr.dtype.element_ty), mask=inside)
            tl.store(dshift_ptr + row * D + d, dy.to(dshift_ptr.dtype.element_ty), mask=inside)
        if SUMMED:
            dscale_sum += dy * normed
            dshift_sum += dy

    if SUMMED:
        partial = partials_ptr + (b * P + p) * 2 * D + d
        tl.store(partial, dscale_sum, mask=inside)
        tl.store(partial + D, dshift_sum, mask=inside)


@triton.jit
def _sum_partials_kernel(partials_ptr, out_ptr, count, stride, D, BLOCK_D: tl.constexpr):
    group = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = d < D
    total = tl.zeros((BLOCK_D,), dtype=tl.float32)
    for i in range(count):
        total += tl.load(partials_ptr + (group * count + i) * stride + d, mask=inside, other=0.0)
    tl.store(out_ptr + group * D + d, total.to(out_ptr.dtype.element_ty), mask=inside)


def modulate(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    B, S, D = _batched_shape(x)
    out = x.new_empty(x.shape)
    stats = x.new_empty((2, *x.shape[:-1]), dtype=torch.float32)
    if B * S > 0:
        block, warps = _row_block(D)
        _forward_kernel[(B * S,)](
            x, scale, shift, out, stats,
            B * S, S, D, eps,
            *_row_strides(x, x), *_row_strides(scale, x), *_row_strides(shift, x),
            BLOCK_D=block, num_warps=warps,
        )  # fmt: skip
    return out, stats


def modulate_backward(grad: Tensor, x: Tensor, scale: Tensor, stats: Tensor, modulation_grads: bool) -> tuple[Tensor, Tensor, Tensor]:
    B, S, D = _batched_shape(x)
    per_token = modulation_grads and scale.dim() == x.dim() and scale.shape[-2] > 1
    summed = modulation_grads and not per_token
    dx = x.new_empty(x.shape)
    shape = scale.shape if modulation_grads else (0,)
    dscale, dshift = scale.new_empty(shape), scale.new_empty(shape)
    if B * S == 0:
        return dx, dscale.zero_(), dshift.zero_()

    P = max(1, min(-(-S // 4), 2 * _multiprocessors(x.device) // B))
    partials = x.new_empty((B, P, 2, D) if summed else (0,), dtype=torch.float32)
    block, warps = _row_block(D)
    _backward_kernel[(B, P)](
        grad, x, scale, stats, dx, dscale, dshift, partials,
        B * S, S, D, P,
        *_row_strides(grad, x), *_row_strides(x, x), *_row_strides(scale, x),
        SUMMED=summed, PER_TOKEN=per_token, BLOCK_D=block, num_warps=warps,
    )  # fmt: skip
    if summed:
        groups = dscale.numel() // D
        count = B * P // groups
        for which, out in enumerate((dscale, dshift)):
            _sum_partials_kernel[(groups, triton.cdiv(D, 128))](partials[0, 0, which], out, count, 2 * D, D, BLOCK_D=128)
    return dx, dscale, dshift


def _batched_shape(x: Tensor) -> tuple[int, int, int]:
    return (1, *x.shape) if x.dim() == 2 else tuple(x.shape)  # type: ignore[return-value]


def _row_strides(t: Tensor, x: Tensor) -> tuple[int, int]:
    """Strides over batch and tokens, 0 where t is broadcast along x."""
    dim = t.dim()
    token_axis = dim - 2 if dim == 3 or (dim == 2 and x.dim() == 2) else None
    batch_axis = 0 if dim == 3 or (dim == 2 and x.dim() == 3) else None
    return tuple(0 if axis is None or t.shape[axis] == 1 else t.stride(axis) for axis in (batch_axis, token_axis))  # type: ignore[return-value]


def _row_block(D: int) -> tuple[int, int]:
    if D > MAX_CHANNELS:
        raise ValueError(f"x: the triton backend holds a row in registers, expected D <= {MAX_CHANNELS}, got {D}")
    block = triton.next_power_of_2(D)
    return block, min(16, max(1, block // 256))


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    # Under TRITON_INTERPRET=1 there is no device to fill; two chunks exercise the second stage.
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


# CompositeExplicitAutograd rather than CUDA: the interpreter runs the same functions on CPU tensors.
torch.library.impl("fastdistill::modulate.triton", "CompositeExplicitAutograd")(modulate)
torch.library.impl("fastdistill::modulate_backward.triton", "CompositeExplicitAutograd")(modulate_backward)
