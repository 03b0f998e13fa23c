"""Checks, RMS norm and rotation in plain PyTorch, for every operator on heads, (B, S, H, d)."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdistill.ops.op import accumulator_of, describe
from fastdistill.ops.rows import check_contiguous

Pairing = Literal["adjacent", "half"]

# The kernels hold the cosines and sines of a position, one for each channel of a head.
MAX_HEAD_SIZE = 512


def is_adjacent(pairing: Pairing) -> bool:
    """Whether a pairing is `adjacent`; raises `ValueError` if it is neither that nor `half`."""
    if pairing not in ("adjacent", "half"):
        raise ValueError(f"pairing: expected adjacent or half, got {pairing!r}")
    return pairing == "adjacent"


def check_heads(name: str, t: Tensor) -> None:
    if t.dim() != 4:
        raise ValueError(f"{name}: expected (B, S, H, d), got {describe(t)}")
    check_head_size(name, t)


def check_head_size(name: str, t: Tensor) -> None:
    d = t.shape[-1]
    if d % 2 or not 0 < d <= MAX_HEAD_SIZE:
        raise ValueError(f"{name}: expected an even head size of at most {MAX_HEAD_SIZE}, got {describe(t)}")
    check_contiguous(name, t)


def check_weight(name: str, weight: Tensor, q: Tensor) -> None:
    d = q.shape[-1]
    if weight.shape != (d,) or weight.device != q.device:
        raise ValueError(f"{name}: expected ({d},) on {q.device}, got {describe(weight)}")
    if weight.dtype != q.dtype and (weight.dtype != torch.float32 or q.dtype == torch.float64):
        raise TypeError(f"{name}: expected the dtype of q, {q.dtype}, or float32, got {describe(weight)}")


def check_same_dtype(name: str, t: Tensor, other_name: str, other: Tensor) -> None:
    if t.dtype != other.dtype:
        raise TypeError(f"{name}: expected the dtype of {other_name}, {other.dtype}, got {describe(t)}")


def check_tables(cos: Tensor | None, sin: Tensor | None, tokens: int, q: Tensor) -> None:
    if cos is None and sin is None:
        return
    if cos is None or sin is None:
        raise ValueError("cos, sin: expected both or neither")
    d, table = q.shape[-1], accumulator_of(q.dtype)
    for name, t in (("cos", cos), ("sin", sin)):
        # Number by number: torch.compile looks for a shape among others without guarding on its sizes.
        fits = t.dim() == 2 and t.shape[0] == tokens and (t.shape[1] == d or t.shape[1] == d // 2)
        if not fits or t.shape != cos.shape or t.device != q.device:
            expected = f"({tokens}, {d}) or ({tokens}, {d // 2})"
            raise ValueError(f"{name}: expected {expected}, cos and sin the same, on {q.device}, got {describe(t)}")
        if t.dtype != table:
            raise TypeError(f"{name}: expected {table} for q of {q.dtype}, got {describe(t)}")
        if t.requires_grad:
            raise ValueError(f"{name}: expected a constant, got a tensor that requires a gradient; detach it")
        check_contiguous(name, t)


def unpacked(q: Tensor, k: Tensor | None, v: Tensor | None) -> tuple[Tensor, ...]:
    """Queries, keys and values; without k and v, q holds all three, (B, S, 3, H, d)."""
    return q.unbind(2) if k is None or v is None else (q, k, v)


def normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMS norm of every head of (B, S, H, d), times the weight (d)."""
    if weight.dtype != x.dtype:
        return F.rms_norm(x, x.shape[-1:], eps=eps) * weight
    return F.rms_norm(x, x.shape[-1:], weight, eps)


def rotated(x: Tensor, cos: Tensor | None, sin: Tensor | None, adjacent: bool) -> Tensor:
    """Rotation of (B, S, H, d) by tables (S, d) or (S, d / 2), in the dtype of the tables.

    Without tables, x itself.
    """
    if cos is None or sin is None:
        return x
    if cos.shape[-1] < x.shape[-1]:
        cos, sin = (t.repeat_interleave(2, dim=-1) if adjacent else torch.cat((t, t), dim=-1) for t in (cos, sin))
    if adjacent:
        a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
        turned = torch.stack((-b, a), dim=-1).flatten(-2)
    else:
        a, b = x.unflatten(-1, (2, -1)).unbind(-2)
        turned = torch.cat((-b, a), dim=-1)
    return x.to(cos.dtype) * cos[:, None] + turned.to(cos.dtype) * sin[:, None]
