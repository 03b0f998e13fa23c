"""Triton kernels of `rope_attention`.

Formula, shapes and dtypes: fastdistill/ops/rope_attention.py. Flash attention (arXiv 2307.08691)
whose programs normalise and rotate their own tiles of q and k.

Forward: one program per block of queries of a head, which loops over the keys. Backward: the same
program again for dq, which also stores the row sums of `grad * out`; then one program per block of
keys, which reads these sums and loops over the queries for dk and dv. A program owns whole heads,
so it takes its gradient back through the rotation and the norm itself. It writes its part of the
weights' gradients, and further kernels add the parts in order.

`q k^T` does not depend on the order of the channels. The two channels of every pair are therefore
held in two tiles of half the width, `s = q_a k_a^T + q_b k_b^T`, in which the rotation and its
inverse are elementwise for both pairings.
"""

import functools
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import driver

from fastdistill.ops.backend import triton_interpreted
from fastdistill.ops.triton.rows import register, sum_partials

# The kernels compute 2^x, which is one instruction. The scale therefore carries log2(e), and the
# log-sum-exp is to base 2.
LOG2_E = math.log2(math.e)
# Shared memory of a block by compute capability; 99 KiB where not listed (8.6, 8.9, 12.0).
SHARED_KIB = {80: 163, 87: 163, 90: 227, 100: 227, 103: 227, 110: 227}
INTERPRETED = tl.constexpr(triton_interpreted())


@triton.jit
def _narrowed(x, dtype: tl.constexpr):
    """float32 in a dtype that tensors have, rounded to nearest."""
    if INTERPRETED and dtype == tl.bfloat16:
        # The interpreter cuts off what a GPU rounds.
        bits = x.to(tl.uint32, bitcast=True)
        x = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def _dot(a, b, onto=None):
    if INTERPRETED:
        # The interpreter multiplies the bits of bfloat16. Products of 16-bit numbers are exact in
        # float32, as in tensor cores.
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, onto, input_precision="ieee")


@triton.jit
def _products(a, b, other_a, other_b):
    return _dot(b, tl.trans(other_b), _dot(a, tl.trans(other_a)))


@triton.jit
def _pair(
    ptr, row, stride, inside, D: tl.constexpr, HALF: tl.constexpr, ADJACENT: tl.constexpr, POLICY: tl.constexpr = ""
):
    """The first channels of all pairs in rows of d contiguous numbers, and the second channels."""
    start = ptr + row.to(tl.int64)[:, None] * stride
    if ADJACENT:
        # One load of whole rows: one for each half would fetch every sector twice.
        channel = tl.arange(0, 2 * HALF)[None, :]
        rows = tl.load(start + channel, mask=inside[:, None] & (channel < D), other=0.0, eviction_policy=POLICY)
        return tl.split(tl.reshape(rows, (row.shape[0], HALF, 2)))
    else:
        pair = tl.arange(0, HALF)[None, :]
        mask = inside[:, None] & (pair < D // 2)
        first = tl.load(start + pair, mask=mask, other=0.0, eviction_policy=POLICY)
        return first, tl.load(start + pair + D // 2, mask=mask, other=0.0, eviction_policy=POLICY)


@triton.jit
def _store_pair(ptr, row, stride, first, second, inside, D: tl.constexpr, HALF: tl.constexpr, ADJACENT: tl.constexpr):
    start = ptr + row.to(tl.int64)[:, None] * stride
    first, second = _narrowed(first, ptr.dtype.element_ty), _narrowed(second, ptr.dtype.element_ty)
    if ADJACENT:
        channel = tl.arange(0, 2 * HALF)[None, :]
        rows = tl.reshape(tl.join(first, second), (row.shape[0], 2 * HALF))
        tl.store(start + channel, rows, mask=inside[:, None] & (channel < D))
    else:
        pair = tl.arange(0, HALF)[None, :]
        mask = inside[:, None] & (pair < D // 2)
        tl.store(start + pair, first, mask=mask)
        tl.store(start + pair + D // 2, second, mask=mask)


@triton.jit
def _rows(ptr, row, stride, inside, D: tl.constexpr, HALF: tl.constexpr):
    channel = tl.arange(0, 2 * HALF)[None, :]
    start = ptr + row.to(tl.int64)[:, None] * stride
    return tl.load(start + channel, mask=inside[:, None] & (channel < D), other=0.0)


@triton.jit
def _store_rows(ptr, row, stride, values, inside, D: tl.constexpr, HALF: tl.constexpr):
    channel = tl.arange(0, 2 * HALF)[None, :]
    start = ptr + row.to(tl.int64)[:, None] * stride
    tl.store(start + channel, _narrowed(values, ptr.dtype.element_ty), mask=inside[:, None] & (channel < D))


@triton.jit
def _weight(ptr, D: tl.constexpr, HALF: tl.constexpr, ADJACENT: tl.constexpr):
    only = tl.zeros((1,), dtype=tl.int32)
    first, second = _pair(ptr, only, 0, only == 0, D, HALF, ADJACENT)
    return first.to(tl.float32), second.to(tl.float32)


@triton.jit
def _table(
    ptr, row, stride, inside,
    D: tl.constexpr, HALF: tl.constexpr, ADJACENT: tl.constexpr, COMPACT: tl.constexpr, POLICY: tl.constexpr = "",
):  # fmt: skip
    if COMPACT:
        pair = tl.arange(0, HALF)[None, :]
        start = ptr + row.to(tl.int64)[:, None] * stride
        both = tl.load(start + pair, mask=inside[:, None] & (pair < D // 2), other=0.0, eviction_policy=POLICY)
        return both, both
    else:
        return _pair(ptr, row, stride, inside, D, HALF, ADJACENT, POLICY)


@triton.jit
def _normed(
    ptr,
    row,
    stride,
    inside,
    eps,
    D: tl.constexpr,
    HALF: tl.constexpr,
    ADJACENT: tl.constexpr,
    POLICY: tl.constexpr = "",
):
    """`x / sqrt(mean(x^2) + eps)`, and the factor."""
    first, second = _pair(ptr, row, stride, inside, D, HALF, ADJACENT, POLICY)
    first, second = first.to(tl.float32), second.to(tl.float32)
    rstd = 1.0 / tl.sqrt(tl.sum(first * first + second * second, axis=1) / D + eps)
    # Rows outside are zero and must stay zero even with eps = 0.
    rstd = tl.where(inside, rstd, 0.0)[:, None]
    return first * rstd, second * rstd, rstd


@triton.jit
def _rotated(
    ptr, weight_a, weight_b, cos_ptr, sin_ptr, row, stride, cos_stride, sin_stride, inside, eps,
    D: tl.constexpr, HALF: tl.constexpr, ADJACENT: tl.constexpr, COMPACT: tl.constexpr,
):  # fmt: skip
    """`rope(norm(x))` in the dtype of x, rounded once; zero in rows outside."""
    n_a, n_b, _ = _normed(ptr, row, stride, inside, eps, D, HALF, ADJACENT)
    a, b = n_a * weight_a, n_b * weight_b
    if cos_ptr is not None:
        cos_a, cos_b = _table(cos_ptr, row, cos_stride, inside, D, HALF, ADJACENT, COMPACT)
        sin_a, sin_b = _table(sin_ptr, row, sin_stride, inside, D, HALF, ADJACENT, COMPACT)
        a, b = a * cos_a - b * sin_a, b * cos_b + a * sin_b
    return _narrowed(a, ptr.dtype.element_ty), _narrowed(b, ptr.dtype.element_ty)


@triton.jit
def _store_input_gradient(
    d_a, d_b, ptr, weight_ptr, cos_ptr, sin_ptr, dx_ptr, partial_ptr,
    row, stride, cos_stride, sin_stride, dx_stride, inside, eps,
    D: tl.constexpr, HALF: tl.constexpr, ADJACENT: tl.constexpr, COMPACT: tl.constexpr, WEIGHT: tl.constexpr,
):  # fmt: skip
    """Store the gradient of x and this tile's part of the weight's gradient.

    `d_a` and `d_b` are the gradient of `rope(norm(x))`.
    """
    # These loads are the last of x and of the tables, hence `evict_first`. The compiler merges
    # loads of one policy: it would hold x and the tables in registers from the first loads to here,
    # across the loop.
    g_a, g_b = d_a, d_b
    if cos_ptr is not None:
        cos_a, cos_b = _table(cos_ptr, row, cos_stride, inside, D, HALF, ADJACENT, COMPACT, "evict_first")
        sin_a, sin_b = _table(sin_ptr, row, sin_stride, inside, D, HALF, ADJACENT, COMPACT, "evict_first")
        g_a, g_b = d_a * cos_a + d_b * sin_b, d_b * cos_b - d_a * sin_a
    m_a, m_b, rstd = _normed(ptr, row, stride, inside, eps, D, HALF, ADJACENT, "evict_first")
    if WEIGHT:
        only = tl.zeros((1,), dtype=tl.int32)
        dweight_a, dweight_b = tl.sum(g_a * m_a, axis=0)[None, :], tl.sum(g_b * m_b, axis=0)[None, :]
        _store_pair(partial_ptr, only, 0, dweight_a, dweight_b, only == 0, D, HALF, ADJACENT)
    weight_a, weight_b = _weight(weight_ptr, D, HALF, ADJACENT)
    g_a, g_b = g_a * weight_a, g_b * weight_b
    mean = (tl.sum(g_a * m_a + g_b * m_b, axis=1) / D)[:, None]
    _store_pair(dx_ptr, row, dx_stride, (g_a - m_a * mean) * rstd, (g_b - m_b * mean) * rstd, inside, D, HALF, ADJACENT)


@triton.jit
def _owned(S, H, BLOCK: tl.constexpr):
    """Batch element, head and first row of this program's block.

    The blocks of a head, which read the same keys, are neighbours.
    """
    program = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(S, BLOCK)
    head = program // blocks
    return head // H, head % H, (program % blocks).to(tl.int32) * BLOCK


@triton.jit
def _forward_kernel(
    q_ptr, k_ptr, v_ptr, q_weight_ptr, k_weight_ptr, cos_ptr, sin_ptr, out_ptr, lse_ptr,
    S, H, eps, scale,
    q_stride_b, q_stride_s, q_stride_h, k_stride_b, k_stride_s, k_stride_h, v_stride_b, v_stride_s, v_stride_h, cos_stride, sin_stride,
    D: tl.constexpr, HALF: tl.constexpr, ADJACENT: tl.constexpr, COMPACT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    b, h, first = _owned(S, H, BLOCK_M)
    q_ptr += b * q_stride_b + h * q_stride_h
    k_ptr += b * k_stride_b + h * k_stride_h
    v_ptr += b * v_stride_b + h * v_stride_h

    m = first + tl.arange(0, BLOCK_M)
    q_weight_a, q_weight_b = _weight(q_weight_ptr, D, HALF, ADJACENT)
    q_a, q_b = _rotated(
        q_ptr, q_weight_a, q_weight_b, cos_ptr, sin_ptr, m, q_stride_s, cos_stride, sin_stride, m < S, eps, D, HALF, ADJACENT, COMPACT
    )  # fmt: skip
    k_weight_a, k_weight_b = _weight(k_weight_ptr, D, HALF, ADJACENT)
    top = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK_M,), dtype=tl.float32)
    out = tl.zeros((BLOCK_M, 2 * HALF), dtype=tl.float32)

    for start in range(0, S, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        k_a, k_b = _rotated(
            k_ptr, k_weight_a, k_weight_b, cos_ptr, sin_ptr, n, k_stride_s, cos_stride, sin_stride, n < S, eps, D, HALF, ADJACENT, COMPACT
        )  # fmt: skip
        s = _products(q_a, q_b, k_a, k_b) * scale
        s = tl.where((n < S)[None, :], s, float("-inf"))
        higher = tl.maximum(top, tl.max(s, axis=1))
        p = tl.exp2(s - higher[:, None])
        shrink = tl.exp2(top - higher)
        total = total * shrink + tl.sum(p, axis=1)
        v = _rows(v_ptr, n, v_stride_s, n < S, D, HALF)
        out = _dot(_narrowed(p, v.dtype), v, out * shrink[:, None])
        top = higher

    _store_rows(out_ptr + (b * S * H + h) * D, m, H * D, out / total[:, None], m < S, D, HALF)
    tl.store(lse_ptr + (b * H + h) * S + m, top + tl.log2(total), mask=m < S)


@triton.jit
def _backward_q_kernel(
    grad_ptr, q_ptr, k_ptr, v_ptr, q_weight_ptr, k_weight_ptr, cos_ptr, sin_ptr, out_ptr, lse_ptr, delta_ptr, dq_ptr, partials_ptr,
    S, H, eps, scale, factor,
    grad_stride_b, grad_stride_s, grad_stride_h,
    q_stride_b, q_stride_s, q_stride_h, k_stride_b, k_stride_s, k_stride_h, v_stride_b, v_stride_s, v_stride_h, cos_stride, sin_stride,
    D: tl.constexpr, HALF: tl.constexpr, ADJACENT: tl.constexpr, COMPACT: tl.constexpr, WEIGHT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    b, h, first = _owned(S, H, BLOCK_M)
    grad_ptr += b * grad_stride_b + h * grad_stride_h
    q_ptr += b * q_stride_b + h * q_stride_h
    k_ptr += b * k_stride_b + h * k_stride_h
    v_ptr += b * v_stride_b + h * v_stride_h
    of_head = (b * S * H + h) * D
    partials_ptr += tl.program_id(0).to(tl.int64) * D

    m = first + tl.arange(0, BLOCK_M)
    grad = _rows(grad_ptr, m, grad_stride_s, m < S, D, HALF)
    out = _rows(out_ptr + of_head, m, H * D, m < S, D, HALF)
    delta = tl.sum(grad.to(tl.float32) * out.to(tl.float32), axis=1)
    tl.store(delta_ptr + (b * H + h) * S + m, delta, mask=m < S)
    lse = tl.load(lse_ptr + (b * H + h) * S + m, mask=m < S, other=0.0)

    q_weight_a, q_weight_b = _weight(q_weight_ptr, D, HALF, ADJACENT)
    q_a, q_b = _rotated(
        q_ptr, q_weight_a, q_weight_b, cos_ptr, sin_ptr, m, q_stride_s, cos_stride, sin_stride, m < S, eps, D, HALF, ADJACENT, COMPACT
    )  # fmt: skip
    k_weight_a, k_weight_b = _weight(k_weight_ptr, D, HALF, ADJACENT)
    dq_a = tl.zeros((BLOCK_M, HALF), dtype=tl.float32)
    dq_b = tl.zeros((BLOCK_M, HALF), dtype=tl.float32)

    for start in range(0, S, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        k_a, k_b = _rotated(
            k_ptr, k_weight_a, k_weight_b, cos_ptr, sin_ptr, n, k_stride_s, cos_stride, sin_stride, n < S, eps, D, HALF, ADJACENT, COMPACT
        )  # fmt: skip
        v = _rows(v_ptr, n, v_stride_s, n < S, D, HALF)
        s = _products(q_a, q_b, k_a, k_b) * scale
        # Keys outside have the score 0, which may be so far above the others that 2^x overflows.
        p = tl.exp2(tl.where((n < S)[None, :], s, float("-inf")) - lse[:, None])
        ds = _narrowed(p * (_dot(grad, tl.trans(v)) - delta[:, None]), k_a.dtype)
        dq_a = _dot(ds, k_a, dq_a)
        dq_b = _dot(ds, k_b, dq_b)

    _store_input_gradient(
        dq_a * factor, dq_b * factor, q_ptr, q_weight_ptr, cos_ptr, sin_ptr, dq_ptr + of_head, partials_ptr,
        m, q_stride_s, cos_stride, sin_stride, H * D, m < S, eps, D, HALF, ADJACENT, COMPACT, WEIGHT,
    )  # fmt: skip


@triton.jit
def _backward_kv_kernel(
    grad_ptr, q_ptr, k_ptr, v_ptr, q_weight_ptr, k_weight_ptr, cos_ptr, sin_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, partials_ptr,
    S, H, eps, scale, factor,
    grad_stride_b, grad_stride_s, grad_stride_h,
    q_stride_b, q_stride_s, q_stride_h, k_stride_b, k_stride_s, k_stride_h, v_stride_b, v_stride_s, v_stride_h, cos_stride, sin_stride,
    D: tl.constexpr, HALF: tl.constexpr, ADJACENT: tl.constexpr, COMPACT: tl.constexpr, WEIGHT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    b, h, first = _owned(S, H, BLOCK_N)
    grad_ptr += b * grad_stride_b + h * grad_stride_h
    q_ptr += b * q_stride_b + h * q_stride_h
    k_ptr += b * k_stride_b + h * k_stride_h
    v_ptr += b * v_stride_b + h * v_stride_h
    lse_ptr += (b * H + h) * S
    delta_ptr += (b * H + h) * S
    of_head = (b * S * H + h) * D
    partials_ptr += tl.program_id(0).to(tl.int64) * D

    n = first + tl.arange(0, BLOCK_N)
    k_weight_a, k_weight_b = _weight(k_weight_ptr, D, HALF, ADJACENT)
    k_a, k_b = _rotated(
        k_ptr, k_weight_a, k_weight_b, cos_ptr, sin_ptr, n, k_stride_s, cos_stride, sin_stride, n < S, eps, D, HALF, ADJACENT, COMPACT
    )  # fmt: skip
    v = _rows(v_ptr, n, v_stride_s, n < S, D, HALF)
    q_weight_a, q_weight_b = _weight(q_weight_ptr, D, HALF, ADJACENT)
    dk_a = tl.zeros((BLOCK_N, HALF), dtype=tl.float32)
    dk_b = tl.zeros((BLOCK_N, HALF), dtype=tl.float32)
    dv = tl.zeros((BLOCK_N, 2 * HALF), dtype=tl.float32)

    for start in range(0, S, BLOCK_M):
        m = start + tl.arange(0, BLOCK_M)
        q_a, q_b = _rotated(
            q_ptr, q_weight_a, q_weight_b, cos_ptr, sin_ptr, m, q_stride_s, cos_stride, sin_stride, m < S, eps, D, HALF, ADJACENT, COMPACT
        )  # fmt: skip
        grad = _rows(grad_ptr, m, grad_stride_s, m < S, D, HALF)
        # Queries outside have no gradient, so they add nothing.
        lse = tl.load(lse_ptr + m, mask=m < S, other=0.0)
        delta = tl.load(delta_ptr + m, mask=m < S, other=0.0)
        s = _products(k_a, k_b, q_a, q_b) * scale
        p = tl.exp2(tl.where((n < S)[:, None], s, float("-inf")) - lse[None, :])
        dv = _dot(_narrowed(p, grad.dtype), grad, dv)
        ds = _narrowed(p * (_dot(v, tl.trans(grad)) - delta[None, :]), q_a.dtype)
        dk_a = _dot(ds, q_a, dk_a)
        dk_b = _dot(ds, q_b, dk_b)

    _store_rows(dv_ptr + of_head, n, H * D, dv, n < S, D, HALF)
    _store_input_gradient(
        dk_a * factor, dk_b * factor, k_ptr, k_weight_ptr, cos_ptr, sin_ptr, dk_ptr + of_head, partials_ptr,
        n, k_stride_s, cos_stride, sin_stride, H * D, n < S, eps, D, HALF, ADJACENT, COMPACT, WEIGHT,
    )  # fmt: skip


class Blocks(NamedTuple):
    """Rows that a program owns, rows that it takes in each step of its loop, and how it is run."""

    owned: int
    step: int
    warps: int = 8
    stages: int = 1


@functools.cache
def _blocks(kernel: str, d: int, dtype: torch.dtype, device: torch.device) -> Blocks:
    """Sizes chosen by the registers, spills and shared memory of the compiled kernels (Triton 3.9,
    compute capability 8.0 to 12.0).

    Every step prepares its rows again, at a cost that does not depend on `owned`. `owned` is
    therefore as large as the registers of 8 warps allow. The registers hold the accumulators:
    `owned x d` in `forward` and `q`, and twice that in `kv`. `step` is the largest with which the
    loop spills nothing, or next to nothing. A second stage loads the rows and tables of the next
    step in advance, and takes as much shared memory again. Below 9.0, where products take their
    factors from registers and not from shared memory, `kv` has no shared memory left for a second
    stage.
    """
    if triton_interpreted():
        # Several blocks and steps of a short sequence, and not as many rows in one as in the other.
        return Blocks(16, 32)
    wide = _half(d) > 64
    if dtype == torch.float32:
        # Without tensor cores, which would round to TF32, both factors of every product are in
        # registers.
        return Blocks(16, 16) if wide else Blocks(32, 32)
    shared = SHARED_KIB.get(driver.active.get_current_target().arch, 99)
    if kernel == "forward":
        stages = 2 if shared >= 163 else 1
        return Blocks(64, 32, stages=stages) if wide else Blocks(128, 64, stages=stages)
    if wide:
        return Blocks(64, 32) if kernel == "q" else Blocks(32, 32)
    if shared >= 227:
        return Blocks(128, 64, stages=2)
    return Blocks(128, 64) if kernel == "q" else Blocks(128, 32)


def _half(d: int) -> int:
    """Width of a tile of half the channels; tensor cores multiply no fewer than 16."""
    return max(16, int(triton.next_power_of_2(d // 2)))


def _row_strides(cos: Tensor | None, sin: Tensor | None) -> tuple[int, int]:
    return (0, 0) if cos is None or sin is None else (cos.stride(0), sin.stride(0))


def _compact(cos: Tensor | None, d: int) -> bool:
    return cos is not None and cos.shape[1] != d


def rope_attention(
    q: Tensor, k: Tensor, v: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor | None, sin: Tensor | None,
    eps: float, adjacent: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    B, S, H, d = q.shape
    out, lse = q.new_empty(q.shape), q.new_empty((B, H, S), dtype=torch.float32)
    if q.numel() > 0:
        blocks = _blocks("forward", d, q.dtype, q.device)
        _forward_kernel[(B * H * triton.cdiv(S, blocks.owned),)](
            q, k, v, q_weight, k_weight, cos, sin, out, lse,
            S, H, eps, LOG2_E / math.sqrt(d),
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *_row_strides(cos, sin),
            D=d, HALF=_half(d), ADJACENT=adjacent, COMPACT=_compact(cos, d), BLOCK_M=blocks.owned, BLOCK_N=blocks.step,
            num_warps=blocks.warps, num_stages=blocks.stages,
        )  # fmt: skip
    return out, lse


def rope_attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor | None, sin: Tensor | None,
    out: Tensor, lse: Tensor, eps: float, adjacent: bool, weight_grads: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    B, S, H, d = q.shape
    dq, dk, dv = (q.new_empty(q.shape) for _ in range(3))
    dq_weight, dk_weight = (q_weight.new_empty((d,) if weight_grads else (0,)) for _ in range(2))
    if q.numel() == 0:
        return dq, dk, dv, dq_weight.zero_(), dk_weight.zero_()

    of_q, of_kv = (_blocks(kernel, d, q.dtype, q.device) for kernel in ("q", "kv"))
    q_partials, k_partials = (
        q.new_empty((B * H, triton.cdiv(S, blocks.owned), 1, d) if weight_grads else (0,), dtype=torch.float32)
        for blocks in (of_q, of_kv)
    )
    delta = torch.empty_like(lse)
    inputs = grad, q, k, v, q_weight, k_weight, cos, sin
    sizes = (
        S, H, eps, LOG2_E / math.sqrt(d), 1 / math.sqrt(d),
        *grad.stride()[:3], *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *_row_strides(cos, sin),
    )  # fmt: skip
    form = {"D": d, "HALF": _half(d), "ADJACENT": adjacent, "COMPACT": _compact(cos, d), "WEIGHT": weight_grads}
    _backward_q_kernel[(B * H * triton.cdiv(S, of_q.owned),)](
        *inputs, out, lse, delta, dq, q_partials, *sizes,
        **form, BLOCK_M=of_q.owned, BLOCK_N=of_q.step, num_warps=of_q.warps, num_stages=of_q.stages,
    )  # fmt: skip
    _backward_kv_kernel[(B * H * triton.cdiv(S, of_kv.owned),)](
        *inputs, lse, delta, dk, dv, k_partials, *sizes,
        **form, BLOCK_M=of_kv.step, BLOCK_N=of_kv.owned, num_warps=of_kv.warps, num_stages=of_kv.stages,
    )  # fmt: skip
    if weight_grads:
        for partials, dweight in ((q_partials, dq_weight), (k_partials, dk_weight)):
            # In two steps, over the blocks of a head and over the heads: one sum would have as many
            # terms as there are programs.
            of_heads = partials.new_empty((1, B * H, 1, d))
            sum_partials(partials, [of_heads])
            sum_partials(of_heads, [dweight])
    return dq, dk, dv, dq_weight, dk_weight


register("rope_attention", rope_attention, rope_attention_backward)
