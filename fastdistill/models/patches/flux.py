"""FLUX.1: double blocks, single blocks and their attention on fused operators.

The formulas are those of diffusers' `transformer_flux.py`.
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
from fastdistill.models.patches.reasons import hooked, norms_stay, stock, why_attention_stays, why_norms_stay
from fastdistill.models.patches.streams import halves, joined, split

PROCESSORS = ("FluxAttnProcessor",)
# Arguments of the IP-Adapter's processor. They come to every block, and this processor ignores
# them.
IGNORED = {"ip_hidden_states", "ip_adapter_masks"}


def why_not_attention(
    attn: Any,
    /,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None = None,
    attention_mask: Tensor | None = None,
    image_rotary_emb: Any = None,
    **kwargs: Any,
) -> str | None:
    norms = _norms(attn, encoder_hidden_states)
    unknown = kwargs.keys() - IGNORED
    return why_attention_stays(
        attn, norms, attn.head_dim, image_rotary_emb, hidden_states, processors=PROCESSORS, unknown=unknown
    )


def attention(
    attn: Any,
    fusions: Fusions,
    /,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None = None,
    attention_mask: Tensor | None = None,
    image_rotary_emb: Any = None,
    **_: Any,
) -> Any:
    norms = _norms(attn, encoder_hidden_states)
    image = heads_of(attn, OWN_PROJECTIONS, "to_qkv", hidden_states, attn.head_dim)
    if encoder_hidden_states is None:
        return self_attention(fusions, attn, image, norms, image_rotary_emb, attention_mask)
    text = heads_of(attn, ADDED_PROJECTIONS, "to_added_qkv", encoder_hidden_states, attn.head_dim)
    both = joint_attention(fusions, attn, text, image, norms, image_rotary_emb, attention_mask)
    of_text, of_image = split(both, encoder_hidden_states.shape[1])
    return attn.to_out[1](attn.to_out[0](of_image)), attn.to_add_out(of_text)


def _norms(attn: Any, encoder_hidden_states: Tensor | None) -> list[Any]:
    return own_norms(attn) if encoder_hidden_states is None else [*added_norms(attn), *own_norms(attn)]


def double_block(
    block: Any,
    fusions: Fusions,
    /,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    image_rotary_emb: Any = None,
    joint_attention_kwargs: dict[str, Any] | None = None,
) -> tuple[Tensor, Tensor]:
    normed, *image_modulation = block.norm1(hidden_states, emb=temb)
    normed_text, *text_modulation = block.norm1_context(encoder_hidden_states, emb=temb)
    attn_output, text_attn_output, *ip_attn_output = block.attn(
        hidden_states=normed,
        encoder_hidden_states=normed_text,
        image_rotary_emb=image_rotary_emb,
        **(joint_attention_kwargs or {}),
    )
    hidden_states = residuals(
        fusions, hidden_states, attn_output, image_modulation, block.norm2.eps, block.ff, clip=False
    )
    if ip_attn_output:
        hidden_states = hidden_states + ip_attn_output[0]
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


def why_not_single_block(block: Any, /, *_: Any, **__: Any) -> str | None:
    norm, activation = block.norm, block.act_mlp
    if not stock(norm, "AdaLayerNormZeroSingle") or not stock(activation, "GELU") or hooked(norm, activation):
        return "its norm or its activation is another or is hooked"
    if activation.approximate != "tanh":
        return "its activation is another"
    return why_norms_stay(norm.norm)


def single_block(
    block: Any,
    fusions: Fusions,
    /,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    image_rotary_emb: Any = None,
    joint_attention_kwargs: dict[str, Any] | None = None,
) -> tuple[Tensor, Tensor]:
    norm = block.norm
    both = joined(encoder_hidden_states, hidden_states)
    shift, scale, gate = norm.linear(norm.silu(temb)).chunk(3, dim=1)
    for_attention, for_mlp = fusions.modulate_for_two(both, scale, shift, norm.norm.eps)
    mlp_hidden_states = block.proj_mlp(for_mlp)
    attn_output = block.attn(
        hidden_states=for_attention, image_rotary_emb=image_rotary_emb, **(joint_attention_kwargs or {})
    )
    out = block.proj_out(fusions.activation_concat(attn_output, mlp_hidden_states, "gelu_tanh"))
    return halves(fusions.gated_residual(both, out, gate, clip=True), encoder_hidden_states.shape[1])


PATCHES = {
    "FluxTransformerBlock": Patch(norms_stay("norm2", "norm2_context"), double_block),
    "FluxSingleTransformerBlock": Patch(why_not_single_block, single_block),
    "FluxAttention": Patch(why_not_attention, attention),
    "GELU": GELU,
    "AdaLayerNormZero": adaln.ZERO,
    "AdaLayerNormZeroSingle": adaln.ZERO_SINGLE,
    "AdaLayerNormContinuous": adaln.CONTINUOUS,
}
