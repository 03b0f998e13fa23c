"""First order: how fast does the output move when a block is faded out?

Every block gets a gate m, h_out = h_in + m (B(h_in) - h_in), which is 1 in the model and 0 where
the block is cut (the mask of TinyFusion, Fang et al. 2025). To first order v(m = 0) - v(1) =
-dv/dm, so that ||dv/dm||^2 estimates what `output` measures.

The gate and not |g theta| summed over the weights (Molchanov et al. 2017): that grows with the
number of weights, 2.4 times as many in a double block of FLUX as in a single one at the same work,
and needs a gradient for each of 12 billion. And the output, not a loss: at the model's own
predictions the gradient of a distillation loss is zero.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastdistill.compress.importance.criterion import CalibrationPoints, Material, sums_over_chunks
from fastdistill.compress.importance.ledger import Ledger
from fastdistill.models.blocks import block, block_ids
from fastdistill.models.families.family import BlockId, Family
from fastdistill.models.hooks import replaced

PROBES = 4


def gated(module: nn.Module, pass_through: Callable[..., Any], gate: Tensor) -> Callable[..., Any]:
    """The module's forward, whose output is what came in where `gate` (B,) is 0, and as ever where
    it is 1."""
    own = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        # Recomputed in the backward pass: a large model's activations would not fit, and its block
        # inputs do.
        out = checkpoint(own, *args, use_reentrant=False, **kwargs)
        h_in, h_out = pass_through(*args, **kwargs), out
        if isinstance(h_out, Tensor):
            return faded(h_in, h_out, gate)
        return tuple(faded(before, after, gate) for before, after in zip(h_in, h_out, strict=True))

    return forward


def faded(before: Tensor, after: Tensor, gate: Tensor) -> Tensor:
    # Written so that a gate of 1 changes no bit; in float32, as the block may add little.
    added = after.float() - before.float()
    return (after.float() + (gate - 1).view(-1, *[1] * (added.dim() - 1)) * added).to(after.dtype)


def score(network: nn.Module, family: Family, material: Material, ledger: Ledger) -> dict[BlockId, float]:
    """`sum over points of ||dv/dm||^2 / sum of ||v||^2`, by Hutchinson's estimate `E_r (r .
    dv/dm)^2` with r ~ N(0, I).

    One backward pass gives all blocks, so that 4 draws of r cost about 9 passes over the points,
    however many blocks there are. The parameters get no gradient. The draws belong to the points
    and do not depend on the batch.
    """
    blocks = block_ids(network, family)
    device = material.points.x_t.device

    def directions(start: int, shape: torch.Size) -> Tensor:
        """(PROBES, B, C, H, W)."""
        rngs = (torch.Generator().manual_seed(material.seed * 1_000_003 + start + row) for row in range(shape[0]))
        return torch.stack([torch.randn(PROBES, *shape[1:], generator=rng) for rng in rngs], dim=1)

    def slopes(part: CalibrationPoints, start: int) -> list[list[float]]:
        gates = [torch.ones(len(part), device=device, requires_grad=True) for _ in blocks]
        with torch.enable_grad(), ExitStack() as stack:
            for block_id, gate in zip(blocks, gates, strict=True):
                module = block(network, block_id)
                stack.enter_context(replaced(module, gated(module, family.stack(block_id.stack).pass_through, gate)))
            velocity = family.predict(network, part.x_t, part.t, part.conditioning)
            squares = torch.zeros(len(blocks), dtype=torch.float64, device=device)
            for direction in directions(start, velocity.shape).to(velocity):
                gradients = torch.autograd.grad(velocity, gates, direction, retain_graph=True)
                squares += torch.stack([gradient.double().square().sum() for gradient in gradients]) / PROBES
        norm = float(velocity.detach().double().square().sum())
        return [[square, norm] for square in squares.tolist()]

    slope, norm = sums_over_chunks(material, ledger, slopes).unbind(dim=1)
    return dict(zip(blocks, (slope / norm).tolist(), strict=True))
