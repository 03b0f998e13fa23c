"""Diffusers' adaptive layer norms, each as one fused operator."""

from __future__ import annotations

from typing import Any

from diffusers.models.normalization import AdaLayerNormContinuous, AdaLayerNormZero, AdaLayerNormZeroSingle
from torch import Tensor

from fastdistill.models.patches.blocks import why_norms_stay
from fastdistill.models.patches.fusions import Forward, Fusions


def zero(module: AdaLayerNormZero, fusions: Fusions) -> Forward:
    def forward(x: Tensor, timestep: Any = None, class_labels: Any = None, hidden_dtype: Any = None, emb: Any = None) -> Any:
        if reason := why_norms_stay(module.norm):
            return fusions.step_aside(module, reason, x, timestep, class_labels, hidden_dtype, emb)
        if module.emb is not None:
            emb = module.emb(timestep, class_labels, hidden_dtype=hidden_dtype)
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = module.linear(module.silu(emb)).chunk(6, dim=1)
        return fusions.modulate(x, scale, shift, module.norm.eps), gate, shift_mlp, scale_mlp, gate_mlp

    return forward


def zero_single(module: AdaLayerNormZeroSingle, fusions: Fusions) -> Forward:
    def forward(x: Tensor, emb: Any = None) -> Any:
        if reason := why_norms_stay(module.norm):
            return fusions.step_aside(module, reason, x, emb)
        shift, scale, gate = module.linear(module.silu(emb)).chunk(3, dim=1)
        return fusions.modulate(x, scale, shift, module.norm.eps), gate

    return forward


def continuous(module: AdaLayerNormContinuous, fusions: Fusions) -> Forward:
    def forward(x: Tensor, conditioning_embedding: Tensor) -> Tensor:
        if reason := why_norms_stay(module.norm):
            return fusions.step_aside(module, reason, x, conditioning_embedding)  # type: ignore[no-any-return]
        scale, shift = module.linear(module.silu(conditioning_embedding).to(x.dtype)).chunk(2, dim=1)
        return fusions.modulate(x, scale, shift, module.norm.eps)

    return forward
