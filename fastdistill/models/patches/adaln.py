"""Adaptive layer norms of diffusers, each as one fused operator."""

from __future__ import annotations

from typing import Any

from diffusers.models.normalization import AdaLayerNormContinuous, AdaLayerNormZero, AdaLayerNormZeroSingle
from torch import Tensor

from fastdistill.models.patches.contract import Patch
from fastdistill.models.patches.fusions import Fusions
from fastdistill.models.patches.reasons import norms_stay


def _zero(
    module: AdaLayerNormZero,
    fusions: Fusions,
    /,
    x: Tensor,
    timestep: Any = None,
    class_labels: Any = None,
    hidden_dtype: Any = None,
    emb: Any = None,
) -> tuple[Tensor, ...]:
    if module.emb is not None:
        emb = module.emb(timestep, class_labels, hidden_dtype=hidden_dtype)
    shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = module.linear(module.silu(emb)).chunk(6, dim=1)
    return fusions.modulate(x, scale, shift, module.norm.eps), gate, shift_mlp, scale_mlp, gate_mlp


def _zero_single(
    module: AdaLayerNormZeroSingle, fusions: Fusions, /, x: Tensor, emb: Any = None
) -> tuple[Tensor, Tensor]:
    shift, scale, gate = module.linear(module.silu(emb)).chunk(3, dim=1)
    return fusions.modulate(x, scale, shift, module.norm.eps), gate


def _continuous(
    module: AdaLayerNormContinuous, fusions: Fusions, /, x: Tensor, conditioning_embedding: Tensor
) -> Tensor:
    scale, shift = module.linear(module.silu(conditioning_embedding).to(x.dtype)).chunk(2, dim=1)
    return fusions.modulate(x, scale, shift, module.norm.eps)


ZERO = Patch(norms_stay("norm"), _zero)
ZERO_SINGLE = Patch(norms_stay("norm"), _zero_single)
CONTINUOUS = Patch(norms_stay("norm"), _continuous)

# Patches of what stands before and after the blocks of a model, whatever its family.
AROUND_BLOCKS = {"AdaLayerNormContinuous": CONTINUOUS}
