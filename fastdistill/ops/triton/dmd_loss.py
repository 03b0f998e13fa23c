"""Triton kernels of `dmd_loss`.

Formula, shapes and dtypes: fastdistill/ops/dmd_loss.py. Two launches forward: grid (B, P) sums
chunks of the samples, then one program combines the chunks into the loss and the factor of each
sample. One launch backward: grid (B, P) writes the gradient. The host reads nothing back.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdistill.ops.triton.rows import register

CHUNK = 4096
BLOCK = 1024


@triton.jit
def _difference(
    i,
    inside,
    cond,
    uncond_ptr,
    critic_ptr,
    mask_ptr,
    guidance,
    GUIDED: tl.constexpr,
    MASKED: tl.constexpr,
    FINITE: tl.constexpr,
):
    """real, and real - critic as far as it counts."""
    real = cond
    if GUIDED:
        uncond = tl.load(uncond_ptr + i, mask=inside, other=0.0).to(tl.float32)
        real = uncond + guidance * (cond - uncond)
    difference = real - tl.load(critic_ptr + i, mask=inside, other=0.0).to(tl.float32)
    if FINITE:
        difference = tl.where(difference - difference == 0.0, difference, 0.0)
    if MASKED:
        difference = tl.where(tl.load(mask_ptr + i, mask=inside, other=0) != 0, difference, 0.0)
    return real, difference


@triton.jit
def _reduce_kernel(
    x_ptr, noise_ptr, cond_ptr, uncond_ptr, critic_ptr, mask_ptr, coefficients_ptr, partials_ptr,
    N, P, guidance, of_x, of_noise,
    x_stride, noise_stride, cond_stride, uncond_stride, critic_stride, mask_stride,
    GUIDED: tl.constexpr, MASKED: tl.constexpr, PER_SAMPLE: tl.constexpr, FINITE: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    b, p = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    if PER_SAMPLE:
        of_x = tl.load(coefficients_ptr + 2 * b)
        of_noise = tl.load(coefficients_ptr + 2 * b + 1)
    norm = tl.zeros((BLOCK,), dtype=tl.float32)
    square = tl.zeros((BLOCK,), dtype=tl.float32)
    count = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, CHUNK, BLOCK):
        i = p * CHUNK + start + tl.arange(0, BLOCK)
        inside = i < N
        cond = tl.load(cond_ptr + b * cond_stride + i, mask=inside, other=0.0).to(tl.float32)
        real, difference = _difference(
            i, inside, cond, uncond_ptr + b * uncond_stride, critic_ptr + b * critic_stride, mask_ptr + b * mask_stride, guidance,
            GUIDED, MASKED, FINITE,
        )  # fmt: skip
        x = tl.load(x_ptr + b * x_stride + i, mask=inside, other=0.0).to(tl.float32)
        noise = tl.load(noise_ptr + b * noise_stride + i, mask=inside, other=0.0).to(tl.float32)
        norm += tl.abs(real - (of_x * x + of_noise * noise))
        square += difference * difference
        counts = inside
        if MASKED:
            counts = inside & (tl.load(mask_ptr + b * mask_stride + i, mask=inside, other=0) != 0)
        count += counts.to(tl.float32)
    partial = partials_ptr + (b * P + p) * 3
    tl.store(partial, tl.sum(norm, axis=0))
    tl.store(partial + 1, tl.sum(square, axis=0))
    tl.store(partial + 2, tl.sum(count, axis=0))


@triton.jit
def _finish_kernel(
    partials_ptr, weight_ptr, loss_ptr, factors_ptr,
    B, P, N, sign, eps,
    BY_SAMPLE: tl.constexpr, BY_BATCH: tl.constexpr, WEIGHTED: tl.constexpr, FINITE: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    p = tl.arange(0, BLOCK_P)
    inside = p < P
    whole = tl.full((), 0.0, tl.float64)
    count = tl.full((), 0.0, tl.float64)
    for b in range(B):
        partial = partials_ptr + (b * P + p) * 3
        whole += tl.sum(tl.load(partial, mask=inside, other=0.0).to(tl.float64), axis=0)
        count += tl.sum(tl.load(partial + 2, mask=inside, other=0.0).to(tl.float64), axis=0)
    count = tl.where(count > 1.0, count, 1.0)
    loss = tl.full((), 0.0, tl.float64)
    for b in range(B):
        partial = partials_ptr + (b * P + p) * 3
        norm = tl.sum(tl.load(partial, mask=inside, other=0.0).to(tl.float64), axis=0)
        square = tl.sum(tl.load(partial + 1, mask=inside, other=0.0).to(tl.float64), axis=0)
        factor = tl.full((), 1.0, tl.float64) * sign
        if WEIGHTED:
            factor *= tl.load(weight_ptr + b)
        if BY_SAMPLE:
            factor /= norm / N + eps
        if BY_BATCH:
            factor /= whole / (N * B) + eps
        if FINITE:
            factor = tl.where(factor - factor == 0.0, factor, 0.0)
        tl.store(factors_ptr + b, (factor / count).to(tl.float32))
        loss += factor * factor * square
    tl.store(loss_ptr, (0.5 * loss / count).to(tl.float32))


@triton.jit
def _backward_kernel(
    grad_ptr, cond_ptr, uncond_ptr, critic_ptr, mask_ptr, factors_ptr, dx_ptr,
    N, guidance, cond_stride, uncond_stride, critic_stride, mask_stride,
    GUIDED: tl.constexpr, MASKED: tl.constexpr, FINITE: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    b, p = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    factor = tl.load(grad_ptr) * tl.load(factors_ptr + b)
    for start in range(0, CHUNK, BLOCK):
        i = p * CHUNK + start + tl.arange(0, BLOCK)
        inside = i < N
        cond = tl.load(cond_ptr + b * cond_stride + i, mask=inside, other=0.0).to(tl.float32)
        _, difference = _difference(
            i, inside, cond, uncond_ptr + b * uncond_stride, critic_ptr + b * critic_stride, mask_ptr + b * mask_stride, guidance,
            GUIDED, MASKED, FINITE,
        )  # fmt: skip
        tl.store(dx_ptr + b * N + i, (factor * difference).to(dx_ptr.dtype.element_ty), mask=inside)


def dmd_loss(
    x: Tensor, noise: Tensor, cond: Tensor, uncond: Tensor | None, critic: Tensor, coefficients: Tensor | None, weight: Tensor | None,
    mask: Tensor | None, guidance: float, a: float, b: float, sign: float, normaliser: int, eps: float, finite: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    B, N, P = _sizes(x)
    loss, factors = x.new_empty((), dtype=torch.float32), x.new_empty((B,), dtype=torch.float32)
    partials = x.new_empty((B, P, 3), dtype=torch.float32)
    # The kernels read no pointer whose flag is off, but launching needs one.
    uncond_, mask_ = x if uncond is None else uncond, x if mask is None else mask
    if B * P > 0:
        _reduce_kernel[(B, P)](
            x, noise, cond, uncond_, critic, mask_, x if coefficients is None else coefficients, partials,
            N, P, guidance, a, b,
            *(t.stride(0) for t in (x, noise, cond, uncond_, critic, mask_)),
            GUIDED=uncond is not None, MASKED=mask is not None, PER_SAMPLE=coefficients is not None, FINITE=finite,
            CHUNK=CHUNK, BLOCK=BLOCK,
        )  # fmt: skip
    _finish_kernel[(1,)](
        partials, x if weight is None else weight, loss, factors,
        B, P, N, sign, eps,
        BY_SAMPLE=normaliser == 0, BY_BATCH=normaliser == 1, WEIGHTED=weight is not None, FINITE=finite,
        BLOCK_P=triton.next_power_of_2(max(1, P)),
    )  # fmt: skip
    return loss, factors


def dmd_loss_backward(
    grad: Tensor,
    cond: Tensor,
    uncond: Tensor | None,
    critic: Tensor,
    mask: Tensor | None,
    factors: Tensor,
    guidance: float,
    finite: bool,
) -> Tensor:
    B, N, P = _sizes(cond)
    dx = cond.new_empty(cond.shape)
    uncond_, mask_ = cond if uncond is None else uncond, cond if mask is None else mask
    if B * P > 0:
        _backward_kernel[(B, P)](
            grad, cond, uncond_, critic, mask_, factors, dx,
            N, guidance, *(t.stride(0) for t in (cond, uncond_, critic, mask_)),
            GUIDED=uncond is not None, MASKED=mask is not None, FINITE=finite, CHUNK=CHUNK, BLOCK=BLOCK,
        )  # fmt: skip
    return dx


def _sizes(x: Tensor) -> tuple[int, int, int]:
    """Samples, elements of a sample, chunks of a sample."""
    N = x.shape[1:].numel()
    return x.shape[0], N, -(-N // CHUNK)


register("dmd_loss", dmd_loss, dmd_loss_backward)
