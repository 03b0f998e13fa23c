"""Z-Image: query-key norms, rotation and gated residuals on fused operators. The formulas are diffusers' `transformer_z_image.py`.

Its blocks scale an RMS norm and do not shift it, for which there is no operator.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from fastdistill.models.patches.attention import heads_of, real_tables, self_attention, why_not
from fastdistill.models.patches.fusions import Forward, Fusions

PROCESSORS = ("ZSingleStreamAttnProcessor",)


def attention(attn: Any, fusions: Fusions) -> Forward:
    def forward(
        hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> Any:
        freqs = kwargs.get("freqs_cis")
        norms = [attn.norm_q, attn.norm_k]
        head_size = attn.inner_dim // attn.heads
        reason = why_not(attn, norms, head_size, None, hidden_states, PROCESSORS)
        if reason is None and (unknown := kwargs.keys() - {"freqs_cis"}):
            reason = f"it was called with {', '.join(sorted(unknown))}"
        if reason is None and freqs is not None and (freqs.dim() != 3 or freqs.shape[0] not in (1, hidden_states.shape[0])):
            reason = f"its rotary table is {tuple(freqs.shape)}"
        if reason is not None:
            return fusions.step_aside(attn, reason, hidden_states, encoder_hidden_states, attention_mask, **kwargs)

        if freqs is not None and freqs.shape[0] == 1:
            freqs = freqs[0]
        if attention_mask is not None and attention_mask.ndim == 2:
            attention_mask = attention_mask[:, None, None, :]
        heads = heads_of(attn, ("to_q", "to_k", "to_v"), None, hidden_states, head_size)
        tables = None if freqs is None else real_tables(freqs)
        out = attn.to_out[0](self_attention(fusions, attn, heads, norms, tables, attention_mask))
        return attn.to_out[1](out) if len(attn.to_out) > 1 else out

    return forward


def block(module: Any, fusions: Fusions) -> Forward:
    if not module.modulation:
        # No gates: nothing here is fused but the attention, which is patched itself.
        return partial(type(module).forward, module)

    def forward(
        x: Tensor,
        attn_mask: Tensor | None,
        freqs_cis: Tensor,
        adaln_input: Tensor | None = None,
        noise_mask: Tensor | None = None,
        adaln_noisy: Tensor | None = None,
        adaln_clean: Tensor | None = None,
    ) -> Any:
        if noise_mask is not None:
            return fusions.step_aside(
                module, "clean and noisy tokens have modulations of their own", x, attn_mask, freqs_cis, adaln_input, noise_mask,
                adaln_noisy, adaln_clean,
            )  # fmt: skip
        scale_msa, gate_msa, scale_mlp, gate_mlp = module.adaLN_modulation(adaln_input).unsqueeze(1).chunk(4, dim=2)
        attn_output = module.attention(module.attention_norm1(x) * (1 + scale_msa), attention_mask=attn_mask, freqs_cis=freqs_cis)
        x = fusions.gated_residual(x, module.attention_norm2(attn_output), gate_msa.tanh(), clip=False)
        ff_output = module.feed_forward(module.ffn_norm1(x) * (1 + scale_mlp))
        return fusions.gated_residual(x, module.ffn_norm2(ff_output), gate_mlp.tanh(), clip=False)

    return forward


PATCHES: dict[str, Callable[[Any, Fusions], Forward]] = {
    "ZImageTransformerBlock": block,
    "Attention": attention,
}
