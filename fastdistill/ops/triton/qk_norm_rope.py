"""Triton kernels of `qk_norm_rope` and `joint_qk_norm_rope`.

Formulas, shapes and dtypes: fastdistill/ops/qk_norm_rope.py and joint_qk_norm_rope.py. Queries and
keys of every stream are launches of the same kernels.

Forward: one program per token, for all heads of the token. Backward: one program per chunk of the
tokens of all batch elements, which sums the weight's gradient over the chunk and writes the sum
once; a second kernel adds the chunks in order. The two channels of a pair are held apart, so one
code serves both pairings.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdistill.ops.heads import unpacked
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
    x_stride_b, x_stride_s, x_stride_h, out_stride_b, out_stride_s, out_stride_h, cos_stride, sin_stride,
    ADJACENT: tl.constexpr, COMPACT: tl.constexpr, ROTATED: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    b, s = row // S, row % S
    head, pair = tl.arange(0, BLOCK_H)[:, None], tl.arange(0, BLOCK)[None, :]
    inside = (head < H) & (pair < half)

    weight_a, weight_b = _pair(weight_ptr, pair, half, pair < half, ADJACENT)
    x_a, x_b = _pair(x_ptr + b * x_stride_b + s * x_stride_s + head * x_stride_h, pair, half, inside, ADJACENT)

    rstd = 1.0 / tl.sqrt(tl.sum(x_a * x_a + x_b * x_b, axis=1) / (2 * half) + eps)[:, None]
    out_a, out_b = x_a * rstd * weight_a, x_b * rstd * weight_b
    if ROTATED:
        cos_a, cos_b = _table(cos_ptr + s * cos_stride, pair, half, ADJACENT, COMPACT)
        sin_a, sin_b = _table(sin_ptr + s * sin_stride, pair, half, ADJACENT, COMPACT)
        out_a, out_b = out_a * cos_a - out_b * sin_a, out_b * cos_b + out_a * sin_b
    out = out_ptr + b * out_stride_b + s * out_stride_s + head * out_stride_h
    _store_pair(out, out_a, out_b, pair, half, inside, ADJACENT)


@triton.jit
def _backward_kernel(
    grad_ptr, x_ptr, weight_ptr, cos_ptr, sin_ptr, dx_ptr, partials_ptr,
    rows, S, H, half, P, eps,
    grad_stride_b, grad_stride_s, grad_stride_h, x_stride_b, x_stride_s, x_stride_h, dx_stride_b, dx_stride_s, dx_stride_h,
    cos_stride, sin_stride,
    ADJACENT: tl.constexpr, COMPACT: tl.constexpr, ROTATED: tl.constexpr, WEIGHT: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    p = tl.program_id(0).to(tl.int64)
    head, pair = tl.arange(0, BLOCK_H)[:, None], tl.arange(0, BLOCK)[None, :]
    inside = (head < H) & (pair < half)
    weight_a, weight_b = _pair(weight_ptr, pair, half, pair < half, ADJACENT)
    dweight_a = tl.zeros((BLOCK_H, BLOCK), dtype=tl.float32)
    dweight_b = tl.zeros((BLOCK_H, BLOCK), dtype=tl.float32)

    for row in range(p * rows // P, (p + 1) * rows // P):
        b, s = row // S, row % S
        x_a, x_b = _pair(x_ptr + b * x_stride_b + s * x_stride_s + head * x_stride_h, pair, half, inside, ADJACENT)
        grad = grad_ptr + b * grad_stride_b + s * grad_stride_s + head * grad_stride_h
        g_a, g_b = _pair(grad, pair, half, inside, ADJACENT)
        if ROTATED:
            cos_a, cos_b = _table(cos_ptr + s * cos_stride, pair, half, ADJACENT, COMPACT)
            sin_a, sin_b = _table(sin_ptr + s * sin_stride, pair, half, ADJACENT, COMPACT)
            g_a, g_b = g_a * cos_a + g_b * sin_b, g_b * cos_b - g_a * sin_a

        rstd = 1.0 / tl.sqrt(tl.sum(x_a * x_a + x_b * x_b, axis=1) / (2 * half) + eps)[:, None]
        m_a, m_b = x_a * rstd, x_b * rstd
        dweight_a += g_a * m_a
        dweight_b += g_b * m_b
        g_a, g_b = g_a * weight_a, g_b * weight_b
        mean = (tl.sum(g_a * m_a + g_b * m_b, axis=1) / (2 * half))[:, None]
        dx = dx_ptr + b * dx_stride_b + s * dx_stride_s + head * dx_stride_h
        _store_pair(dx, (g_a - m_a * mean) * rstd, (g_b - m_b * mean) * rstd, pair, half, inside, ADJACENT)

    if WEIGHT:
        _store_pair(
            partials_ptr + p * 2 * half, tl.sum(dweight_a, axis=0)[None, :], tl.sum(dweight_b, axis=0)[None, :],
            pair, half, pair < half, ADJACENT,
        )  # fmt: skip


def qk_norm_rope(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    eps: float,
    adjacent: bool,
) -> tuple[Tensor, Tensor]:
    out_q, out_k = q.new_empty(q.shape), k.new_empty(k.shape)
    _forward(q, q_weight, cos, sin, eps, adjacent, out_q)
    _forward(k, k_weight, cos, sin, eps, adjacent, out_k)
    return out_q, out_k


def qk_norm_rope_backward(
    grad_q: Tensor, grad_k: Tensor, q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor | None, sin: Tensor | None,
    eps: float, adjacent: bool, weight_grads: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dq, dk = q.new_empty(q.shape), k.new_empty(k.shape)
    dq_weight = _backward(grad_q, q, q_weight, cos, sin, eps, adjacent, weight_grads, dq)
    dk_weight = _backward(grad_k, k, k_weight, cos, sin, eps, adjacent, weight_grads, dk)
    return dq, dk, dq_weight, dk_weight


def joint_qk_norm_rope(
    text_q: Tensor, text_k: Tensor | None, text_v: Tensor | None, image_q: Tensor, image_k: Tensor | None, image_v: Tensor | None,
    text_q_weight: Tensor, text_k_weight: Tensor, image_q_weight: Tensor, image_k_weight: Tensor,
    cos: Tensor | None, sin: Tensor | None, eps: float, adjacent: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    text, image = unpacked(text_q, text_k, text_v), unpacked(image_q, image_k, image_v)
    T = text_q.shape[1]
    outs = [x.new_empty((x.shape[0], T + x.shape[1], *x.shape[2:])) for x in image]
    for stream, weights, place in (
        (text, (text_q_weight, text_k_weight), slice(0, T)),
        (image, (image_q_weight, image_k_weight), slice(T, None)),
    ):
        tables = _rows(cos, place), _rows(sin, place)
        for x, weight, out in zip(stream, weights, outs, strict=False):
            _forward(x, weight, *tables, eps, adjacent, out[:, place])
        outs[2][:, place] = stream[2]
    return tuple(outs)  # type: ignore[return-value]


def joint_qk_norm_rope_backward(
    grad_q: Tensor, grad_k: Tensor, grad_v: Tensor, text_q: Tensor, text_k: Tensor | None, image_q: Tensor, image_k: Tensor | None,
    text_q_weight: Tensor, text_k_weight: Tensor, image_q_weight: Tensor, image_k_weight: Tensor,
    cos: Tensor | None, sin: Tensor | None, eps: float, adjacent: bool, weight_grads: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    T = text_q.shape[1]
    gradients: list[Tensor] = []
    dweights: list[Tensor] = []
    for q, k, weights, place in (
        (text_q, text_k, (text_q_weight, text_k_weight), slice(0, T)),
        (image_q, image_k, (image_q_weight, image_k_weight), slice(T, None)),
    ):
        tables = _rows(cos, place), _rows(sin, place)
        if k is None:
            packed = q.new_empty(q.shape)
            targets, inputs = packed.unbind(2), q.unbind(2)
            gradients += [packed, q.new_empty((0,)), q.new_empty((0,))]
        else:
            targets = (q.new_empty(q.shape), k.new_empty(k.shape), grad_v.new_empty((*q.shape[:2], *grad_v.shape[2:])))
            inputs = (q, k)
            gradients += targets
        for x, weight, grad, dx in zip(inputs, weights, (grad_q, grad_k), targets, strict=False):
            dweights.append(_backward(grad[:, place], x, weight, *tables, eps, adjacent, weight_grads, dx))
        targets[2].copy_(grad_v[:, place])
    return *gradients, *dweights


def _rows(table: Tensor | None, place: slice) -> Tensor | None:
    return None if table is None else table[place]


def _forward(
    x: Tensor, weight: Tensor, cos: Tensor | None, sin: Tensor | None, eps: float, adjacent: bool, out: Tensor
) -> None:
    B, S, H, d = x.shape
    if x.numel() == 0:
        return
    block_h, block, warps = _blocks(H, d)
    _forward_kernel[(B * S,)](
        x, weight, *_tables(x, cos, sin), out,
        S, H, d // 2, eps,
        *x.stride()[:3], *out.stride()[:3], *_table_strides(cos, sin),
        ADJACENT=adjacent, COMPACT=cos is not None and cos.shape[1] != d, ROTATED=cos is not None,
        BLOCK_H=block_h, BLOCK=block, num_warps=warps,
    )  # fmt: skip


def _backward(
    grad: Tensor, x: Tensor, weight: Tensor, cos: Tensor | None, sin: Tensor | None, eps: float, adjacent: bool, weight_grads: bool,
    dx: Tensor,
) -> Tensor:  # fmt: skip
    B, S, H, d = x.shape
    dweight = weight.new_empty((d,) if weight_grads else (0,))
    if x.numel() == 0:
        return dweight.zero_()
    P = token_chunks(1, B * S, x.device)
    partials = x.new_empty((1, P, 1, d) if weight_grads else (0,), dtype=torch.float32)
    block_h, block, warps = _blocks(H, d)
    _backward_kernel[(P,)](
        grad, x, weight, *_tables(x, cos, sin), dx, partials,
        B * S, S, H, d // 2, P, eps,
        *grad.stride()[:3], *x.stride()[:3], *dx.stride()[:3], *_table_strides(cos, sin),
        ADJACENT=adjacent, COMPACT=cos is not None and cos.shape[1] != d, ROTATED=cos is not None, WEIGHT=weight_grads,
        BLOCK_H=block_h, BLOCK=block, num_warps=warps,
    )  # fmt: skip
    if weight_grads:
        sum_partials(partials, [dweight])
    return dweight


def _tables(x: Tensor, cos: Tensor | None, sin: Tensor | None) -> tuple[Tensor, Tensor]:
    # Without a rotation the kernel does not read these pointers.
    return (x, x) if cos is None or sin is None else (cos, sin)


def _table_strides(cos: Tensor | None, sin: Tensor | None) -> tuple[int, int]:
    return (0, 0) if cos is None or sin is None else (cos.stride(0), sin.stride(0))


def _blocks(H: int, d: int) -> tuple[int, int, int]:
    """Heads and pairs of a tile, and the warps for it."""
    block_h, block = triton.next_power_of_2(H), triton.next_power_of_2(d // 2)
    return block_h, block, min(16, max(1, block_h * block // 512))


register("qk_norm_rope", qk_norm_rope, qk_norm_rope_backward)
register("joint_qk_norm_rope", joint_qk_norm_rope, joint_qk_norm_rope_backward)
