"""FLUX.1-dev's geometry with random weights, its inputs, and the arithmetic that it takes."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from diffusers.models.transformers.transformer_flux import FluxPosEmbed
from torch import Tensor

WIDTH = 3072
DOUBLES, SINGLES = 19, 38


def tables(text: int, image: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Rotary tables of `text` tokens at the origin and a square picture of `image` tokens."""
    side = round(image**0.5)
    ids = torch.zeros(text + image, 3)
    ids[text:, 1], ids[text:, 2] = torch.arange(image) // side, torch.arange(image) % side
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


def transformer(device: torch.device, dtype: torch.dtype, doubles: int = DOUBLES, singles: int = SINGLES) -> FluxTransformer2DModel:
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            model = FluxTransformer2DModel(num_layers=doubles, num_single_layers=singles, guidance_embeds=True)
    finally:
        torch.set_default_dtype(before)
    return model


def inputs(text: int, image: int, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    side = round(image**0.5)
    ids = torch.zeros(image, 3, device=device)
    ids[:, 1], ids[:, 2] = torch.arange(image, device=device) // side, torch.arange(image, device=device) % side
    return {
        "hidden_states": torch.randn(1, image, 64, device=device, dtype=dtype),
        "encoder_hidden_states": torch.randn(1, text, 4096, device=device, dtype=dtype),
        "pooled_projections": torch.randn(1, 768, device=device, dtype=dtype),
        "timestep": torch.full((1,), 0.5, device=device, dtype=dtype),
        "guidance": torch.full((1,), 3.5, device=device, dtype=dtype),
        "img_ids": ids,
        "txt_ids": torch.zeros(text, 3, device=device),
        "return_dict": False,
    }


def block_flops(tokens: int) -> int:
    """Of one forward of one block, double or single: its matrix products on all tokens, and attention's two. A multiplication and an
    addition are two."""
    # q, k, v and out are 4 WIDTH^2 weights, the feed-forward 8 WIDTH^2.
    return 2 * tokens * 12 * WIDTH**2 + 4 * tokens**2 * WIDTH
