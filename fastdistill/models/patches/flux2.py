"""FLUX.2: double blocks, single blocks and their attention on fused operators. The formulas are diffusers' `transformer_flux2.py`.

All blocks share their modulations, (B, 1, D) or, where reference tokens have a time of their own, (B, S, D).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from fastdistill.models.patches import adaln
from fastdistill.models.patches.attention import heads_of, joint_attention, self_attention, why_not
from fastdistill.models.patches.blocks import residuals, why_norms_stay
from fastdistill.models.patches.fusions import Forward, Fusions, hooked
from fastdistill.models.patches.streams import halves, joined, split

# Not the processors with a key-value cache: they read keys of reference tokens out of the joint sequence.
PROCESSORS = ("Flux2AttnProcessor",)
SINGLE_PROCESSORS = ("Flux2ParallelSelfAttnProcessor",)


def attention(attn: Any, fusions: Fusions) -> Forward:
    def forward(
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
        **kwargs: Any,
    ) -> Any:
        if attn.added_kv_proj_dim is None or encoder_hidden_states is None:
            return fusions.step_aside(
                attn, "it has no second stream", hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb, **kwargs
            )
        norms = [attn.norm_added_q, attn.norm_added_k, attn.norm_q, attn.norm_k]
        reason = why_not(attn, norms, attn.head_dim, image_rotary_emb, hidden_states, PROCESSORS)
        if reason is None and kwargs:
            reason = f"it was called with {', '.join(kwargs)}"
        if reason is not None:
            return fusions.step_aside(attn, reason, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb, **kwargs)

        image = heads_of(attn, ("to_q", "to_k", "to_v"), "to_qkv", hidden_states, attn.head_dim)
        text = heads_of(attn, ("add_q_proj", "add_k_proj", "add_v_proj"), "to_added_qkv", encoder_hidden_states, attn.head_dim)
        both = joint_attention(fusions, attn, text, image, norms, image_rotary_emb, attention_mask)
        of_text, of_image = split(both, encoder_hidden_states.shape[1])
        of_text = attn.to_add_out(of_text)
        return attn.to_out[1](attn.to_out[0](of_image)), of_text

    return forward


def double_block(block: Any, fusions: Fusions) -> Forward:
    def forward(
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb_mod_img: Tensor,
        temb_mod_txt: Tensor,
        image_rotary_emb: Any = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor]:
        if reason := why_norms_stay(block.norm1, block.norm1_context, block.norm2, block.norm2_context):
            return fusions.step_aside(  # type: ignore[no-any-return]
                block, reason, hidden_states, encoder_hidden_states, temb_mod_img, temb_mod_txt, image_rotary_emb, joint_attention_kwargs
            )
        shift, scale, *image_modulation = temb_mod_img.chunk(6, dim=-1)
        text_shift, text_scale, *text_modulation = temb_mod_txt.chunk(6, dim=-1)
        attn_output, text_attn_output = block.attn(
            hidden_states=fusions.modulate(hidden_states, scale, shift, block.norm1.eps),
            encoder_hidden_states=fusions.modulate(encoder_hidden_states, text_scale, text_shift, block.norm1_context.eps),
            image_rotary_emb=image_rotary_emb,
            **(joint_attention_kwargs or {}),
        )
        hidden_states = residuals(fusions, hidden_states, attn_output, image_modulation, block.norm2.eps, block.ff, clip=False)
        encoder_hidden_states = residuals(
            fusions, encoder_hidden_states, text_attn_output, text_modulation, block.norm2_context.eps, block.ff_context, clip=True
        )
        return encoder_hidden_states, hidden_states

    return forward


def single_attention(attn: Any, fusions: Fusions) -> Forward:
    """Attention and feed-forward side by side, with one projection into both and one out of both."""

    def forward(hidden_states: Tensor, attention_mask: Tensor | None = None, image_rotary_emb: Any = None, **kwargs: Any) -> Any:
        norms = [attn.norm_q, attn.norm_k]
        reason = why_not(attn, norms, attn.head_dim, image_rotary_emb, hidden_states, SINGLE_PROCESSORS)
        if reason is None and kwargs:
            reason = f"it was called with {', '.join(kwargs)}"
        if reason is None and (type(attn.mlp_act_fn).__name__ != "Flux2SwiGLU" or hooked(attn.mlp_act_fn, attn.mlp_act_fn.gate_fn)):
            reason = "its activation is another or is hooked"
        if reason is not None:
            return fusions.step_aside(attn, reason, hidden_states, attention_mask, image_rotary_emb, **kwargs)

        packed = attn.to_qkv_mlp_proj(hidden_states)
        # In proportion, not in numbers: under tensor parallelism every rank has its share of each part. Split once, so that the backward
        # pass puts the gradient of the projection together in one step.
        channels = packed.shape[-1]
        inner = channels * attn.inner_dim // (3 * attn.inner_dim + attn.mlp_hidden_dim * attn.mlp_mult_factor)
        *heads, mlp_hidden_states = packed.split([inner, inner, inner, channels - 3 * inner], dim=-1)
        q, k, v = (t.unflatten(-1, (-1, attn.head_dim)) for t in heads)
        attn_output = self_attention(fusions, attn, (q, k, v), norms, image_rotary_emb, attention_mask)
        return attn.to_out(fusions.activation_concat(attn_output, mlp_hidden_states, "swiglu"))

    return forward


def single_block(block: Any, fusions: Fusions) -> Forward:
    def forward(
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None,
        temb_mod: Tensor,
        image_rotary_emb: Any = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
        split_hidden_states: bool = False,
        text_seq_len: int | None = None,
    ) -> Any:
        if reason := why_norms_stay(block.norm):
            return fusions.step_aside(
                block,
                reason,
                hidden_states,
                encoder_hidden_states,
                temb_mod,
                image_rotary_emb,
                joint_attention_kwargs,
                split_hidden_states,
                text_seq_len,
            )
        # Without a text, the streams are one already.
        both = hidden_states
        if encoder_hidden_states is not None:
            text_seq_len = encoder_hidden_states.shape[1]
            both = joined(encoder_hidden_states, hidden_states)
        shift, scale, gate = temb_mod.chunk(3, dim=-1)
        attn_output = block.attn(
            hidden_states=fusions.modulate(both, scale, shift, block.norm.eps),
            image_rotary_emb=image_rotary_emb,
            **(joint_attention_kwargs or {}),
        )
        out = fusions.gated_residual(both, attn_output, gate, clip=True)
        return halves(out, text_seq_len or 0) if split_hidden_states else out

    return forward


def swiglu(module: Any, fusions: Fusions) -> Forward:
    def forward(x: Tensor) -> Tensor:
        if hooked(module.gate_fn):
            return fusions.step_aside(module, "its gate is hooked", x)  # type: ignore[no-any-return]
        return fusions.activation_concat(None, x, "swiglu")

    return forward


PATCHES: dict[str, Callable[[Any, Fusions], Forward]] = {
    "Flux2TransformerBlock": double_block,
    "Flux2SingleTransformerBlock": single_block,
    "Flux2Attention": attention,
    "Flux2ParallelSelfAttention": single_attention,
    "Flux2SwiGLU": swiglu,
    "AdaLayerNormContinuous": adaln.continuous,
}
