"""FLUX.1-dev's geometry with random weights, its inputs, and its count of operations."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from diffusers.models.transformers.transformer_flux import FluxPosEmbed
from torch import Tensor

WIDTH = 3072


def positions(image: int) -> Tensor:
    """Position ids (image, 3) of the tokens of a square image: 0, row, column."""
    side = round(image**0.5)
    return torch.stack((torch.zeros(image), torch.arange(image) // side, torch.arange(image) % side), dim=1)


def tables(text: int, image: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Rotary tables of `text` tokens at the origin and a square image of `image` tokens."""
    ids = torch.cat((torch.zeros(text, 3), positions(image)))
    cos, sin = FluxPosEmbed(theta=10000, axes_dim=[16, 56, 56])(ids.to(device))
    return cos, sin


def block_inputs(text: int, image: int, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, dtype=dtype)

    return {
        "hidden_states": draw(1, image, WIDTH).requires_grad_(),
        "encoder_hidden_states": draw(1, text, WIDTH).requires_grad_(),
        "temb": draw(1, WIDTH),
        "image_rotary_emb": tables(text, image, device),
    }


def transformer(
    device: torch.device, dtype: torch.dtype, doubles: int, singles: int, **config: Any
) -> FluxTransformer2DModel:
    """FLUX.1-dev's transformer with random weights and any number of blocks; `config` replaces its
    own."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            model = FluxTransformer2DModel(
                num_layers=doubles, num_single_layers=singles, guidance_embeds=True, **config
            )
    finally:
        torch.set_default_dtype(before)
    return model


def inputs(model: FluxTransformer2DModel, text: int, image: int) -> dict[str, Any]:
    device, dtype, config = model.device, model.dtype, model.config
    return {
        "hidden_states": torch.randn(1, image, config.in_channels, device=device, dtype=dtype),
        "encoder_hidden_states": torch.randn(1, text, config.joint_attention_dim, device=device, dtype=dtype),
        "pooled_projections": torch.randn(1, config.pooled_projection_dim, device=device, dtype=dtype),
        "timestep": torch.full((1,), 0.5, device=device, dtype=dtype),
        "guidance": torch.full((1,), 3.5, device=device, dtype=dtype),
        "img_ids": positions(image).to(device),
        "txt_ids": torch.zeros(text, 3, device=device),
        "return_dict": False,
    }


def block_flops(tokens: int) -> int:
    """Operations of one forward pass of a block, double or single.

    The count has the matrix products on all tokens, and attention's two. A multiplication and an
    addition are two operations.
    """
    # q, k, v and out are 4 WIDTH^2 weights, the feed-forward 8 WIDTH^2.
    return 2 * tokens * 12 * WIDTH**2 + 4 * tokens**2 * WIDTH
