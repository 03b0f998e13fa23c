"""Qwen-Image: double blocks and their attention on fused operators.

The formulas are those of diffusers' `transformer_qwenimage.py`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastdistill.models.patches import adaln
from fastdistill.models.patches.attention import (
    ADDED_PROJECTIONS,
    OWN_PROJECTIONS,
    added_norms,
    heads_of,
    joint_attention,
    own_norms,
    real_tables,
)
from fastdistill.models.patches.blocks import GELU, residuals
from fastdistill.models.patches.contract import Patch
from fastdistill.models.patches.fusions import Fusions
from fastdistill.models.patches.reasons import why_attention_stays, why_norms_stay
from fastdistill.models.patches.streams import split

PROCESSORS = ("QwenDoubleStreamAttnProcessor2_0",)


def why_not_attention(
    attn: Any,
    /,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None = None,
    attention_mask: Tensor | None = None,
    *,
    encoder_hidden_states_mask: Tensor | None = None,
    image_rotary_emb: Any = None,
    **unknown: Any,
) -> str | None:
    if encoder_hidden_states is None or attention_mask is not None:
        return "its processor refuses the call"
    tokens = hidden_states.shape[1], encoder_hidden_states.shape[1]
    if image_rotary_emb is not None and tokens != tuple(table.shape[0] for table in image_rotary_emb):
        # Tables of both streams are joined below, where a swap of the streams would go unseen.
        return "a stream and its rotary tables differ in length"
    norms, head_size = [*added_norms(attn), *own_norms(attn)], attn.inner_dim // attn.heads
    return why_attention_stays(
        attn, norms, head_size, image_rotary_emb, hidden_states, processors=PROCESSORS, unknown=unknown
    )


def attention(
    attn: Any,
    fusions: Fusions,
    /,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    attention_mask: None = None,
    *,
    encoder_hidden_states_mask: Tensor | None = None,
    image_rotary_emb: Any = None,
) -> tuple[Tensor, Tensor]:
    mask = encoder_hidden_states_mask
    if mask is not None:
        image_mask = torch.ones(hidden_states.shape[:2], dtype=torch.bool, device=hidden_states.device)
        mask = torch.cat((mask, image_mask), dim=1)[:, None, None, :]
    head_size = attn.inner_dim // attn.heads
    image = heads_of(attn, OWN_PROJECTIONS, None, hidden_states, head_size)
    text = heads_of(attn, ADDED_PROJECTIONS, None, encoder_hidden_states, head_size)
    norms = [*added_norms(attn), *own_norms(attn)]
    tables = None if image_rotary_emb is None else real_tables(*reversed(image_rotary_emb))
    both = joint_attention(fusions, attn, text, image, norms, tables, mask)
    of_text, of_image = split(both, encoder_hidden_states.shape[1])
    of_image = attn.to_out[0](of_image)
    if len(attn.to_out) > 1:
        of_image = attn.to_out[1](of_image)
    return of_image, attn.to_add_out(of_text)


def why_not_double_block(
    block: Any,
    /,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    encoder_hidden_states_mask: Tensor | None,
    temb: Tensor,
    image_rotary_emb: Any = None,
    joint_attention_kwargs: dict[str, Any] | None = None,
    modulate_index: Any = None,
) -> str | None:
    if block.zero_cond_t or modulate_index is not None:
        return "its image tokens have modulations of two times"
    return why_norms_stay(block.img_norm1, block.img_norm2, block.txt_norm1, block.txt_norm2)


def double_block(
    block: Any,
    fusions: Fusions,
    /,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    encoder_hidden_states_mask: Tensor | None,
    temb: Tensor,
    image_rotary_emb: Any = None,
    joint_attention_kwargs: dict[str, Any] | None = None,
    modulate_index: None = None,
) -> tuple[Tensor, Tensor]:
    shift, scale, *image_modulation = block.img_mod(temb).chunk(6, dim=-1)
    text_shift, text_scale, *text_modulation = block.txt_mod(temb).chunk(6, dim=-1)
    attn_output, text_attn_output = block.attn(
        hidden_states=fusions.modulate(hidden_states, scale, shift, block.img_norm1.eps),
        encoder_hidden_states=fusions.modulate(encoder_hidden_states, text_scale, text_shift, block.txt_norm1.eps),
        encoder_hidden_states_mask=encoder_hidden_states_mask,
        image_rotary_emb=image_rotary_emb,
        **(joint_attention_kwargs or {}),
    )
    hidden_states = residuals(
        fusions, hidden_states, attn_output, image_modulation, block.img_norm2.eps, block.img_mlp, clip=True
    )
    encoder_hidden_states = residuals(
        fusions, encoder_hidden_states, text_attn_output, text_modulation, block.txt_norm2.eps, block.txt_mlp, clip=True
    )
    return encoder_hidden_states, hidden_states


PATCHES = {
    "QwenImageTransformerBlock": Patch(why_not_double_block, double_block),
    "Attention": Patch(why_not_attention, attention),
    "GELU": GELU,
    "AdaLayerNormContinuous": adaln.CONTINUOUS,
}
