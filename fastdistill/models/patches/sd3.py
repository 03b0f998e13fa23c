"""SD3 and SD3.5: joint blocks and their attention on fused operators. The formulas are diffusers' `JointTransformerBlock`,
`JointAttnProcessor2_0` and `SD35AdaLayerNormZeroX`. The image goes before the text, and positions are not in the heads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from fastdistill.models.patches import adaln
from fastdistill.models.patches.attention import heads_of, joint_attention, self_attention, why_not
from fastdistill.models.patches.blocks import gelu, residuals, why_norms_stay
from fastdistill.models.patches.fusions import Forward, Fusions
from fastdistill.models.patches.streams import split

# Not the processor of `fuse_qkv_projections()`: it leaves out the query-key norms.
PROCESSORS = ("JointAttnProcessor2_0",)


def attention(attn: Any, fusions: Fusions) -> Forward:
    def forward(
        hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> Any:
        norms = [attn.norm_q, attn.norm_k]
        if encoder_hidden_states is not None:
            norms += [attn.norm_added_q, attn.norm_added_k]
        head_size = attn.inner_dim // attn.heads
        reason = why_not(attn, norms, head_size, None, hidden_states, PROCESSORS)
        if reason is None and kwargs:
            reason = f"it was called with {', '.join(kwargs)}"
        if reason is not None:
            return fusions.step_aside(attn, reason, hidden_states, encoder_hidden_states, attention_mask, **kwargs)

        # This processor takes no notice of a mask, nor of what `fuse_projections()` has left.
        image = heads_of(attn, ("to_q", "to_k", "to_v"), None, hidden_states, head_size)
        if encoder_hidden_states is None:
            return attn.to_out[1](attn.to_out[0](self_attention(fusions, attn, image, norms, None, None)))
        text = heads_of(attn, ("add_q_proj", "add_k_proj", "add_v_proj"), None, encoder_hidden_states, head_size)
        of_image, of_text = split(joint_attention(fusions, attn, image, text, norms, None, None), hidden_states.shape[1])
        if not attn.context_pre_only:
            of_text = attn.to_add_out(of_text)
        return attn.to_out[1](attn.to_out[0](of_image)), of_text

    return forward


def zero_x(module: Any, fusions: Fusions) -> Forward:
    """One norm with the modulations of both attentions."""

    def forward(hidden_states: Tensor, emb: Any = None) -> Any:
        if reason := why_norms_stay(module.norm):
            return fusions.step_aside(module, reason, hidden_states, emb)
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp, shift2, scale2, gate2 = module.linear(module.silu(emb)).chunk(9, dim=1)
        normed = fusions.modulate(hidden_states, scale, shift, module.norm.eps)
        normed2 = fusions.modulate(hidden_states, scale2, shift2, module.norm.eps)
        return normed, gate, shift_mlp, scale_mlp, gate_mlp, normed2, gate2

    return forward


def joint_block(block: Any, fusions: Fusions) -> Forward:
    def forward(
        hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor, joint_attention_kwargs: dict[str, Any] | None = None
    ) -> tuple[Tensor | None, Tensor]:
        # After the attention of the last block, nothing becomes of the text.
        reason = why_norms_stay(*([block.norm2] if block.context_pre_only else [block.norm2, block.norm2_context]))
        if block._chunk_size is not None:
            reason = "its feed-forward is chunked"
        if reason is not None:
            return fusions.step_aside(  # type: ignore[no-any-return]
                block, reason, hidden_states, encoder_hidden_states, temb, joint_attention_kwargs
            )
        joint_attention_kwargs = joint_attention_kwargs or {}
        normed, gate, *mlp_modulation = block.norm1(hidden_states, emb=temb)
        if block.context_pre_only:
            normed_text = block.norm1_context(encoder_hidden_states, temb)
        else:
            normed_text, *text_modulation = block.norm1_context(encoder_hidden_states, emb=temb)
        attn_output, text_attn_output = block.attn(hidden_states=normed, encoder_hidden_states=normed_text, **joint_attention_kwargs)
        if block.use_dual_attention:
            *mlp_modulation, normed2, gate2 = mlp_modulation
            hidden_states = fusions.gated_residual(hidden_states, attn_output, gate, clip=False)
            attn_output, gate = block.attn2(hidden_states=normed2, **joint_attention_kwargs), gate2
        hidden_states = residuals(fusions, hidden_states, attn_output, (gate, *mlp_modulation), block.norm2.eps, block.ff, clip=False)
        if block.context_pre_only:
            return None, hidden_states
        encoder_hidden_states = residuals(
            fusions, encoder_hidden_states, text_attn_output, text_modulation, block.norm2_context.eps, block.ff_context, clip=False
        )
        return encoder_hidden_states, hidden_states

    return forward


PATCHES: dict[str, Callable[[Any, Fusions], Forward]] = {
    "JointTransformerBlock": joint_block,
    "Attention": attention,
    "GELU": gelu,
    "AdaLayerNormZero": adaln.zero,
    "SD35AdaLayerNormZeroX": zero_x,
    "AdaLayerNormContinuous": adaln.continuous,
}
