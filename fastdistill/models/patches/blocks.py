"""What the double blocks of several families have in common."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fastdistill.models.patches.fusions import Forward, Fusions, hooked, plain_layer_norm


def why_norms_stay(*norms: Any) -> str | None:
    """Why a block has to call these layer norms, where an operator would norm and modulate in their place, or None."""
    if all(plain_layer_norm(norm) for norm in norms) and not hooked(*norms):
        return None
    return "a norm is hooked or has an affine"


def residuals(
    fusions: Fusions, x: Tensor, attn_output: Tensor, modulation: Sequence[Tensor], eps: float, feed_forward: Any, *, clip: bool
) -> Tensor:
    """Both gated residuals of a double block's stream, with the modulated norm and the feed-forward between them. `modulation` is the gate
    of attention, then shift, scale and gate of the feed-forward."""
    gate, shift_mlp, scale_mlp, gate_mlp = modulation
    x, normed = fusions.gated_residual_modulate(x, attn_output, gate, scale_mlp, shift_mlp, eps)
    return fusions.gated_residual(x, feed_forward(normed), gate_mlp, clip=clip)


def gelu(module: Any, fusions: Fusions) -> Forward:
    """The feed-forward's first half. Only on CPUs: a GPU's own GELU is as fast as its memory."""

    def forward(hidden_states: Tensor) -> Tensor:
        if module.approximate != "tanh" or hidden_states.device.type != "cpu":
            return type(module).forward(module, hidden_states)  # type: ignore[no-any-return]
        return fusions.activation_concat(None, module.proj(hidden_states), "gelu_tanh")

    return forward
