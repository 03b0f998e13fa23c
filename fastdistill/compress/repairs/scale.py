"""A factor and an offset for each channel of the last linear layer: the diagonal special case of
`.ridge`, at no cost in memory."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdistill.compress.repairs.damage import Damage
from fastdistill.compress.repairs.rows import Rows, linears, watch


@torch.no_grad()
def repair(damage: Damage) -> None:
    """`W <- (1 + a) W, b <- (1 + a) b + c` with `a, c = argmin sum (g (a u + c) - r)^2`, `u = W z +
    b`, for each channel alone.

    Two unknowns a channel: the normal equations are solved as they are.
    """
    spans = damage.spans()
    for index, span in enumerate(spans):
        layers = linears(damage, span)
        sums: list[Tensor] = [
            torch.zeros(5, layer.out_features, dtype=torch.float64, device=layer.weight.device) for layer in layers
        ]
        for chunk in watch(damage, span):
            for layer, rows, total in zip(layers, chunk, sums, strict=True):
                total += _products(rows, torch.nn.functional.linear(rows.z, layer.weight.float(), layer.bias.float()))
        for layer, (guu, gu, gg, gur, gr) in zip(layers, sums, strict=True):
            determinant = guu * gg - gu.square()
            # A gate that stays shut, or a channel that never moves, has nothing to scale.
            solvable = determinant > 1e-9 * guu * gg
            factor = torch.where(solvable, (gg * gur - gu * gr) / determinant, 0.0)
            offset = torch.where(solvable, (guu * gr - gu * gur) / determinant, 0.0)
            layer.weight.mul_(1 + factor[:, None])
            layer.bias.mul_(1 + factor).add_(offset)
        damage.tick((index + 1) / len(spans))


def _products(rows: Rows, u: Tensor) -> Tensor:
    """Sums over samples and tokens of `g^2 u^2, g^2 u, g^2, g u r, g r`, (5, D)."""
    assert rows.missing is not None
    g = rows.gate[:, None].expand_as(u)
    terms = (g.square() * u.square(), g.square() * u, g.square(), g * u * rows.missing, g * rows.missing)
    return torch.stack([term.sum(dim=(0, 1), dtype=torch.float64) for term in terms])
