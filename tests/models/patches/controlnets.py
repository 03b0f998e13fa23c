"""ControlNets that are made of the blocks of transformers, small enough for a test, and what they
take."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    FluxControlNetModel,
    FluxMultiControlNetModel,
    QwenImageControlNetModel,
    SD3ControlNetModel,
    ZImageControlNetModel,
)
from torch import Tensor

from tests.tiny_families import (
    flux_inputs,
    qwen_image_inputs,
    sd3_inputs,
    seeded,
    tiny_z_image,
    z_image_inputs,
)


def flux_controlnet() -> FluxControlNetModel:
    return FluxControlNetModel(
        in_channels=8,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=12,
        pooled_projection_dim=8,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
    )


def sd3_controlnet(**config: Any) -> SD3ControlNetModel:
    return SD3ControlNetModel(
        **{
            "sample_size": 8,
            "num_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 12,
            "caption_projection_dim": 32,
            "pooled_projection_dim": 8,
            "in_channels": 4,
            "pos_embed_max_size": 8,
            "dual_attention_layers": (0,),
            "qk_norm": "rms_norm",
            **config,
        }
    )


def sd3_controlnet_of_images() -> SD3ControlNetModel:
    """Variant without text, of single blocks."""
    return sd3_controlnet(joint_attention_dim=None)


def qwen_image_controlnet() -> QwenImageControlNetModel:
    return QwenImageControlNetModel(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=12,
        axes_dims_rope=(4, 6, 6),
    )


def z_image_controlnet() -> ZImageControlNetModel:
    """With its transformer's embedders and refiners, which it borrows."""
    controlnet = ZImageControlNetModel(
        control_layers_places=[0, 1],
        control_refiner_layers_places=[0, 1],
        control_in_dim=16,
        add_control_noise_refiner="control_noise_refiner",
        dim=32,
        n_heads=2,
        n_kv_heads=2,
    )
    return ZImageControlNetModel.from_transformer(controlnet, tiny_z_image(n_refiner_layers=2))


def without_text(inputs: dict[str, Any]) -> dict[str, Any]:
    return inputs | {"encoder_hidden_states": None}


def conditioned(inputs: dict[str, Any]) -> dict[str, Any]:
    return inputs | {"controlnet_cond": torch.randn_like(inputs["hidden_states"])}


def z_conditioned(inputs: dict[str, Any]) -> dict[str, Any]:
    return inputs | {"control_context": [torch.randn_like(x) for x in inputs["x"]]}


CONTROLNETS: dict[str, tuple[Callable[[], Any], Callable[[], dict[str, Any]]]] = {
    "flux": (flux_controlnet, lambda: conditioned(flux_inputs())),
    "sd3": (sd3_controlnet, lambda: conditioned(sd3_inputs())),
    "sd3-images": (sd3_controlnet_of_images, lambda: without_text(conditioned(sd3_inputs()))),
    "qwen_image": (qwen_image_controlnet, lambda: conditioned(qwen_image_inputs())),
    "z_image": (z_image_controlnet, lambda: z_conditioned(z_image_inputs())),
}


def several_flux() -> FluxMultiControlNetModel:
    return FluxMultiControlNetModel([seeded(flux_controlnet), seeded(flux_controlnet)])


def residuals(controlnet: Any, inputs: dict[str, Any]) -> Tensor:
    """All that a ControlNet gives to the transformer, in one vector."""
    out = controlnet(**inputs) if isinstance(controlnet, ZImageControlNetModel) else controlnet(
        **inputs, return_dict=False
    )  # fmt: skip
    return torch.cat([t.flatten() for t in tensors(out)])


def tensors(out: Any) -> list[Tensor]:
    if isinstance(out, Tensor):
        return [out]
    parts = out.values() if isinstance(out, dict) else out or ()
    return [tensor for part in parts for tensor in tensors(part)]
