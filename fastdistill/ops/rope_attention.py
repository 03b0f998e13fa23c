"""Attention on normalised and rotated queries and keys, as one operator or as two.

Shapes: B batch, S tokens, H heads, d head size.

Kernels: ops/triton/rope_attention.py
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdistill.ops import transforms
from fastdistill.ops.attention import attend, attention_names
from fastdistill.ops.backend import Backend, Request
from fastdistill.ops.heads import Pairing, check_heads, check_same_dtype, is_adjacent
from fastdistill.ops.op import (
    Arguments,
    Case,
    Operator,
    Tangents,
    Tensors,
    accumulator_of,
    check_floats,
    check_tensor,
    describe,
)
from fastdistill.ops.qk_norm_rope import QK_NORM_ROPE, HeadShapes, qk_norm_rope
from fastdistill.ops.rows import check_contiguous, contiguous_rows

# The kernels hold tiles of whole heads in registers and shared memory.
MAX_HEAD_SIZE = 256

# Scores that its tangent holds at once.
MAX_SCORES = 1 << 24


def rope_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    eps: float = 1e-6,
    *,
    pairing: Pairing = "adjacent",
    attention: str = "auto",
    backend: Request | None = None,
) -> Tensor:
    """`softmax(rope(n(q)) rope(n(k))^T / sqrt(d)) v` for every head, with the norm n and the
    rotation of `qk_norm_rope`.

    Attention as in arXiv 1706.03762, equation 1, over all tokens, without a mask. Differentiable in
    q, k, v, q_weight and k_weight, in reverse and in forward mode.

    There are two forms. One writes the rotated q and k (`qk_norm_rope`), then calls the best
    attention kernel for the device, and keeps q and k twice for the backward pass. The other,
    `attention="fused"`, is one flash attention kernel (arXiv 2307.08691) that prepares its own
    tiles of q and k. The fused form writes nothing of the size of q but the result, and keeps for
    the backward pass nothing but its arguments, the result and the log-sum-exp. The kernel prepares
    every key once for each block of queries, so the fused form is the one for memory and not, on
    long sequences, for speed.

    Args:
        q, k, v: (B, S, H, d) of one dtype, float32, bfloat16, float16 or (on CPU) float64. d must
            be contiguous, even and at most 512 (256 if fused). The other axes may have any stride,
            so chunks of one projection and transposed (B, H, S, d) tensors are read in place.
        q_weight, k_weight: (d), the dtype of q, or float32 for a bfloat16 or float16 q.
        cos, sin: (S, d), or (S, d / 2) with an entry for each pair. float32 (float64 for float64).
            Neither may require a gradient; either may have a tangent. None: no rotation.
        eps: added to the mean square.
        pairing: which channels are a pair, `adjacent` (2i and 2i + 1) or `half` (i and i + d / 2).
        attention: `fused`, or what runs attention after `qk_norm_rope`: `auto` or the name of a
            backend, as in `fastdistill.ops.attention.attend`.
        backend: backend of the fused operator, or of `qk_norm_rope`: `eager`, `native`, `triton` or
            `auto`; by default the one of `use_backend`, else `auto`. The fused operator has no
            native kernel.

    Returns:
        (B, S, H, d) of the dtype of q; contiguous if fused, else strided as the attention backend
        pleases.

    Statistics, softmax and sums are float32. The factors of the matrix products have the dtype of
    q: the rotated q and k, the probabilities and, in the backward pass, the gradients of the scores
    are each rounded once to it. Fused gradients, including the gradients of the weights, are summed
    in an order given by the shape and the device alone, so they are bitwise repeatable. The fused
    tangent takes a block of queries after the other: its memory does not grow with the square of
    the tokens, as that of `_native_math` does.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, device, shape or stride, or
            `attention` is no known name; the message says which.
        RuntimeError: `backend` or `attention` was named and cannot run here; the message says why.
    """
    if attention == "fused":
        return ROPE_ATTENTION(q, k, v, q_weight, k_weight, cos, sin, eps, is_adjacent(pairing), backend=backend)  # type: ignore[no-any-return]
    if attention != "auto" and attention not in attention_names():
        raise ValueError(f"attention: expected fused, auto or one of {', '.join(attention_names())}, got {attention!r}")
    for name, t in (("q", q), ("k", k), ("v", v)):
        check_tensor(name, t)
    check_floats("q", q)
    _check_k_and_v(q, k, v)
    q, k = qk_norm_rope(q, k, q_weight, k_weight, cos, sin, eps, pairing=pairing, backend=backend)
    return attend(q, k, v, attention)


class RopeAttention(Operator):
    name = "rope_attention"
    triton_module = "fastdistill.ops.triton.rope_attention"
    schema = (
        "(Tensor q, Tensor k, Tensor v, Tensor q_weight, Tensor k_weight, Tensor? cos, Tensor? sin, float eps, "
        "bool adjacent) -> (Tensor out, Tensor lse)"
    )
    backward_schema = (
        "(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor q_weight, Tensor k_weight, Tensor? cos, Tensor? sin, "
        "Tensor out, Tensor lse, float eps, bool adjacent, bool weight_grads) -> (Tensor dq, Tensor dk, Tensor dv, "
        "Tensor dq_weight, Tensor dk_weight)"
    )

    def check(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        q_weight: Tensor,
        k_weight: Tensor,
        cos: Tensor | None,
        sin: Tensor | None,
        eps: float,
        adjacent: bool,
    ) -> None:
        _check_k_and_v(q, k, v)
        if q.shape[-1] > MAX_HEAD_SIZE:
            raise ValueError(
                f"q: expected a head size of at most {MAX_HEAD_SIZE} for attention='fused', got {describe(q)}"
            )
        QK_NORM_ROPE.check(q, k, q_weight, k_weight, cos, sin, eps, adjacent)

    def reference(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        q_weight: Tensor,
        k_weight: Tensor,
        cos: Tensor | None,
        sin: Tensor | None,
        eps: float,
        adjacent: bool,
    ) -> Tensor:
        q, k = QK_NORM_ROPE.reference(q, k, q_weight, k_weight, cos, sin, eps, adjacent)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        if transforms.active():
            # PyTorch's kernels have no tangent and no second derivative.
            wide = accumulator_of(q.dtype)
            scores = q.to(wide) @ k.to(wide).mT * q.shape[-1] ** -0.5
            out: Tensor = (scores.softmax(dim=-1) @ v.to(wide)).to(q.dtype)
        else:
            out = F.scaled_dot_product_attention(q, k, v)
        return out.transpose(1, 2)

    def fake(self, q: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
        B, S, H, _ = q.shape
        return q.new_empty(q.shape), q.new_empty((B, H, S), dtype=accumulator_of(q.dtype))

    def fake_backward(
        self,
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        q_weight: Tensor,
        k_weight: Tensor,
        cos: Tensor | None,
        sin: Tensor | None,
        out: Tensor,
        lse: Tensor,
        eps: float,
        adjacent: bool,
        weight_grads: bool,
    ) -> tuple[Tensor, ...]:
        shape = q_weight.shape if weight_grads else (0,)
        return *(q.new_empty(q.shape) for _ in range(3)), q_weight.new_empty(shape), q_weight.new_empty(shape)

    def save(self, ctx: Any, arguments: tuple[Any, ...], results: tuple[Tensor, Tensor]) -> None:
        *tensors, ctx.eps, ctx.adjacent = arguments
        ctx.save_for_backward(*tensors, *results)

    def backward(self, ctx: Any, backward_op: Callable[..., Any], *grads: Tensor) -> tuple[Tensor | None, ...]:
        weight_grads = ctx.needs_input_grad[3] or ctx.needs_input_grad[4]
        dq, dk, dv, *dweights = backward_op(
            contiguous_rows(grads[0]), *ctx.saved_tensors, ctx.eps, ctx.adjacent, weight_grads
        )
        return dq, dk, dv, *(dweights if weight_grads else (None, None)), *(None,) * 4

    def jvp(self, backend: Backend, arguments: Arguments, results: Tensors, tangents: Tangents) -> Tensors:
        v, *rest = arguments[2:]
        dq, dk, dv, *drest = tangents
        q, k = rotated = QK_NORM_ROPE.forward_op(backend)(*arguments[:2], *rest)
        dqk = None
        if any(t is not None for t in (dq, dk, *drest)):
            dqk = QK_NORM_ROPE.jvp(backend, (*arguments[:2], *rest), rotated, (dq, dk, *drest))
        return (_attention_tangent(q, k, v, dqk, dv, accumulator_of(q.dtype)).to(q.dtype),)

    def bytes_moved(
        self, q: Tensor, k: Tensor, v: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor | None, *options: Any
    ) -> tuple[int, int]:
        tables, lse = 0 if cos is None else 2 * cos.nbytes, 4 * q.shape[:3].numel()
        return 4 * q.nbytes + tables + lse, 8 * q.nbytes + tables + lse

    def cases(self) -> Sequence[Case]:
        return tuple(Case(id=shapes.id, make=partial(_arguments, shapes)) for shapes in SHAPES)

    def workloads(self) -> Sequence[Case]:
        # On a CPU, one row at the length of a 1024 x 1024 image takes minutes.
        lengths = (1152, 4608) if torch.cuda.is_available() else (1152,)
        return tuple(
            Case(id=f"B1-S{S}-H24-d128", make=partial(_arguments, HeadShapes(id="", q=(1, S, 24, 128))))
            for S in lengths
        )


def _attention_tangent(
    q: Tensor, k: Tensor, v: Tensor, dqk: tuple[Tensor, ...] | None, dv: Tensor | None, wide: torch.dtype
) -> Tensor:
    """Tangent of attention, `P dv + dP v` with `dP = P * (dS - rowsum(P * dS))`.

    A block of queries after the other, as scores of all would take memory with the square of the
    tokens.
    """
    q, k, v = (t.transpose(1, 2).to(wide) for t in (q, k, v))
    dq, dk = (None, None) if dqk is None else (t.transpose(1, 2).to(wide) for t in dqk)
    dv = None if dv is None else dv.transpose(1, 2).to(wide)
    scale = q.shape[-1] ** -0.5
    tangent = torch.zeros_like(q)
    for rows in _blocks_of_queries(*q.shape[:3]):
        p = torch.softmax(q[:, :, rows] @ k.mT * scale, dim=-1)
        if dq is not None and dk is not None:
            dscores = (dq[:, :, rows] @ k.mT + q[:, :, rows] @ dk.mT) * scale
            dscores -= (p * dscores).sum(dim=-1, keepdim=True)
            tangent[:, :, rows] = (p * dscores) @ v
        if dv is not None:
            tangent[:, :, rows] += p @ dv
    return tangent.transpose(1, 2)


def _blocks_of_queries(B: int, H: int, S: int) -> Iterator[slice]:
    rows = max(1, MAX_SCORES // max(1, B * H * S))
    return (slice(start, start + rows) for start in range(0, S, rows))


def _check_k_and_v(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise where q, k and v differ: attention would accept that and compute something else."""
    check_heads("q", q)
    for name, t in (("k", k), ("v", v)):
        if t.shape != q.shape or t.device != q.device:
            raise ValueError(
                f"{name}: expected the shape and device of q, {tuple(q.shape)} on {q.device}, got {describe(t)}"
            )
    check_same_dtype("v", v, "q", q)
    check_contiguous("v", v)


SHAPES = (
    HeadShapes(id="B2-S5-H2-d8", q=(2, 5, 2, 8)),
    HeadShapes(id="B1-S37-H2-d24-packed", q=(1, 37, 2, 24), layout="packed"),
    HeadShapes(
        id="B1-S33-H1-d64-half-compact-transposed",
        q=(1, 33, 1, 64),
        adjacent=False,
        tables="compact",
        layout="transposed",
    ),
    HeadShapes(id="B2-S18-H1-d50-half-packed", q=(2, 18, 1, 50), adjacent=False, layout="packed", wide=True),
    HeadShapes(id="B1-S18-H1-d128-compact", q=(1, 18, 1, 128), tables="compact"),
    HeadShapes(id="B1-S5-H1-d256-transposed", q=(1, 5, 1, 256), layout="transposed"),
    HeadShapes(id="B1-S3-H2-d16-none", q=(1, 3, 2, 16), tables="none"),
    HeadShapes(id="B2-S1-H2-d2", q=(2, 1, 2, 2)),
    HeadShapes(id="B1-S0-H2-d8", q=(1, 0, 2, 8)),
    HeadShapes(id="B0-S3-H2-d8", q=(0, 3, 2, 8)),
)


def _arguments(shapes: HeadShapes, dtype: torch.dtype, device: torch.device) -> tuple[Any, ...]:
    B, S, H, d = shapes.q
    if shapes.layout == "packed":
        heads = torch.randn(B, S, 3, H, d, device=device).to(dtype).unbind(2)
    elif shapes.layout == "transposed":
        heads = tuple(torch.randn(B, H, S, d, device=device).to(dtype).transpose(1, 2) for _ in range(3))
    else:
        heads = tuple(torch.randn(B, S, H, d, device=device).to(dtype) for _ in range(3))
    kept = torch.float32 if shapes.wide and dtype != torch.float64 else dtype
    weights = [(1 + 0.3 * torch.randn(d, device=device)).to(kept).requires_grad_() for _ in range(2)]
    # Not the cosine and sine of one angle, so that every entry of a table counts. As large as
    # cosines, so that the scores are as large as in a model.
    width = {"full": d, "compact": d // 2, "none": 0}[shapes.tables]
    tables = [
        torch.randn(S, width, device=device).mul(0.5**0.5).to(accumulator_of(dtype)) if width else None
        for _ in range(2)
    ]
    return *(t.detach().requires_grad_() for t in heads), *weights, *tables, 1e-6, shapes.adjacent


ROPE_ATTENTION = RopeAttention()
