"""SD3 and SD3.5: joint blocks and their attention on fused operators.

The formulas are those of diffusers' `JointTransformerBlock`, `JointAttnProcessor2_0` and
`SD35AdaLayerNormZeroX`. The image goes before the text, and positions are not in the heads.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastdistill.models.patches import adaln
from fastdistill.models.patches.attention import (
    ADDED_PROJECTIONS,
    OWN_PROJECTIONS,
    added_norms,
    heads_of,
    joint_attention,
    own_norms,
    self_attention,
)
from fastdistill.models.patches.blocks import GELU, residuals
from fastdistill.models.patches.contract import Patch
from fastdistill.models.patches.fusions import Fusions
from fastdistill.models.patches.reasons import norms_stay, why_attention_stays, why_norms_stay
from fastdistill.models.patches.streams import split

# Not the processor of `fuse_qkv_projections()`: it leaves out the query-key norms.
PROCESSORS = ("JointAttnProcessor2_0",)


def why_not_attention(
    attn: Any,
    /,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None = None,
    attention_mask: Tensor | None = None,
    **unknown: Any,
) -> str | None:
    norms = own_norms(attn) if encoder_hidden_states is None else [*own_norms(attn), *added_norms(attn)]
    head_size = attn.inner_dim // attn.heads
    return why_attention_stays(attn, norms, head_size, None, hidden_states, processors=PROCESSORS, unknown=unknown)


def attention(
    attn: Any,
    fusions: Fusions,
    /,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None = None,
    attention_mask: Tensor | None = None,
) -> Any:
    # This processor takes no notice of a mask, nor of what `fuse_projections()` has left.
    head_size = attn.inner_dim // attn.heads
    norms = own_norms(attn)
    image = heads_of(attn, OWN_PROJECTIONS, None, hidden_states, head_size)
    if encoder_hidden_states is None:
        return attn.to_out[1](attn.to_out[0](self_attention(fusions, attn, image, norms, None, None)))
    norms += added_norms(attn)
    text = heads_of(attn, ADDED_PROJECTIONS, None, encoder_hidden_states, head_size)
    both = joint_attention(fusions, attn, image, text, norms, None, None)
    of_image, of_text = split(both, hidden_states.shape[1])
    if not attn.context_pre_only:
        of_text = attn.to_add_out(of_text)
    return attn.to_out[1](attn.to_out[0](of_image)), of_text


def zero_x(module: Any, fusions: Fusions, /, hidden_states: Tensor, emb: Any = None) -> tuple[Tensor, ...]:
    """One norm with the modulations of both attentions."""
    modulations = module.linear(module.silu(emb)).chunk(9, dim=1)
    shift, scale, gate, shift_mlp, scale_mlp, gate_mlp, shift2, scale2, gate2 = modulations
    normed = fusions.modulate(hidden_states, scale, shift, module.norm.eps)
    normed2 = fusions.modulate(hidden_states, scale2, shift2, module.norm.eps)
    return normed, gate, shift_mlp, scale_mlp, gate_mlp, normed2, gate2


def why_not_joint_block(block: Any, /, *_: Any, **__: Any) -> str | None:
    if block._chunk_size is not None:
        return "its feed-forward is chunked"
    # After the attention of the last block, nothing becomes of the text.
    return why_norms_stay(*([block.norm2] if block.context_pre_only else [block.norm2, block.norm2_context]))


def joint_block(
    block: Any,
    fusions: Fusions,
    /,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    joint_attention_kwargs: dict[str, Any] | None = None,
) -> tuple[Tensor | None, Tensor]:
    joint_attention_kwargs = joint_attention_kwargs or {}
    normed, gate, *mlp_modulation = block.norm1(hidden_states, emb=temb)
    if block.context_pre_only:
        normed_text = block.norm1_context(encoder_hidden_states, temb)
    else:
        normed_text, *text_modulation = block.norm1_context(encoder_hidden_states, emb=temb)
    attn_output, text_attn_output = block.attn(
        hidden_states=normed, encoder_hidden_states=normed_text, **joint_attention_kwargs
    )
    if block.use_dual_attention:
        *mlp_modulation, normed2, gate2 = mlp_modulation
        hidden_states = fusions.gated_residual(hidden_states, attn_output, gate, clip=False)
        attn_output, gate = block.attn2(hidden_states=normed2, **joint_attention_kwargs), gate2
    hidden_states = residuals(
        fusions, hidden_states, attn_output, (gate, *mlp_modulation), block.norm2.eps, block.ff, clip=False
    )
    if block.context_pre_only:
        return None, hidden_states
    encoder_hidden_states = residuals(
        fusions,
        encoder_hidden_states,
        text_attn_output,
        text_modulation,
        block.norm2_context.eps,
        block.ff_context,
        clip=False,
    )
    return encoder_hidden_states, hidden_states


def single_block(block: Any, fusions: Fusions, /, hidden_states: Tensor, temb: Tensor) -> Tensor:
    """Block of a ControlNet, which has the image alone."""
    normed, *modulation = block.norm1(hidden_states, emb=temb)
    attn_output = block.attn(hidden_states=normed, encoder_hidden_states=None)
    return residuals(fusions, hidden_states, attn_output, modulation, block.norm2.eps, block.ff, clip=False)


PATCHES = {
    "JointTransformerBlock": Patch(why_not_joint_block, joint_block),
    "SD3SingleTransformerBlock": Patch(norms_stay("norm2"), single_block),
    "Attention": Patch(why_not_attention, attention),
    "GELU": GELU,
    "AdaLayerNormZero": adaln.ZERO,
    "SD35AdaLayerNormZeroX": Patch(norms_stay("norm"), zero_x),
    "AdaLayerNormContinuous": adaln.CONTINUOUS,
}
