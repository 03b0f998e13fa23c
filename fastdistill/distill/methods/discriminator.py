"""The discriminator of adversarial methods: small heads on features that a diffusion transformer
has anyway."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastdistill.data.latents import LatentBatch
from fastdistill.diffusion.timesteps import Uniform
from fastdistill.distill.methods.denoiser import Denoiser
from fastdistill.distill.methods.losses import GanLoss, discriminator_loss, generator_loss
from fastdistill.errors import UserError
from fastdistill.models.blocks import block_ids
from fastdistill.models.families.family import BlockId, ReadsBlocks
from fastdistill.models.hooks import captured, skipped

HIDDEN = 128


class Head(nn.Module):
    """Logits (B, S, 1) of tokens (B, S, D), each token judged alone: norm, linear, SiLU, linear.

    Normalised, as the features of transformers grow with depth by orders of magnitude. The last
    layer starts at zero: no opinion.
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


class Heads(nn.Module):
    """One head per block: logits (B, heads * S) of the image tokens (B, S, D) that each of `heads`
    blocks returns.

    Where DMD2's head convolves a UNet's bottleneck down to one logit, a token's logit has, behind
    joint attention, seen the whole image.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = nn.ModuleList(Head(dim) for _ in range(heads))

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        return torch.cat([head(tokens) for head, tokens in zip(self.heads, features, strict=True)], dim=1).squeeze(-1)


class Discriminator:
    """Heads on the features of `body`, which are trained with it or alone (DMD2, arXiv 2405.14867,
    section 4.3).

    The body, a critic, denoises and classifies in one: its features know the prompt and the noise
    level. Real and generated samples are judged behind fresh noise at uniform times.

    Args:
        depths: relative depths of the blocks with a head, 0 the first, 1 the last.
        heads: by default new ones.

    Raises:
        UserError: the body's family does not say what its blocks return.
    """

    def __init__(self, body: Denoiser, depths: Sequence[float], loss: GanLoss, heads: nn.Module | None = None) -> None:
        if not isinstance(body.family, ReadsBlocks):
            raise UserError(
                "the discriminator reads blocks, and this family does not say what they return: set gan_weight to 0"
            )
        self.body, self.family, self.kind = body, body.family, loss
        self.blocks = blocks_at(body.network, self.family, depths)
        if heads is None:
            heads = Heads(inner_dim(body.network), len(self.blocks)).to(next(body.network.parameters()).device)
        self.heads = heads

    def loss(self, real: LatentBatch, generated: Tensor, scale: Tensor | None, rng: torch.Generator) -> Tensor:
        """Loss of heads and body on `real` data and `generated` samples (B, ...); the body is given
        `scale` (B,) as guidance."""
        of_generated = self.logits(generated, real.conditioning, scale, rng)
        return discriminator_loss(self.logits(real.latents, real.conditioning, scale, rng), of_generated, self.kind)

    def generator_loss(
        self, generated: Tensor, conditioning: Any, scale: Tensor | None, rng: torch.Generator
    ) -> Tensor:
        """Loss of the student that made `generated` (B, ...)."""
        return generator_loss(self.logits(generated, conditioning, scale, rng), self.kind)

    def logits(self, x_0: Tensor, conditioning: Any, scale: Tensor | None, rng: torch.Generator) -> Tensor:
        """Logits (B, heads * S) of `x_0` (B, ...) behind fresh noise."""
        x_t, t, _ = self.body.process.draw(x_0, Uniform(), rng)
        conditioning = self.body.with_guidance(conditioning, x_0, scale)
        logits: Tensor = self.heads(self.features(x_t, t, conditioning))
        return logits

    def features(self, x_t: Tensor, t: Tensor, conditioning: Any) -> list[Tensor]:
        """Image tokens (B, S, D) that each of the blocks with a head returns; later blocks are
        skipped."""
        network, family = self.body.network, self.family
        order = block_ids(network, family)
        later = order[1 + max(order.index(block) for block in self.blocks) :]
        with captured(network, family, self.blocks) as features, skipped(network, family, later):
            output = family.predict(network, x_t, t, conditioning)
        tokens = [features[block]["image"] for block in self.blocks]
        if any(hasattr(parameter, "full_tensor") for parameter in network.parameters()):
            # A sharded network fetches what is outside of its blocks for the backward pass when a
            # gradient, be it zero, reaches its output.
            tokens[-1] = tokens[-1] + 0 * output.sum()
        return tokens


def blocks_at(network: nn.Module, family: ReadsBlocks, depths: Sequence[float]) -> list[BlockId]:
    """Blocks at relative `depths` from 0, the first, to 1, the last."""
    blocks = block_ids(network, family)
    return [blocks[round(depth * (len(blocks) - 1))] for depth in depths]


def inner_dim(network: Any) -> int:
    """Width of the tokens of a diffusers transformer, by its config."""
    return int(network.config.num_attention_heads * network.config.attention_head_dim)
