"""Z-Image: query-key norms, rotation and gated residuals on fused operators.

The formulas are those of diffusers' `transformer_z_image.py`. Its blocks scale an RMS norm and do
not shift it, for which there is no operator.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastdistill.models.patches.attention import OWN_PROJECTIONS, heads_of, own_norms, real_tables, self_attention
from fastdistill.models.patches.contract import NOTHING_TO_GAIN, Patch
from fastdistill.models.patches.fusions import Fusions
from fastdistill.models.patches.reasons import why_attention_stays

PROCESSORS = ("ZSingleStreamAttnProcessor",)


def why_not_attention(
    attn: Any,
    /,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None = None,
    attention_mask: Tensor | None = None,
    *,
    freqs_cis: Tensor | None = None,
    **unknown: Any,
) -> str | None:
    norms, head_size = own_norms(attn), attn.inner_dim // attn.heads
    if reason := why_attention_stays(
        attn, norms, head_size, None, hidden_states, processors=PROCESSORS, unknown=unknown
    ):
        return reason
    if freqs_cis is not None and (freqs_cis.dim() != 3 or freqs_cis.shape[0] not in (1, hidden_states.shape[0])):
        return f"its rotary table is {tuple(freqs_cis.shape)}"
    return None


def attention(
    attn: Any,
    fusions: Fusions,
    /,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None = None,
    attention_mask: Tensor | None = None,
    *,
    freqs_cis: Tensor | None = None,
) -> Tensor:
    if freqs_cis is not None and freqs_cis.shape[0] == 1:
        freqs_cis = freqs_cis[0]
    if attention_mask is not None and attention_mask.ndim == 2:
        attention_mask = attention_mask[:, None, None, :]
    heads = heads_of(attn, OWN_PROJECTIONS, None, hidden_states, attn.inner_dim // attn.heads)
    tables = None if freqs_cis is None else real_tables(freqs_cis)
    out = attn.to_out[0](self_attention(fusions, attn, heads, own_norms(attn), tables, attention_mask))
    return attn.to_out[1](out) if len(attn.to_out) > 1 else out  # type: ignore[no-any-return]


def why_not_transformer_block(
    block: Any,
    /,
    x: Tensor,
    attn_mask: Tensor | None,
    freqs_cis: Tensor,
    adaln_input: Tensor | None = None,
    noise_mask: Tensor | None = None,
    adaln_noisy: Tensor | None = None,
    adaln_clean: Tensor | None = None,
) -> str | None:
    if not block.modulation:
        # No gates: nothing here is fused but the attention, which is patched itself.
        return NOTHING_TO_GAIN
    return None if noise_mask is None else "clean and noisy tokens have modulations of their own"


def transformer_block(
    block: Any,
    fusions: Fusions,
    /,
    x: Tensor,
    attn_mask: Tensor | None,
    freqs_cis: Tensor,
    adaln_input: Tensor,
    noise_mask: None = None,
    adaln_noisy: Tensor | None = None,
    adaln_clean: Tensor | None = None,
) -> Tensor:
    return _modulated(block, fusions, x, attn_mask, freqs_cis, adaln_input)


def why_not_control_block(block: Any, /, *_: Any, **__: Any) -> str | None:
    return None if block.modulation else NOTHING_TO_GAIN


def control_block(
    block: Any,
    fusions: Fusions,
    /,
    c: Tensor,
    x: Tensor,
    attn_mask: Tensor | None,
    freqs_cis: Tensor,
    adaln_input: Tensor,
) -> Tensor:
    """Block of a ControlNet: `c` stacks what the blocks before it give to the model, and their
    stream.

    The first block receives the control alone.
    """
    *given, stream = [block.before_proj(c) + x] if block.block_id == 0 else c.unbind()
    stream = _modulated(block, fusions, stream, attn_mask, freqs_cis, adaln_input)
    return torch.stack([*given, block.after_proj(stream), stream])


def _modulated(
    block: Any, fusions: Fusions, x: Tensor, attn_mask: Tensor | None, freqs_cis: Tensor, adaln_input: Tensor
) -> Tensor:
    scale_msa, gate_msa, scale_mlp, gate_mlp = block.adaLN_modulation(adaln_input).unsqueeze(1).chunk(4, dim=2)
    normed = block.attention_norm1(x) * (1 + scale_msa)
    attn_output = block.attention(normed, attention_mask=attn_mask, freqs_cis=freqs_cis)
    x = fusions.gated_residual(x, block.attention_norm2(attn_output), gate_msa.tanh(), clip=False)
    ff_output = block.feed_forward(block.ffn_norm1(x) * (1 + scale_mlp))
    return fusions.gated_residual(x, block.ffn_norm2(ff_output), gate_mlp.tanh(), clip=False)


PATCHES = {
    "ZImageTransformerBlock": Patch(why_not_transformer_block, transformer_block),
    "ZImageControlTransformerBlock": Patch(why_not_control_block, control_block),
    "Attention": Patch(why_not_attention, attention),
}
