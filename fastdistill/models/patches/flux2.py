"""FLUX.2: double blocks, single blocks and their attention on fused operators.

The formulas are those of diffusers' `transformer_flux2.py`. All blocks share their modulations,
(B, 1, D) or, where reference tokens have a time of their own, (B, S, D).
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
from fastdistill.models.patches.blocks import residuals
from fastdistill.models.patches.contract import Patch
from fastdistill.models.patches.fusions import Fusions
from fastdistill.models.patches.reasons import hooked, norms_stay, stock, why_attention_stays
from fastdistill.models.patches.streams import halves, joined, split

# Not the processors with a key-value cache: they read keys of reference tokens out of the joint
# sequence.
PROCESSORS = ("Flux2AttnProcessor",)
SINGLE_PROCESSORS = ("Flux2ParallelSelfAttnProcessor",)


def why_not_attention(
    attn: Any,
    /,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None = None,
    attention_mask: Tensor | None = None,
    image_rotary_emb: Any = None,
    **unknown: Any,
) -> str | None:
    if attn.added_kv_proj_dim is None or encoder_hidden_states is None:
        return "it has no second stream"
    norms = [*added_norms(attn), *own_norms(attn)]
    return why_attention_stays(
        attn, norms, attn.head_dim, image_rotary_emb, hidden_states, processors=PROCESSORS, unknown=unknown
    )


def attention(
    attn: Any,
    fusions: Fusions,
    /,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    image_rotary_emb: Any = None,
) -> tuple[Tensor, Tensor]:
    image = heads_of(attn, OWN_PROJECTIONS, "to_qkv", hidden_states, attn.head_dim)
    text = heads_of(attn, ADDED_PROJECTIONS, "to_added_qkv", encoder_hidden_states, attn.head_dim)
    norms = [*added_norms(attn), *own_norms(attn)]
    both = joint_attention(fusions, attn, text, image, norms, image_rotary_emb, attention_mask)
    of_text, of_image = split(both, encoder_hidden_states.shape[1])
    of_text = attn.to_add_out(of_text)
    return attn.to_out[1](attn.to_out[0](of_image)), of_text


def double_block(
    block: Any,
    fusions: Fusions,
    /,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb_mod_img: Tensor,
    temb_mod_txt: Tensor,
    image_rotary_emb: Any = None,
    joint_attention_kwargs: dict[str, Any] | None = None,
) -> tuple[Tensor, Tensor]:
    shift, scale, *image_modulation = temb_mod_img.chunk(6, dim=-1)
    text_shift, text_scale, *text_modulation = temb_mod_txt.chunk(6, dim=-1)
    attn_output, text_attn_output = block.attn(
        hidden_states=fusions.modulate(hidden_states, scale, shift, block.norm1.eps),
        encoder_hidden_states=fusions.modulate(encoder_hidden_states, text_scale, text_shift, block.norm1_context.eps),
        image_rotary_emb=image_rotary_emb,
        **(joint_attention_kwargs or {}),
    )
    hidden_states = residuals(
        fusions, hidden_states, attn_output, image_modulation, block.norm2.eps, block.ff, clip=False
    )
    encoder_hidden_states = residuals(
        fusions,
        encoder_hidden_states,
        text_attn_output,
        text_modulation,
        block.norm2_context.eps,
        block.ff_context,
        clip=True,
    )
    return encoder_hidden_states, hidden_states


def why_not_single_attention(
    attn: Any,
    /,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    image_rotary_emb: Any = None,
    **unknown: Any,
) -> str | None:
    norms = own_norms(attn)
    if reason := why_attention_stays(
        attn, norms, attn.head_dim, image_rotary_emb, hidden_states, processors=SINGLE_PROCESSORS, unknown=unknown
    ):
        return reason
    activation = attn.mlp_act_fn
    if not stock(activation, "Flux2SwiGLU") or hooked(activation):
        return "its activation is another or is hooked"
    return why_not_swiglu(activation, hidden_states)


def single_attention(
    attn: Any,
    fusions: Fusions,
    /,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    image_rotary_emb: Any = None,
) -> Tensor:
    """Attention and feed-forward in parallel, with one projection into both and one out of both."""
    packed = attn.to_qkv_mlp_proj(hidden_states)
    # In proportion, not in numbers: under tensor parallelism every rank has its share of each part.
    # Split once, so that the backward pass puts the projection's gradient together in one step.
    channels = packed.shape[-1]
    inner = channels * attn.inner_dim // (3 * attn.inner_dim + attn.mlp_hidden_dim * attn.mlp_mult_factor)
    *heads, mlp_hidden_states = packed.split([inner, inner, inner, channels - 3 * inner], dim=-1)
    q, k, v = (t.unflatten(-1, (-1, attn.head_dim)) for t in heads)
    attn_output = self_attention(fusions, attn, (q, k, v), own_norms(attn), image_rotary_emb, attention_mask)
    return attn.to_out(fusions.activation_concat(attn_output, mlp_hidden_states, "swiglu"))  # type: ignore[no-any-return]


def single_block(
    block: Any,
    fusions: Fusions,
    /,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None,
    temb_mod: Tensor,
    image_rotary_emb: Any = None,
    joint_attention_kwargs: dict[str, Any] | None = None,
    split_hidden_states: bool = False,
    text_seq_len: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
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


def why_not_swiglu(module: Any, /, x: Tensor) -> str | None:
    gate = module.gate_fn
    return "its gate is another or is hooked" if not stock(gate, "SiLU") or hooked(gate) else None


def swiglu(module: Any, fusions: Fusions, /, x: Tensor) -> Tensor:
    return fusions.activation_concat(None, x, "swiglu")


PATCHES = {
    "Flux2TransformerBlock": Patch(norms_stay("norm1", "norm1_context", "norm2", "norm2_context"), double_block),
    "Flux2SingleTransformerBlock": Patch(norms_stay("norm"), single_block),
    "Flux2Attention": Patch(why_not_attention, attention),
    "Flux2ParallelSelfAttention": Patch(why_not_single_attention, single_attention),
    "Flux2SwiGLU": Patch(why_not_swiglu, swiglu),
    "AdaLayerNormContinuous": adaln.CONTINUOUS,
}
