"""Query-key norms, rotation and concatenation of an attention processor as one operator, and the best attention after it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastdistill import ops
from fastdistill.models.patches.fusions import Fusions, hooked
from fastdistill.ops.attention import attend
from fastdistill.ops.heads import MAX_HEAD_SIZE
from fastdistill.ops.op import FLOATS, accumulator_of

Tables = tuple[Tensor, Tensor] | None
Heads = Tensor | tuple[Tensor, Tensor, Tensor]


def why_not(attn: Any, norms: Sequence[Any], head_size: int, tables: Any, x: Tensor, processors: Sequence[str]) -> str | None:
    """Why this call of an attention module cannot run fused, or None. `norms` are those of its queries and keys, `processors` the names
    of the classes whose formula is the fused one."""
    processor = attn.processor
    if type(processor).__name__ not in processors:
        return f"its processor is {type(processor).__name__}"
    if getattr(processor, "_parallel_config", None) is not None:
        return "context parallelism splits its tokens"
    if any(not _plain_rms_norm(norm, x) for norm in norms):
        return "a query-key norm is no plain RMS norm, is hooked or is offloaded"
    if len({(norm.eps, norm.weight.dtype) for norm in norms}) > 1:
        return "its query-key norms differ"
    if any(norm.weight.shape != (head_size,) for norm in norms):
        return "its query-key norms are not over heads"
    if head_size % 2 or head_size > MAX_HEAD_SIZE:
        return f"its head size is {head_size}"
    if tables is not None and any(t.dim() != 2 for t in tables):
        return "every sample has rotary tables of its own"
    return None


def _plain_rms_norm(norm: Any, x: Tensor) -> bool:
    if norm is None or type(norm).__name__ != "RMSNorm" or hooked(norm):
        return False
    return norm.eps is not None and norm.weight is not None and getattr(norm, "bias", None) is None and norm.weight.device == x.device


def heads_of(attn: Any, names: Sequence[str], packed: str | None, x: Tensor, head_size: int) -> Heads:
    """(q, k, v) of a stream, each (B, S, H, d), from the projections called `names`; or, where they are fused into the one called
    `packed`, all three as (B, S, 3, H, d)."""
    if packed is not None and getattr(attn, "fused_projections", False):
        return getattr(attn, packed)(x).unflatten(-1, (3, -1, head_size))  # type: ignore[no-any-return]
    q, k, v = (getattr(attn, name)(x).unflatten(-1, (-1, head_size)) for name in names)
    return q, k, v


def joint_attention(
    fusions: Fusions, attn: Any, first: Heads, second: Heads, norms: Sequence[Any], tables: Tables, mask: Tensor | None
) -> Tensor:
    """Attention over two streams, (B, S, H * d); `norms` are those of q and k of the first, then of the second stream."""
    like = second if isinstance(second, Tensor) else second[0]
    first_q, first_k, second_q, second_k = _weights(norms, like)
    cos, sin = _tables(tables, like)
    q, k, v = ops.joint_qk_norm_rope(
        first, second, (first_q, first_k), (second_q, second_k), cos, sin, norms[0].eps, backend=fusions.backend
    )
    return _attend(fusions, attn, q, k, v, mask)


def self_attention(fusions: Fusions, attn: Any, heads: Heads, norms: Sequence[Any], tables: Tables, mask: Tensor | None) -> Tensor:
    """Attention within one stream, (B, S, H * d); `tables` may be (B, S, ...), with a table for each sample."""
    q, k, v = heads.unbind(2) if isinstance(heads, Tensor) else heads
    shapes = q.shape, k.shape
    if tables is not None and tables[0].dim() == 3:
        # Until attention, tokens do not meet: the samples are one long sequence.
        q, k = q.flatten(0, 1)[None], k.flatten(0, 1)[None]
        tables = tables[0].flatten(0, 1), tables[1].flatten(0, 1)
    q_weight, k_weight = _weights(norms, q)
    cos, sin = _tables(tables, q)
    q, k = ops.qk_norm_rope(q, k, q_weight, k_weight, cos, sin, norms[0].eps, backend=fusions.backend)
    return _attend(fusions, attn, q.view(shapes[0]), k.view(shapes[1]), v, mask)


def real_tables(*freqs: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin, (S, d / 2), of complex tables one after the other. A block makes them anew in every call: to keep them would ask for
    care with graphs, checkpoints and inference mode, to save two small copies beside the block's own work."""
    return torch.cat([t.real for t in freqs], dim=-2), torch.cat([t.imag for t in freqs], dim=-2)


def _attend(fusions: Fusions, attn: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    # What the model's owner chose by `set_attention_backend` goes before what was asked for here.
    chosen = getattr(attn.processor, "_attention_backend", None)
    name = fusions.attention if chosen is None else str(getattr(chosen, "value", chosen))
    return attend(q, k, v, name, mask).flatten(2, 3).to(q.dtype)


def _weights(norms: Sequence[Any], x: Tensor) -> tuple[Tensor, ...]:
    """In the dtype of the heads, or in float32 beside 16 bits."""
    keep = norms[0].weight.dtype in (x.dtype, torch.float32) and x.dtype in FLOATS
    return tuple(norm.weight if keep else norm.weight.to(x.dtype) for norm in norms)


def _tables(tables: Tables, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
    if tables is None:
        return None, None
    cos, sin = (t.to(x.device, accumulator_of(x.dtype)) for t in tables)
    return cos, sin
