"""FLUX.1: double blocks, single blocks and their attention on fused operators. The formulas are diffusers' `transformer_flux.py`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from fastdistill.models.patches import adaln
from fastdistill.models.patches.attention import heads_of, joint_attention, self_attention, why_not
from fastdistill.models.patches.blocks import gelu, residuals, why_norms_stay
from fastdistill.models.patches.fusions import Forward, Fusions, hooked
from fastdistill.models.patches.streams import halves, joined, split

PROCESSORS = ("FluxAttnProcessor",)
# What is meant for the IP-Adapter's processor comes to every block, and this one passes over it in silence.
IGNORED = {"ip_hidden_states", "ip_adapter_masks"}


def attention(attn: Any, fusions: Fusions) -> Forward:
    def forward(
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
        **kwargs: Any,
    ) -> Any:
        norms = [attn.norm_q, attn.norm_k]
        if encoder_hidden_states is not None:
            norms = [getattr(attn, "norm_added_q", None), getattr(attn, "norm_added_k", None), *norms]
        reason = why_not(attn, norms, attn.head_dim, image_rotary_emb, hidden_states, PROCESSORS)
        if reason is None and (unknown := kwargs.keys() - IGNORED):
            reason = f"it was called with {', '.join(sorted(unknown))}"
        if reason is not None:
            return fusions.step_aside(attn, reason, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb, **kwargs)

        image = heads_of(attn, ("to_q", "to_k", "to_v"), "to_qkv", hidden_states, attn.head_dim)
        if encoder_hidden_states is None:
            return self_attention(fusions, attn, image, norms, image_rotary_emb, attention_mask)
        text = heads_of(attn, ("add_q_proj", "add_k_proj", "add_v_proj"), "to_added_qkv", encoder_hidden_states, attn.head_dim)
        both = joint_attention(fusions, attn, text, image, norms, image_rotary_emb, attention_mask)
        of_text, of_image = split(both, encoder_hidden_states.shape[1])
        return attn.to_out[1](attn.to_out[0](of_image)), attn.to_add_out(of_text)

    return forward


def double_block(block: Any, fusions: Fusions) -> Forward:
    def forward(
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        image_rotary_emb: Any = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor]:
        if reason := why_norms_stay(block.norm2, block.norm2_context):
            return fusions.step_aside(  # type: ignore[no-any-return]
                block, reason, hidden_states, encoder_hidden_states, temb, image_rotary_emb, joint_attention_kwargs
            )
        normed, *image_modulation = block.norm1(hidden_states, emb=temb)
        normed_text, *text_modulation = block.norm1_context(encoder_hidden_states, emb=temb)
        attn_output, text_attn_output, *ip_attn_output = block.attn(
            hidden_states=normed,
            encoder_hidden_states=normed_text,
            image_rotary_emb=image_rotary_emb,
            **(joint_attention_kwargs or {}),
        )
        hidden_states = residuals(fusions, hidden_states, attn_output, image_modulation, block.norm2.eps, block.ff, clip=False)
        if ip_attn_output:
            hidden_states = hidden_states + ip_attn_output[0]
        encoder_hidden_states = residuals(
            fusions, encoder_hidden_states, text_attn_output, text_modulation, block.norm2_context.eps, block.ff_context, clip=True
        )
        return encoder_hidden_states, hidden_states

    return forward


def single_block(block: Any, fusions: Fusions) -> Forward:
    def forward(
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        image_rotary_emb: Any = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor]:
        norm, activation = block.norm, block.act_mlp
        reason = why_norms_stay(norm.norm)
        if reason is None and (getattr(activation, "approximate", None) != "tanh" or hooked(norm, activation)):
            reason = "its norm or its activation is another or is hooked"
        if reason is not None:
            return fusions.step_aside(  # type: ignore[no-any-return]
                block, reason, hidden_states, encoder_hidden_states, temb, image_rotary_emb, joint_attention_kwargs
            )
        both = joined(encoder_hidden_states, hidden_states)
        shift, scale, gate = norm.linear(norm.silu(temb)).chunk(3, dim=1)
        for_attention, for_mlp = fusions.modulate_for_two(both, scale, shift, norm.norm.eps)
        mlp_hidden_states = block.proj_mlp(for_mlp)
        attn_output = block.attn(hidden_states=for_attention, image_rotary_emb=image_rotary_emb, **(joint_attention_kwargs or {}))
        out = block.proj_out(fusions.activation_concat(attn_output, mlp_hidden_states, "gelu_tanh"))
        return halves(fusions.gated_residual(both, out, gate, clip=True), encoder_hidden_states.shape[1])

    return forward


PATCHES: dict[str, Callable[[Any, Fusions], Forward]] = {
    "FluxTransformerBlock": double_block,
    "FluxSingleTransformerBlock": single_block,
    "FluxAttention": attention,
    "GELU": gelu,
    "AdaLayerNormZero": adaln.zero,
    "AdaLayerNormZeroSingle": adaln.zero_single,
    "AdaLayerNormContinuous": adaln.continuous,
}
