"""The discriminator of DMD2: small heads on features that a diffusion transformer has anyway."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastdistill.models.blocks import block_ids
from fastdistill.models.families.family import BlockId, Family
from fastdistill.models.hooks import captured, skipped

HIDDEN = 128


class Head(nn.Module):
    """Logits (B, S, 1) of tokens (B, S, D), each token judged alone: norm, linear, SiLU, linear.

    Normalised, as the features of transformers grow with depth by orders of magnitude. The last layer starts at zero: no opinion.
    """

    def __init__(self, dim: int, hidden: int = HIDDEN) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.into, self.out = nn.Linear(dim, hidden), nn.Linear(hidden, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.out(nn.functional.silu(self.into(self.norm(tokens))))
        return logits


class Discriminator(nn.Module):
    """One head per block: logits (B, heads * S) of the image tokens (B, S, D) that each of ``heads`` blocks returns.

    The features are the critic's, whose classifier and denoiser share a body (DMD2, arXiv 2405.14867, section 4.3), and know the
    prompt and the noise level. Where the paper's head convolves a UNet's bottleneck down to one logit, a token's logit has, behind
    joint attention, seen the whole image.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = nn.ModuleList(Head(dim) for _ in range(heads))

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        return torch.cat([head(tokens) for head, tokens in zip(self.heads, features, strict=True)], dim=1).squeeze(-1)


def blocks_at(network: nn.Module, family: Family, depths: Sequence[float]) -> list[BlockId]:
    """The blocks at relative ``depths`` from 0, the first, to 1, the last."""
    blocks = block_ids(network, family)
    return [blocks[round(depth * (len(blocks) - 1))] for depth in depths]


def inner_dim(network: Any) -> int:
    """The width of the tokens of a diffusers transformer, by its config."""
    return int(network.config.num_attention_heads * network.config.attention_head_dim)


def image_features(
    network: nn.Module, family: Family, blocks: Sequence[BlockId], x_t: Tensor, t: Tensor, conditioning: Any
) -> list[Tensor]:
    """The image tokens (B, S, D) that each of ``blocks`` returns in a forward pass, in which those behind them all do nothing."""
    order = block_ids(network, family)
    behind = order[1 + max(order.index(block) for block in blocks) :]
    with captured(network, family, blocks) as features, skipped(network, family, behind):
        output = family.predict(network, x_t, t, conditioning)
    tokens = [features[block]["image"] for block in blocks]
    if any(hasattr(parameter, "full_tensor") for parameter in network.parameters()):
        # A sharded network fetches what is outside of its blocks for the backward pass when a gradient, be it zero, reaches its output.
        tokens[-1] = tokens[-1] + 0 * output.sum()
    return tokens
