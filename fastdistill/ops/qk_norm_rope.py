"""Queries and keys for attention: RMS norm and rotary position embedding of every head.

Shapes: B batch, S tokens, H heads, d head size.

Kernels: csrc/cpu/norm_rope.cpp, csrc/cuda/norm_rope.cu, ops/triton/qk_norm_rope.py
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from fastdistill.ops.backend import Backend, Request
from fastdistill.ops.heads import (
    Pairing,
    check_heads,
    check_same_dtype,
    check_tables,
    check_weight,
    is_adjacent,
    normed,
    rotated,
)
from fastdistill.ops.op import Arguments, Case, Operator, Tangents, Tensors, accumulator_of, describe
from fastdistill.ops.rows import check_contiguous, contiguous_rows

# By dtype of the statistics. Dwarfs the mean square of any head, and its root is a power of two: the
# norm with it, multiplied by the root, changes nothing.
LARGE_EPS = {torch.float32: 2.0**100, torch.float64: 2.0**400}


def qk_norm_rope(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    eps: float = 1e-6,
    *,
    pairing: Pairing = "adjacent",
    backend: Request | None = None,
) -> tuple[Tensor, Tensor]:
    """`rope(n * weight)` with `n = x / sqrt(mean(x^2) + eps)` over each head, for q and for k, in
    one pass each way.

    The norm is RMSNorm (arXiv 1910.07467, equation 4) as in the query-key norm of SD3 (arXiv
    2403.03206, section 5.3.2) and FLUX. The rotation is RoPE (arXiv 2104.09864, equation 34): a
    pair (a, b) of channels becomes `(a cos - b sin, b cos + a sin)`. Differentiable in q, k,
    q_weight and k_weight, in reverse and in forward mode.

    Args:
        q, k: (B, S, H, d) of one dtype, float32, bfloat16, float16 or (on CPU) float64; k may have
            fewer heads. d must be contiguous, even and at most 512. The other axes may have any
            stride, so chunks of one projection and transposed (B, H, S, d) tensors are read in
            place.
        q_weight, k_weight: (d), the dtype of q, or float32 for a bfloat16 or float16 q.
        cos, sin: (S, d), the table of diffusers, with an entry for either channel of a pair; or (S,
            d / 2), with an entry for each pair. float32 (float64 for float64). Neither may require
            a gradient; either may have a tangent. None: norms without a rotation.
        eps: added to the mean square.
        pairing: which channels are a pair: `adjacent`, 2i and 2i + 1 (FLUX, SD3, Wan: diffusers'
            `use_real_unbind_dim=-1`), or `half`, i and i + d / 2 (NeoX, Lumina, CogVideoX:
            `use_real_unbind_dim=-2`).
        backend: `eager`, `native`, `triton` or `auto`; by default the one of `use_backend`, else
            `auto`.

    Returns:
        q and k, contiguous (eager: strided as torch pleases), of unchanged shapes and dtype.

    Nothing is rounded between the norm and the rotation. diffusers rounds there, so in 16 bits this
    result differs from diffusers' by about one unit in the last place, towards the exact result.
    Only q and k are kept for the backward pass. The gradients of the weights are summed in an order
    given by the shape alone, so they are bitwise repeatable.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, device, shape or stride; the
            message says which.
        RuntimeError: `backend` was named and cannot run here; the message says why.
    """
    return QK_NORM_ROPE(q, k, q_weight, k_weight, cos, sin, eps, is_adjacent(pairing), backend=backend)  # type: ignore[no-any-return]


class QkNormRope(Operator):
    name = "qk_norm_rope"
    triton_module = "fastdistill.ops.triton.qk_norm_rope"
    schema = (
        "(Tensor q, Tensor k, Tensor q_weight, Tensor k_weight, Tensor? cos, Tensor? sin, float eps, "
        "bool adjacent) -> (Tensor q, Tensor k)"
    )
    backward_schema = (
        "(Tensor grad_q, Tensor grad_k, Tensor q, Tensor k, Tensor q_weight, Tensor k_weight, Tensor? cos, "
        "Tensor? sin, float eps, bool adjacent, bool weight_grads) -> (Tensor dq, Tensor dk, Tensor dq_weight, "
        "Tensor dk_weight)"
    )
    visible_results = 2

    def check(
        self,
        q: Tensor,
        k: Tensor,
        q_weight: Tensor,
        k_weight: Tensor,
        cos: Tensor | None,
        sin: Tensor | None,
        eps: float,
        adjacent: bool,
    ) -> None:
        check_heads("q", q)
        B, S, _, d = q.shape
        if k.dim() != 4 or (k.shape[0], k.shape[1], k.shape[3]) != (B, S, d) or k.device != q.device:
            raise ValueError(f"k: expected ({B}, {S}, H, {d}) on {q.device} as q, got {describe(k)}")
        check_same_dtype("k", k, "q", q)
        check_contiguous("k", k)
        check_weight("q_weight", q_weight, q)
        check_weight("k_weight", k_weight, q)
        check_same_dtype("k_weight", k_weight, "q_weight", q_weight)
        check_tables(cos, sin, S, q)

    def reference(
        self,
        q: Tensor,
        k: Tensor,
        q_weight: Tensor,
        k_weight: Tensor,
        cos: Tensor | None,
        sin: Tensor | None,
        eps: float,
        adjacent: bool,
    ) -> tuple[Tensor, Tensor]:
        return tuple(
            rotated(normed(x, weight, eps), cos, sin, adjacent).to(x.dtype)
            for x, weight in ((q, q_weight), (k, k_weight))
        )  # type: ignore[return-value]

    def fake(self, q: Tensor, k: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
        return q.new_empty(q.shape), k.new_empty(k.shape)

    def fake_backward(
        self,
        grad_q: Tensor,
        grad_k: Tensor,
        q: Tensor,
        k: Tensor,
        q_weight: Tensor,
        k_weight: Tensor,
        cos: Tensor | None,
        sin: Tensor | None,
        eps: float,
        adjacent: bool,
        weight_grads: bool,
    ) -> tuple[Tensor, ...]:
        shape = q_weight.shape if weight_grads else (0,)
        return q.new_empty(q.shape), k.new_empty(k.shape), q_weight.new_empty(shape), q_weight.new_empty(shape)

    def save(self, ctx: Any, arguments: tuple[Any, ...], results: tuple[Tensor, Tensor]) -> None:
        *tensors, ctx.eps, ctx.adjacent = arguments
        ctx.save_for_backward(*tensors)

    def backward(self, ctx: Any, backward_op: Callable[..., Any], *grads: Tensor) -> tuple[Tensor | None, ...]:
        weight_grads = ctx.needs_input_grad[2] or ctx.needs_input_grad[3]
        grad_q, grad_k = (contiguous_rows(grad) for grad in grads)
        dq, dk, *dweights = backward_op(grad_q, grad_k, *ctx.saved_tensors, ctx.eps, ctx.adjacent, weight_grads)
        return dq, dk, *(dweights if weight_grads else (None, None)), *(None,) * 4

    def jvp(self, backend: Backend, arguments: Arguments, results: Tensors, tangents: Tangents) -> Tensors:
        q, k, q_weight, k_weight, cos, sin, eps, adjacent = arguments
        dq, dk, dq_weight, dk_weight, dcos, dsin, *_ = tangents
        forward_op = self.forward_op(backend)
        terms = []
        if dq is not None or dk is not None:
            # The Jacobian of the norm is symmetric: the backward op without weights and rotation is
            # also its product with a tangent.
            dq, dk = (torch.zeros_like(x) if d is None else contiguous_rows(d) for x, d in ((q, dq), (k, dk)))
            ones = torch.ones_like(q_weight)
            dq, dk, *_ = self.backward_op(backend)(dq, dk, q, k, ones, ones, None, None, eps, adjacent, False)
            wide = accumulator_of(q.dtype)
            large = LARGE_EPS[wide]
            scaled = (weight.to(wide) * large**0.5 for weight in (q_weight, k_weight))
            terms.append(forward_op(dq, dk, *scaled, cos, sin, large, adjacent))
        # The result is linear in the weights and in the tables.
        if dq_weight is not None or dk_weight is not None:
            dweights = _zeros_for_none((dq_weight, dk_weight), like=q_weight)
            terms.append(forward_op(q, k, *dweights, cos, sin, eps, adjacent))
        if dcos is not None or dsin is not None:
            dtables = _zeros_for_none((dcos, dsin), like=cos)
            terms.append(forward_op(q, k, q_weight, k_weight, *dtables, eps, adjacent))
        return tuple(functools.reduce(torch.add, of_one) for of_one in zip(*terms, strict=True))

    def bytes_moved(
        self, q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor | None, *options: Any
    ) -> tuple[int, int]:
        heads, tables = q.nbytes + k.nbytes, 0 if cos is None else 2 * cos.nbytes
        return 2 * heads + tables, 3 * heads + tables

    def cases(self) -> Sequence[Case]:
        return tuple(Case(id=shapes.id, make=partial(_arguments, shapes)) for shapes in SHAPES)

    def workloads(self) -> Sequence[Case]:
        return tuple(
            Case(id=f"B1-S{S}-H24-d128", make=partial(_arguments, HeadShapes(id="", q=(1, S, 24, 128))))
            for S in (1152, 4608)
        )


def _zeros_for_none(tangents: Sequence[Tensor | None], *, like: Tensor) -> list[Tensor]:
    return [torch.zeros_like(like) if t is None else t.contiguous() for t in tangents]


@dataclass(frozen=True, kw_only=True)
class HeadShapes:
    """Shapes and layouts of the arguments of one case."""

    id: str
    q: tuple[int, int, int, int]
    k_heads: int | None = None
    adjacent: bool = True
    tables: Literal["full", "compact", "none"] = "full"
    """`compact`: one entry for each pair; `none`: no rotation."""
    layout: Literal["contiguous", "packed", "transposed"] = "contiguous"
    """`packed`: chunks of one projection; `transposed`: (B, H, S, d) in memory."""
    wide: bool = False
    """Weights in float32 for a narrower q."""


SHAPES = (
    HeadShapes(id="B2-S5-H3-d8", q=(2, 5, 3, 8)),
    HeadShapes(id="B2-S5-H3-d8-half", q=(2, 5, 3, 8), adjacent=False),
    HeadShapes(id="B1-S7-H2-d64-compact", q=(1, 7, 2, 64), tables="compact"),
    HeadShapes(id="B1-S7-H2-d64-half-compact", q=(1, 7, 2, 64), adjacent=False, tables="compact"),
    HeadShapes(id="B2-S19-H5-d128-packed", q=(2, 19, 5, 128), layout="packed"),
    HeadShapes(id="B1-S4-H4-k2-d96-half-transposed", q=(1, 4, 4, 96), k_heads=2, adjacent=False, layout="transposed"),
    HeadShapes(id="B3-S3-H1-d6-packed", q=(3, 3, 1, 6), layout="packed", wide=True),
    HeadShapes(id="B1-S2-H2-d50-half", q=(1, 2, 2, 50), adjacent=False, wide=True),
    HeadShapes(id="B1-S2-H1-d2", q=(1, 2, 1, 2)),
    HeadShapes(id="B1-S3-H2-d16-none", q=(1, 3, 2, 16), tables="none"),
    HeadShapes(id="B1-S2-H2-d512", q=(1, 2, 2, 512)),
    HeadShapes(id="B1-S1-H3-d320-half-compact", q=(1, 1, 3, 320), adjacent=False, tables="compact"),
    HeadShapes(id="B1-S0-H2-d8", q=(1, 0, 2, 8)),
    HeadShapes(id="B0-S3-H2-d8", q=(0, 3, 2, 8)),
)


def _arguments(shapes: HeadShapes, dtype: torch.dtype, device: torch.device) -> tuple[Any, ...]:
    B, S, H, d = shapes.q

    def draw(heads: int) -> Tensor:
        if shapes.layout == "packed":
            return torch.randn(B, S, 3, heads, d, device=device).to(dtype)[:, :, 1]
        if shapes.layout == "transposed":
            return torch.randn(B, heads, S, d, device=device).to(dtype).transpose(1, 2)
        return torch.randn(B, S, heads, d, device=device).to(dtype)

    kept = torch.float32 if shapes.wide and dtype != torch.float64 else dtype
    weights = [(1 + 0.3 * torch.randn(d, device=device)).to(kept).requires_grad_() for _ in range(2)]
    # Not the cosine and sine of one angle, so that every entry of a table counts.
    width = {"full": d, "compact": d // 2, "none": 0}[shapes.tables]
    tables = [torch.randn(S, width, device=device).to(accumulator_of(dtype)) if width else None for _ in range(2)]
    q, k = draw(H), draw(shapes.k_heads or H)
    return q.requires_grad_(), k.requires_grad_(), *weights, *tables, 1e-6, shapes.adjacent


QK_NORM_ROPE = QkNormRope()
