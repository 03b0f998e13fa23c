"""Queries, keys and values of two streams for joint attention: norms, rotation, no concatenation.

Shapes: B batch, T text tokens, I image tokens, H heads, d head size.

Kernels: csrc/cpu/norm_rope.cpp, csrc/cuda/norm_rope.cu, ops/triton/qk_norm_rope.py
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from fastdistill.ops.backend import Backend, Request
from fastdistill.ops.heads import (
    Pairing,
    check_head_size,
    check_heads,
    check_same_dtype,
    check_tables,
    check_weight,
    is_adjacent,
    normed,
    rotated,
    unpacked,
)
from fastdistill.ops.op import (
    Arguments,
    Case,
    Operator,
    Tangents,
    Tensors,
    accumulator_of,
    check_tensor,
    describe,
    kind_of,
)
from fastdistill.ops.qk_norm_rope import QK_NORM_ROPE
from fastdistill.ops.rows import contiguous_rows

HeadStream = Tensor | tuple[Tensor, Tensor, Tensor]


def joint_qk_norm_rope(
    text: HeadStream,
    image: HeadStream,
    text_weights: tuple[Tensor, Tensor],
    image_weights: tuple[Tensor, Tensor],
    cos: Tensor | None,
    sin: Tensor | None,
    eps: float = 1e-6,
    *,
    pairing: Pairing = "adjacent",
    backend: Request | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`qk_norm_rope` of a text and an image stream, each with its own weights, written into joint
    q, k and v, text first.

    Between their projections and attention, the double blocks of FLUX and SD3 (MMDiT, arXiv
    2403.03206, figure 2) compute four norms, three concatenations and two rotations, which are one
    pass each way here. The backward pass packs the gradients of a stream that came packed.
    Differentiable in both streams and all weights, in reverse and in forward mode.

    Args:
        text, image: (q, k, v), each (B, T or I, H, d), or one packed (B, T or I, 3, H, d) as a
            fused projection gives it. All of one dtype, float32, bfloat16, float16 or (on CPU)
            float64; k and v may have fewer heads. d must be contiguous, even and at most 512; the
            other axes may have any stride. The names only give the order: a model that puts its
            image first passes it first.
        text_weights, image_weights: the weights of (q, k), each (d), all in the dtype of the
            streams, or all float32 for 16-bit streams.
        cos, sin: (T + I, d) or (T + I, d / 2), as in `qk_norm_rope`; None where the heads hold no
            positions (SD3).
        eps: added to the mean square.
        pairing: as in `qk_norm_rope`.
        backend: `eager`, `native`, `triton` or `auto`; by default the one of `use_backend`, else
            `auto`.

    Returns:
        q, k and v, contiguous (B, T + I, H, d).

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, device, shape or stride; the
            message says which.
        RuntimeError: `backend` was named and cannot run here; the message says why.
    """
    return JOINT_QK_NORM_ROPE(  # type: ignore[no-any-return]
        *_three("text", text),
        *_three("image", image),
        *_two("text_weights", text_weights),
        *_two("image_weights", image_weights),
        cos,
        sin,
        eps,
        is_adjacent(pairing),
        backend=backend,
    )


def _three(name: str, stream: HeadStream) -> tuple[Tensor, Tensor | None, Tensor | None]:
    if isinstance(stream, Tensor):
        return stream, None, None
    if not isinstance(stream, (tuple, list)):
        raise TypeError(f"{name}: expected (q, k, v) or one packed tensor, got {kind_of(stream)}")
    if len(stream) != 3:
        raise ValueError(f"{name}: expected (q, k, v) or one packed tensor, got {len(stream)} tensors")
    return stream


def _two(name: str, weights: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    if not isinstance(weights, (tuple, list)) or len(weights) != 2:
        raise TypeError(f"{name}: expected the weights of (q, k), got {kind_of(weights)}")
    return weights


class JointQkNormRope(Operator):
    name = "joint_qk_norm_rope"
    triton_module = "fastdistill.ops.triton.qk_norm_rope"
    schema = (
        "(Tensor text_q, Tensor? text_k, Tensor? text_v, Tensor image_q, Tensor? image_k, Tensor? image_v, "
        "Tensor text_q_weight, Tensor text_k_weight, Tensor image_q_weight, Tensor image_k_weight, "
        "Tensor? cos, Tensor? sin, float eps, bool adjacent) -> (Tensor q, Tensor k, Tensor v)"
    )
    backward_schema = (
        "(Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor text_q, Tensor? text_k, Tensor image_q, Tensor? image_k, "
        "Tensor text_q_weight, Tensor text_k_weight, Tensor image_q_weight, Tensor image_k_weight, "
        "Tensor? cos, Tensor? sin, float eps, bool adjacent, bool weight_grads) "
        "-> (Tensor dtext_q, Tensor dtext_k, Tensor dtext_v, Tensor dimage_q, Tensor dimage_k, Tensor dimage_v, "
        "Tensor dtext_q_weight, Tensor dtext_k_weight, Tensor dimage_q_weight, Tensor dimage_k_weight)"
    )
    visible_results = 3

    def check(self, *arguments: Any) -> None:
        text, image, weights = arguments[:3], arguments[3:6], arguments[6:10]
        cos, sin = arguments[10:12]
        for name, stream in (("text", text), ("image", image)):
            _check_stream(name, *stream)
        text, image = unpacked(*text), unpacked(*image)
        q = image[0]
        for which, t, other in zip("qkv", text, image, strict=True):
            if (t.shape[0], *t.shape[2:]) != (other.shape[0], *other.shape[2:]) or t.device != other.device:
                batch, _, H, d = other.shape
                raise ValueError(
                    f"text {which}: expected ({batch}, T, {H}, {d}) on {other.device} as image {which}, "
                    f"got {describe(t)}"
                )
            check_same_dtype(f"text {which}", t, "image q", q)
        names = ("text q", "text k", "image q", "image k")
        for name, weight in zip(names, weights, strict=True):
            check_weight(f"{name} weight", weight, q)
            check_same_dtype(f"{name} weight", weight, "text q weight", weights[0])
        check_tables(cos, sin, text[0].shape[1] + q.shape[1], q)

    def reference(self, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        text, image = unpacked(*arguments[:3]), unpacked(*arguments[3:6])
        text_q_weight, text_k_weight, image_q_weight, image_k_weight, cos, sin, eps, adjacent = arguments[6:]
        q = torch.cat((normed(text[0], text_q_weight, eps), normed(image[0], image_q_weight, eps)), dim=1)
        k = torch.cat((normed(text[1], text_k_weight, eps), normed(image[1], image_k_weight, eps)), dim=1)
        q, k = (rotated(x, cos, sin, adjacent).to(image[0].dtype) for x in (q, k))
        return q, k, torch.cat((text[2], image[2]), dim=1)

    def fake(self, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        text, image = arguments[0], arguments[3:6]
        tokens = text.shape[1] + image[0].shape[1]
        q, k, v = (x.new_empty((x.shape[0], tokens, *x.shape[2:])) for x in unpacked(*image))
        return q, k, v

    def fake_backward(
        self,
        grad_q: Tensor,
        grad_k: Tensor,
        grad_v: Tensor,
        text_q: Tensor,
        text_k: Tensor | None,
        image_q: Tensor,
        image_k: Tensor | None,
        *rest: Any,
    ) -> tuple[Tensor, ...]:
        weights, weight_grads = rest[:4], rest[-1]
        streams: list[Tensor] = []
        for q, k in ((text_q, text_k), (image_q, image_k)):
            if k is None:
                streams += [q.new_empty(q.shape), q.new_empty((0,)), q.new_empty((0,))]
            else:
                v_shape = (*q.shape[:2], *grad_v.shape[2:])
                streams += [q.new_empty(q.shape), k.new_empty(k.shape), grad_v.new_empty(v_shape)]
        return *streams, *(w.new_empty(w.shape if weight_grads else (0,)) for w in weights)

    def save(self, ctx: Any, arguments: tuple[Any, ...], results: tuple[Tensor, ...]) -> None:
        text_q, text_k, _, image_q, image_k, _, *rest, ctx.eps, ctx.adjacent = arguments
        ctx.save_for_backward(text_q, text_k, image_q, image_k, *rest)

    def backward(self, ctx: Any, backward_op: Callable[..., Any], *grads: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        weight_grads = any(ctx.needs_input_grad[6:10])
        results = backward_op(*(contiguous_rows(grad) for grad in grads), *saved, ctx.eps, ctx.adjacent, weight_grads)
        text, image = (
            (grads[0], None, None) if k is None else grads
            for grads, k in ((results[:3], saved[1]), (results[3:6], saved[3]))
        )
        streams = (*text, *image)
        return *streams, *(results[6:] if weight_grads else (None,) * 4), *(None,) * 4

    def jvp(self, backend: Backend, arguments: Arguments, results: Tensors, tangents: Tangents) -> Tensors:
        *_, cos, sin, eps, adjacent = arguments
        dcos, dsin = tangents[10:12]
        texts = unpacked(*arguments[:3])[0].shape[1]
        streams = []
        for first, tokens in ((0, slice(None, texts)), (3, slice(texts, None))):
            q, k, v = unpacked(*arguments[first : first + 3])
            dq, dk, dv = _unpacked_tangents(arguments[first + 1] is None, *tangents[first : first + 3])
            weights = slice(6 + 2 * first // 3, 8 + 2 * first // 3)
            tables = (t if t is None else t[tokens] for t in (cos, sin))
            dtables = (t if t is None else t[tokens] for t in (dcos, dsin))
            given = dq, dk, *tangents[weights], *dtables
            if any(t is not None for t in given):
                dq, dk = QK_NORM_ROPE.jvp(
                    backend, (q, k, *arguments[weights], *tables, eps, adjacent), (), (*given, None, None)
                )
            streams.append([torch.zeros_like(t) if d is None else d for t, d in ((q, dq), (k, dk), (v, dv))])
        dq, dk, dv = (torch.cat(pair, dim=1) for pair in zip(*streams, strict=True))
        return dq, dk, dv

    def bytes_moved(self, *arguments: Any) -> tuple[int, int]:
        streams = [t for t in arguments[:6] if t is not None]
        heads = sum(t.nbytes for t in streams)
        values = sum(unpacked(*arguments[i : i + 3])[2].nbytes for i in (0, 3))
        tables = 0 if arguments[10] is None else 2 * arguments[10].nbytes
        # The backward op reads the gradients, and q and k of the inputs.
        return 2 * heads + tables, 3 * heads - values + tables

    def cases(self) -> Sequence[Case]:
        return tuple(Case(id=shapes.id, make=partial(_arguments, shapes)) for shapes in SHAPES)

    def workloads(self) -> Sequence[Case]:
        # A 512 and a 1024 pixel image; with the smaller one fewer text tokens, as in
        # FLUX.1-schnell.
        return tuple(
            Case(
                id=f"B1-T{T}-I{S}-H24-d128",
                make=partial(_arguments, JointShapes(id="", heads=(1, 24, 128), text=T, image=S)),
            )
            for T, S in ((128, 1024), (512, 4096))
        )


def _unpacked_tangents(packed: bool, q: Tensor | None, *rest: Tensor | None) -> tuple[Tensor | None, ...]:
    if not packed:
        return q, *rest
    return (None,) * 3 if q is None else q.unbind(2)


def _check_stream(name: str, q: Tensor, k: Tensor | None, v: Tensor | None) -> None:
    if k is None or v is None:
        if k is not v:
            check_tensor(f"{name} k", k)
            check_tensor(f"{name} v", v)
        if q.dim() != 5 or q.shape[2] != 3:
            raise ValueError(f"{name}: expected (q, k, v) or one packed (B, S, 3, H, d), got {describe(q)}")
        check_head_size(name, q)
        return
    check_heads(f"{name} q", q)
    for which, t in (("k", k), ("v", v)):
        check_heads(f"{name} {which}", t)
        if (t.shape[:2], t.shape[3], t.device) != (q.shape[:2], q.shape[3], q.device):
            B, S, _, d = q.shape
            raise ValueError(f"{name} {which}: expected ({B}, {S}, H, {d}) on {q.device} as its q, got {describe(t)}")
        check_same_dtype(f"{name} {which}", t, f"{name} q", q)


@dataclass(frozen=True, kw_only=True)
class JointShapes:
    """Shapes and layouts of the arguments of one case."""

    id: str
    heads: tuple[int, int, int]
    """B, H and d."""
    text: int
    image: int
    k_heads: int | None = None
    adjacent: bool = True
    tables: Literal["full", "compact", "none"] = "full"
    layout: Literal["contiguous", "packed", "transposed", "mixed"] = "contiguous"
    """`packed`: one tensor for each stream; `transposed`: (B, H, S, d) in memory; `mixed`: the text
    packed, the image not."""
    wide: bool = False
    """Weights in float32 for narrower streams."""


SHAPES = (
    JointShapes(id="B2-T3-I5-H3-d8", heads=(2, 3, 8), text=3, image=5),
    JointShapes(id="B2-T3-I5-H3-d8-packed", heads=(2, 3, 8), text=3, image=5, layout="packed"),
    JointShapes(
        id="B2-T4-I7-H2-d64-mixed-half-compact",
        heads=(2, 2, 64),
        text=4,
        image=7,
        layout="mixed",
        adjacent=False,
        tables="compact",
    ),
    JointShapes(id="B1-T2-I9-H4-k2-d96-transposed", heads=(1, 4, 96), text=2, image=9, k_heads=2, layout="transposed"),
    JointShapes(
        id="B2-T5-I13-H2-d128-packed-none", heads=(2, 2, 128), text=5, image=13, layout="packed", tables="none"
    ),
    JointShapes(id="B1-T3-I2-H1-d6-wide", heads=(1, 1, 6), text=3, image=2, wide=True),
    JointShapes(id="B1-T0-I4-H2-d8", heads=(1, 2, 8), text=0, image=4),
    JointShapes(id="B2-T3-I0-H2-d8-packed", heads=(2, 2, 8), text=3, image=0, layout="packed"),
    JointShapes(id="B0-T3-I2-H2-d8", heads=(0, 2, 8), text=3, image=2),
)


def _arguments(shapes: JointShapes, dtype: torch.dtype, device: torch.device) -> tuple[Any, ...]:
    B, H, d = shapes.heads

    def stream(tokens: int, packed: bool) -> list[Tensor | None]:
        if packed:
            return [torch.randn(B, tokens, 3, H, d, device=device).to(dtype).requires_grad_(), None, None]
        heads = (H, shapes.k_heads or H, shapes.k_heads or H)
        if shapes.layout == "transposed":
            return [
                torch.randn(B, h, tokens, d, device=device).to(dtype).transpose(1, 2).requires_grad_() for h in heads
            ]
        return [torch.randn(B, tokens, h, d, device=device).to(dtype).requires_grad_() for h in heads]

    kept = torch.float32 if shapes.wide and dtype != torch.float64 else dtype
    weights = [(1 + 0.3 * torch.randn(d, device=device)).to(kept).requires_grad_() for _ in range(4)]
    width = {"full": d, "compact": d // 2, "none": 0}[shapes.tables]
    tables = [
        torch.randn(shapes.text + shapes.image, width, device=device).to(accumulator_of(dtype)) if width else None
        for _ in range(2)
    ]
    text, image = (
        stream(shapes.text, shapes.layout in ("packed", "mixed")),
        stream(shapes.image, shapes.layout == "packed"),
    )
    return *text, *image, *weights, *tables, 1e-6, shapes.adjacent


JOINT_QK_NORM_ROPE = JointQkNormRope()
