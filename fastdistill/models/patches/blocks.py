"""Parts of a block that several families share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fastdistill.models.patches.contract import NOTHING_TO_GAIN, Patch
from fastdistill.models.patches.fusions import Fusions


def residuals(
    fusions: Fusions,
    x: Tensor,
    attn_output: Tensor,
    modulation: Sequence[Tensor],
    eps: float,
    feed_forward: Any,
    *,
    clip: bool,
) -> Tensor:
    """Both gated residuals of a double block's stream, with modulated norm and feed-forward
    between.

    `modulation` is the gate of attention, then shift, scale and gate of the feed-forward.
    """
    gate, shift_mlp, scale_mlp, gate_mlp = modulation
    x, normed = fusions.gated_residual_modulate(x, attn_output, gate, scale_mlp, shift_mlp, eps)
    return fusions.gated_residual(x, feed_forward(normed), gate_mlp, clip=clip)


def _why_not_gelu(module: Any, /, hidden_states: Tensor) -> str | None:
    # A GPU's own GELU is as fast as its memory.
    return None if module.approximate == "tanh" and hidden_states.device.type == "cpu" else NOTHING_TO_GAIN


def _gelu(module: Any, fusions: Fusions, /, hidden_states: Tensor) -> Tensor:
    """First half of a feed-forward."""
    return fusions.activation_concat(None, module.proj(hidden_states), "gelu_tanh")


GELU = Patch(_why_not_gelu, _gelu)
