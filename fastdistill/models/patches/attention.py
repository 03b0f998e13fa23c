"""Attention modules: query-key norms, rotation and concatenation in one operator, then attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastdistill.models.patches.fusions import Fusions, Heads, RotaryTables
from fastdistill.ops.attention import attend

# Names of the projections of a stream in diffusers' attention modules.
OWN_PROJECTIONS = ("to_q", "to_k", "to_v")
ADDED_PROJECTIONS = ("add_q_proj", "add_k_proj", "add_v_proj")


def own_norms(attn: Any) -> list[Any]:
    """Norms of q and k of an attention module's own stream."""
    return [attn.norm_q, attn.norm_k]


def added_norms(attn: Any) -> list[Any]:
    """Norms of q and k of an attention module's second stream; None where there is no norm."""
    return [getattr(attn, "norm_added_q", None), getattr(attn, "norm_added_k", None)]


def heads_of(attn: Any, names: Sequence[str], packed: str | None, x: Tensor, head_size: int) -> Heads:
    """Queries, keys and values of a stream, from the projections called `names`.

    Returns:
        (q, k, v), each (B, S, H, d); or, where the projections are fused into the one called
        `packed`,
        all three as (B, S, 3, H, d).
    """
    if packed is not None and getattr(attn, "fused_projections", False):
        return getattr(attn, packed)(x).unflatten(-1, (3, -1, head_size))  # type: ignore[no-any-return]
    q, k, v = (getattr(attn, name)(x).unflatten(-1, (-1, head_size)) for name in names)
    return q, k, v


def joint_attention(
    fusions: Fusions,
    attn: Any,
    first: Heads,
    second: Heads,
    norms: Sequence[Any],
    tables: RotaryTables,
    mask: Tensor | None,
) -> Tensor:
    """Attention over two streams, (B, S, H * d).

    `norms` are the modules that norm q and k of the first stream, then q and k of the second.
    """
    q, k, v = fusions.joint_qk_norm_rope(first, second, norms, tables)
    return _attend(fusions, attn, q, k, v, mask)


def self_attention(
    fusions: Fusions, attn: Any, heads: Heads, norms: Sequence[Any], tables: RotaryTables, mask: Tensor | None
) -> Tensor:
    """Attention within one stream, (B, S, H * d).

    `tables` may be (B, S, ...), with a table for each sample.
    """
    q, k, v = heads.unbind(2) if isinstance(heads, Tensor) else heads
    shapes = q.shape, k.shape
    if tables is not None and tables[0].dim() == 3:
        # Until attention, tokens do not meet: the samples are one long sequence.
        q, k = q.flatten(0, 1)[None], k.flatten(0, 1)[None]
        tables = tables[0].flatten(0, 1), tables[1].flatten(0, 1)
    q, k = fusions.qk_norm_rope(q, k, norms, tables)
    return _attend(fusions, attn, q.view(shapes[0]), k.view(shapes[1]), v, mask)


def real_tables(*freqs: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin, (S, d / 2), of complex tables one after the other.

    A block makes both in every call. To keep them would ask for care with graphs, checkpoints and
    inference mode, and save two copies that are small next to the block's own work.
    """
    return torch.cat([t.real for t in freqs], dim=-2), torch.cat([t.imag for t in freqs], dim=-2)


def _attend(fusions: Fusions, attn: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    # What the model's owner chose by `set_attention_backend` goes before what was asked for here.
    chosen = getattr(attn.processor, "_attention_backend", None)
    name = fusions.attention if chosen is None else str(getattr(chosen, "value", chosen))
    return attend(q, k, v, name, mask).flatten(2, 3).to(q.dtype)
