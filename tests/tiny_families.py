"""Random transformers of every family, of stock classes, small enough for a test, and what they
take."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    ChromaTransformer2DModel,
    Flux2Transformer2DModel,
    Flux3Transformer2DModel,
    FluxTransformer2DModel,
    PixArtTransformer2DModel,
    QwenImageTransformer2DModel,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    ZImageTransformer2DModel,
)


def seeded(make: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
    """A model whose parameters are all random, norms and biases too."""
    torch.manual_seed(0)
    model = make(*arguments, **keywords)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def run(model: Any, inputs: dict[str, Any], **keywords: Any) -> torch.Tensor:
    out = model(**inputs, **keywords, return_dict=False)[0]
    return torch.cat([sample.flatten() for sample in out]) if isinstance(out, list) else out


def times(batch: int) -> torch.Tensor:
    """Which are exact in 16 bits, and a thousand times as large, too; their embeddings would else
    be what differs most."""
    return torch.tensor([0.5, 0.25, 0.125])[:batch]


def tiny_flux2(doubles: int = 2, singles: int = 3) -> Flux2Transformer2DModel:
    return Flux2Transformer2DModel(
        in_channels=8,
        num_layers=doubles,
        num_single_layers=singles,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=12,
        timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
    )


def flux2_inputs(batch: int = 2) -> dict[str, Any]:
    image_ids, text_ids = torch.zeros(9, 4), torch.zeros(5, 4)
    image_ids[:, 1], image_ids[:, 2], text_ids[:, 3] = torch.arange(9) // 3, torch.arange(9) % 3, torch.arange(5)
    return {
        "hidden_states": torch.randn(batch, 9, 8),
        "encoder_hidden_states": torch.randn(batch, 5, 12),
        "timestep": times(batch),
        "guidance": 4 * times(batch),
        "img_ids": image_ids,
        "txt_ids": text_ids,
    }


def tiny_sd3(layers: int = 3, **config: Any) -> SD3Transformer2DModel:
    """A block with dual attention, one without, and the last one, which leaves the text where it
    is."""
    return SD3Transformer2DModel(
        **{
            "sample_size": 8,
            "num_layers": layers,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 12,
            "caption_projection_dim": 32,
            "pooled_projection_dim": 8,
            "in_channels": 4,
            "out_channels": 4,
            "pos_embed_max_size": 8,
            "dual_attention_layers": (0,),
            "qk_norm": "rms_norm",
            **config,
        }
    )


def sd3_inputs(batch: int = 2) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(batch, 4, 8, 8),
        "encoder_hidden_states": torch.randn(batch, 5, 12),
        "pooled_projections": torch.randn(batch, 8),
        "timestep": 1000 * times(batch),
    }


def tiny_qwen_image(layers: int = 3, **config: Any) -> QwenImageTransformer2DModel:
    return QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=layers,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=12,
        axes_dims_rope=(4, 6, 6),
        **config,
    )


def qwen_image_inputs(batch: int = 2) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(batch, 12, 16),
        "encoder_hidden_states": torch.randn(batch, 5, 12),
        "timestep": times(batch),
        "img_shapes": [[(1, 3, 4)]] * batch,
    }


def tiny_z_image(layers: int = 2, **config: Any) -> ZImageTransformer2DModel:
    return ZImageTransformer2DModel(
        in_channels=16,
        dim=32,
        n_layers=layers,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=12,
        axes_dims=[4, 6, 6],
        axes_lens=[80, 16, 16],
        **{"n_refiner_layers": 1, **config},
    )


def z_image_inputs(batch: int = 2) -> dict[str, Any]:
    """Images of two sizes, so that every sample has rotary tables of its own."""
    sizes = ((8, 12), (12, 8), (8, 8))
    return {
        "x": [torch.randn(16, 1, *sizes[i]) for i in range(batch)],
        "t": times(batch),
        "cap_feats": [torch.randn(5, 12) for _ in range(batch)],
    }


def omni_inputs(batch: int = 2) -> dict[str, Any]:
    """A clean image with its SigLIP features beside the one that is made, for a Z-Image with
    `siglip_feat_dim=8`."""
    return {
        "x": [[torch.randn(16, 1, 8, 8), torch.randn(16, 1, 8, 12)] for _ in range(batch)],
        "t": times(batch),
        "cap_feats": [[torch.randn(5, 12), torch.randn(7, 12), torch.randn(3, 12)] for _ in range(batch)],
        "siglip_feats": [[torch.randn(4, 4, 8), None] for _ in range(batch)],
        "image_noise_mask": [[0, 1]] * batch,
    }


def tiny_flux(doubles: int = 2, singles: int = 3) -> FluxTransformer2DModel:
    return FluxTransformer2DModel(
        in_channels=8,
        num_layers=doubles,
        num_single_layers=singles,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=12,
        pooled_projection_dim=8,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
    )


def flux_inputs(batch: int = 2) -> dict[str, Any]:
    inputs = flux2_inputs(batch)
    return (
        inputs
        | {name: inputs[name][:, 1:] for name in ("img_ids", "txt_ids")}
        | {"pooled_projections": torch.randn(batch, 8)}
    )


def tiny_flux3(layers: int = 2, singles: int = 3) -> Flux3Transformer2DModel:
    return Flux3Transformer2DModel(
        in_channels=8,
        cond_in_channels=6,
        num_layers=layers,
        num_single_layers=singles,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=12,
        timestep_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
    )


def flux3_inputs(batch: int = 2) -> dict[str, Any]:
    """With three reference tokens."""
    inputs = flux2_inputs(batch)
    del inputs["guidance"]
    return inputs | {"image_cond_hidden_states": torch.randn(batch, 3, 6), "image_cond_ids": torch.ones(3, 4)}


def tiny_chroma(doubles: int = 2, singles: int = 3) -> ChromaTransformer2DModel:
    return ChromaTransformer2DModel(
        in_channels=8,
        num_layers=doubles,
        num_single_layers=singles,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=12,
        axes_dims_rope=(4, 6, 6),
        approximator_num_channels=16,
        approximator_hidden_dim=24,
        approximator_layers=2,
    )


def chroma_inputs(batch: int = 2) -> dict[str, Any]:
    inputs = flux_inputs(batch)
    return {name: value for name, value in inputs.items() if name not in ("guidance", "pooled_projections")}


def tiny_sana(layers: int = 3) -> SanaTransformer2DModel:
    return SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=layers,
        num_attention_heads=2,
        attention_head_dim=16,
        num_cross_attention_heads=2,
        cross_attention_head_dim=16,
        cross_attention_dim=32,
        caption_channels=12,
        sample_size=8,
    )


def tiny_pixart(layers: int = 3) -> PixArtTransformer2DModel:
    return PixArtTransformer2DModel(
        num_layers=layers,
        num_attention_heads=2,
        attention_head_dim=16,
        cross_attention_dim=32,
        caption_channels=12,
        sample_size=8,
    )


def cross_attention_inputs(batch: int = 2) -> dict[str, Any]:
    """For Sana and PixArt."""
    return {
        "hidden_states": torch.randn(batch, 4, 8, 8),
        "encoder_hidden_states": torch.randn(batch, 5, 12),
        "timestep": 1000 * times(batch),
        "encoder_attention_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])[:batch],
    }


FUSED = {
    "flux": (tiny_flux, flux_inputs),
    "flux2": (tiny_flux2, flux2_inputs),
    "sd3": (tiny_sd3, sd3_inputs),
    "qwen_image": (tiny_qwen_image, qwen_image_inputs),
    "z_image": (tiny_z_image, z_image_inputs),
}
"""Model and inputs of each family that has a fused form."""
