"""Triton kernels of qk_norm_rope. Formula, shapes and dtypes: fastdistill/ops/qk_norm_rope.py.

q and k are two launches of the same kernels. Forward: one program per token, all its heads at once. Backward: one program per chunk of
the tokens of all batch elements, which holds the sum of the weight's gradient and writes it once; a second kernel adds the chunks in
order. The two channels of a pair are held apart, so one code serves both pairings.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdistill.ops.triton.rows import register, sum_partials, token_chunks


@triton.jit
def _pair(ptr, pair, half, inside, ADJACENT: tl.constexpr):
    """Both channels of every pair of a head, in float32."""
    a, b = (2 * pair, 2 * pair + 1) if ADJACENT else (pair, pair + half)
    first = tl.load(ptr + a, mask=inside, other=0.0).to(tl.float32)
    return first, tl.load(ptr + b, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _store_pair(ptr, first, second, pair, half, inside, ADJACENT: tl.constexpr):
    a, b = (2 * pair, 2 * pair + 1) if ADJACENT else (pair, pair + half)
    tl.store(ptr + a, first.to(ptr.dtype.element_ty), mask=inside)
    tl.store(ptr + b, second.to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def _table(ptr, pair, half, ADJACENT: tl.constexpr, COMPACT: tl.constexpr):
    if COMPACT:
        both = tl.load(ptr + pair, mask=pair < half, other=0.0)
        return both, both
    else:
        return _pair(ptr, pair, half, pair < half, ADJACENT)


@triton.jit
def _forward_kernel(
    x_ptr, weight_ptr, cos_ptr, sin_ptr, out_ptr,
    S, H, half, eps,
    x_stride_b, x_stride_s, x_stride_h, cos_stride, sin_stride,
    ADJACENT: tl.constexpr, COMPACT: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    b, s = row // S, row % S
    head, pair = tl.arange(0, BLOCK_H)[:, None], tl.arange(0, BLOCK)[None, :]
    inside = (head < H) & (pair < half)

    cos_a, cos_b = _table(cos_ptr + s * cos_stride, pair, half, ADJACENT, COMPACT)
    sin_a, sin_b = _table(sin_ptr + s * sin_stride, pair, half, ADJACENT, COMPACT)
    weight_a, weight_b = _pair(weight_ptr, pair, half, pair < half, ADJACENT)
    x_a, x_b = _pair(x_ptr + b * x_stride_b + s * x_stride_s + head * x_stride_h, pair, half, inside, ADJACENT)

    rstd = 1.0 / tl.sqrt(tl.sum(x_a * x_a + x_b * x_b, axis=1) / (2 * half) + eps)[:, None]
    n_a, n_b = x_a * rstd * weight_a, x_b * rstd * weight_b
    out = out_ptr + (row * H + head) * 2 * half
    _store_pair(out, n_a * cos_a - n_b * sin_a, n_b * cos_b + n_a * sin_b, pair, half, inside, ADJACENT)


@triton.jit
def _backward_kernel(
    grad_ptr, x_ptr, weight_ptr, cos_ptr, sin_ptr, dx_ptr, partials_ptr,
    rows, S, H, half, P, eps,
    grad_stride_b, grad_stride_s, grad_stride_h, x_stride_b, x_stride_s, x_stride_h, cos_stride, sin_stride,
    ADJACENT: tl.constexpr, COMPACT: tl.constexpr, WEIGHT: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    p = tl.program_id(0).to(tl.int64)
    head, pair = tl.arange(0, BLOCK_H)[:, None], tl.arange(0, BLOCK)[None, :]
    inside = (head < H) & (pair < half)
    weight_a, weight_b = _pair(weight_ptr, pair, half, pair < half, ADJACENT)
    dweight_a = tl.zeros((BLOCK_H, BLOCK), dtype=tl.float32)
    dweight_b = tl.zeros((BLOCK_H, BLOCK), dtype=tl.float32)

    for row in range(p * rows // P, (p + 1) * rows // P):
        b, s = row // S, row % S
        cos_a, cos_b = _table(cos_ptr + s * cos_stride, pair, half, ADJACENT, COMPACT)
        sin_a, sin_b = _table(sin_ptr + s * sin_stride, pair, half, ADJACENT, COMPACT)
        x_a, x_b = _pair(x_ptr + b * x_stride_b + s * x_stride_s + head * x_stride_h, pair, half, inside, ADJACENT)
        grad = grad_ptr + b * grad_stride_b + s * grad_stride_s + head * grad_stride_h
        grad_a, grad_b = _pair(grad, pair, half, inside, ADJACENT)

        rstd = 1.0 / tl.sqrt(tl.sum(x_a * x_a + x_b * x_b, axis=1) / (2 * half) + eps)[:, None]
        m_a, m_b = x_a * rstd, x_b * rstd
        g_a, g_b = grad_a * cos_a + grad_b * sin_b, grad_b * cos_b - grad_a * sin_a
        dweight_a += g_a * m_a
        dweight_b += g_b * m_b
        g_a, g_b = g_a * weight_a, g_b * weight_b
        mean = (tl.sum(g_a * m_a + g_b * m_b, axis=1) / (2 * half))[:, None]
        dx = dx_ptr + (row * H + head) * 2 * half
        _store_pair(dx, (g_a - m_a * mean) * rstd, (g_b - m_b * mean) * rstd, pair, half, inside, ADJACENT)

    if WEIGHT:
        _store_pair(
            partials_ptr + p * 2 * half, tl.sum(dweight_a, axis=0)[None, :], tl.sum(dweight_b, axis=0)[None, :],
            pair, half, pair < half, ADJACENT,
        )  # fmt: skip


def qk_norm_rope(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, eps: float, adjacent: bool
) -> tuple[Tensor, Tensor]:
    return _forward(q, q_weight, cos, sin, eps, adjacent), _forward(k, k_weight, cos, sin, eps, adjacent)


def qk_norm_rope_backward(
    grad_q: Tensor, grad_k: Tensor, q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor,
    eps: float, adjacent: bool, weight_grads: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dq, dq_weight = _backward(grad_q, q, q_weight, cos, sin, eps, adjacent, weight_grads)
    dk, dk_weight = _backward(grad_k, k, k_weight, cos, sin, eps, adjacent, weight_grads)
    return dq, dk, dq_weight, dk_weight


def _forward(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float, adjacent: bool) -> Tensor:
    B, S, H, d = x.shape
    out = x.new_empty(x.shape)
    if x.numel() > 0:
        block_h, block, warps = _blocks(H, d)
        _forward_kernel[(B * S,)](
            x, weight, cos, sin, out,
            S, H, d // 2, eps,
            *x.stride()[:3], cos.stride(0), sin.stride(0),
            ADJACENT=adjacent, COMPACT=cos.shape[1] != d, BLOCK_H=block_h, BLOCK=block, num_warps=warps,
        )  # fmt: skip
    return out


def _backward(
    grad: Tensor, x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float, adjacent: bool, weight_grads: bool
) -> tuple[Tensor, Tensor]:
    B, S, H, d = x.shape
    dx, dweight = x.new_empty(x.shape), weight.new_empty((d,) if weight_grads else (0,))
    if x.numel() == 0:
        return dx, dweight.zero_()
    P = token_chunks(1, B * S, x.device)
    partials = x.new_empty((1, P, 1, d) if weight_grads else (0,), dtype=torch.float32)
    block_h, block, warps = _blocks(H, d)
    _backward_kernel[(P,)](
        grad, x, weight, cos, sin, dx, partials,
        B * S, S, H, d // 2, P, eps,
        *grad.stride()[:3], *x.stride()[:3], cos.stride(0), sin.stride(0),
        ADJACENT=adjacent, COMPACT=cos.shape[1] != d, WEIGHT=weight_grads, BLOCK_H=block_h, BLOCK=block, num_warps=warps,
    )  # fmt: skip
    if weight_grads:
        sum_partials(partials, [dweight])
    return dx, dweight


def _blocks(H: int, d: int) -> tuple[int, int, int]:
    """Heads and pairs of a tile, and the warps for it."""
    block_h, block = triton.next_power_of_2(H), triton.next_power_of_2(d // 2)
    return block_h, block, min(16, max(1, block_h * block // 512))


register("qk_norm_rope", qk_norm_rope, qk_norm_rope_backward)
