"""Qwen-Image: double blocks and their attention on fused operators. The formulas are diffusers' `transformer_qwenimage.py`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastdistill.models.patches import adaln
from fastdistill.models.patches.attention import heads_of, joint_attention, real_tables, why_not
from fastdistill.models.patches.blocks import gelu, residuals, why_norms_stay
from fastdistill.models.patches.fusions import Forward, Fusions
from fastdistill.models.patches.streams import split

PROCESSORS = ("QwenDoubleStreamAttnProcessor2_0",)
_KEYWORDS = {"encoder_hidden_states_mask", "image_rotary_emb"}


def attention(attn: Any, fusions: Fusions) -> Forward:
    def forward(
        hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> Any:
        if encoder_hidden_states is None or attention_mask is not None:
            return fusions.step_aside(
                attn, "its processor refuses the call", hidden_states, encoder_hidden_states, attention_mask, **kwargs
            )
        rotary_emb = kwargs.get("image_rotary_emb")
        norms = [attn.norm_added_q, attn.norm_added_k, attn.norm_q, attn.norm_k]
        head_size = attn.inner_dim // attn.heads
        reason = why_not(attn, norms, head_size, rotary_emb, hidden_states, PROCESSORS)
        if reason is None and (unknown := kwargs.keys() - _KEYWORDS):
            reason = f"it was called with {', '.join(sorted(unknown))}"
        if reason is not None:
            return fusions.step_aside(attn, reason, hidden_states, encoder_hidden_states, attention_mask, **kwargs)

        mask = kwargs.get("encoder_hidden_states_mask")
        if mask is not None:
            image_mask = torch.ones(hidden_states.shape[:2], dtype=torch.bool, device=hidden_states.device)
            mask = torch.cat((mask, image_mask), dim=1)[:, None, None, :]
        image = heads_of(attn, ("to_q", "to_k", "to_v"), None, hidden_states, head_size)
        text = heads_of(attn, ("add_q_proj", "add_k_proj", "add_v_proj"), None, encoder_hidden_states, head_size)
        tables = None if rotary_emb is None else real_tables(*reversed(rotary_emb))
        both = joint_attention(fusions, attn, text, image, norms, tables, mask)
        of_text, of_image = split(both, encoder_hidden_states.shape[1])
        of_image = attn.to_out[0](of_image)
        if len(attn.to_out) > 1:
            of_image = attn.to_out[1](of_image)
        return of_image, attn.to_add_out(of_text)

    return forward


def double_block(block: Any, fusions: Fusions) -> Forward:
    def forward(
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        encoder_hidden_states_mask: Tensor | None,
        temb: Tensor,
        image_rotary_emb: Any = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
        modulate_index: Any = None,
    ) -> tuple[Tensor, Tensor]:
        reason = why_norms_stay(block.img_norm1, block.img_norm2, block.txt_norm1, block.txt_norm2)
        if block.zero_cond_t or modulate_index is not None:
            reason = "its image tokens have modulations of two times"
        if reason is not None:
            return fusions.step_aside(  # type: ignore[no-any-return]
                block,
                reason,
                hidden_states,
                encoder_hidden_states,
                encoder_hidden_states_mask,
                temb,
                image_rotary_emb,
                joint_attention_kwargs,
                modulate_index,
            )
        shift, scale, *image_modulation = block.img_mod(temb).chunk(6, dim=-1)
        text_shift, text_scale, *text_modulation = block.txt_mod(temb).chunk(6, dim=-1)
        attn_output, text_attn_output = block.attn(
            hidden_states=fusions.modulate(hidden_states, scale, shift, block.img_norm1.eps),
            encoder_hidden_states=fusions.modulate(encoder_hidden_states, text_scale, text_shift, block.txt_norm1.eps),
            encoder_hidden_states_mask=encoder_hidden_states_mask,
            image_rotary_emb=image_rotary_emb,
            **(joint_attention_kwargs or {}),
        )
        hidden_states = residuals(fusions, hidden_states, attn_output, image_modulation, block.img_norm2.eps, block.img_mlp, clip=True)
        encoder_hidden_states = residuals(
            fusions, encoder_hidden_states, text_attn_output, text_modulation, block.txt_norm2.eps, block.txt_mlp, clip=True
        )
        return encoder_hidden_states, hidden_states

    return forward


PATCHES: dict[str, Callable[[Any, Fusions], Forward]] = {
    "QwenImageTransformerBlock": double_block,
    "Attention": attention,
    "GELU": gelu,
    "AdaLayerNormContinuous": adaln.continuous,
}
