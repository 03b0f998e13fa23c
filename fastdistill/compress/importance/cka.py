"""Likeness of what enters and leaves a block, up to rotation and scale: linear CKA (Kornblith et
al. 2019, equation 3)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastdistill.compress.importance.criterion import Material
from fastdistill.compress.importance.ledger import Ledger
from fastdistill.models.blocks import block_ids
from fastdistill.models.families.family import BlockId, Family
from fastdistill.models.hooks import captured, captured_inputs


@dataclass
class Grams:
    """Sums over tokens of x x^T, x z^T, z z^T, x and z, where x (T, D) enters and x + z leaves: all
    that CKA needs, in any chunks.

    The change z and not what leaves: 1 - CKA of a block that does little is a difference of nearly
    equal numbers otherwise.
    """

    xx: Tensor
    xz: Tensor
    zz: Tensor
    x: Tensor
    z: Tensor
    tokens: int

    @classmethod
    def of(cls, x: Tensor, z: Tensor) -> Grams:
        return cls(x.mT @ x, x.mT @ z, z.mT @ z, x.sum(dim=0), z.sum(dim=0), len(x))

    def add(self, other: Grams) -> None:
        self.tokens += other.tokens
        for name in ("xx", "xz", "zz", "x", "z"):
            getattr(self, name).add_(getattr(other, name))


def distance(grams: Grams) -> float:
    """`1 - CKA(X, Y) = 1 - <K, L> / (|K| |L|)`, K = X X^T and L = Y Y^T of the centred tokens, Y =
    X + Z; 0 of a block that adds nothing.

    With M = L - K = X Z^T + Z X^T + Z Z^T it is `(|M|^2 - (|L| - |K|)^2) / (2 |K| |L|)`, where
    every term is a trace of Gram matrices and vanishes with Z.
    """
    x, z = grams.x.double(), grams.z.double()
    a = grams.xx.double() - torch.outer(x, x) / grams.tokens
    b = grams.xz.double() - torch.outer(x, z) / grams.tokens
    c = grams.zz.double() - torch.outer(z, z) / grams.tokens

    def trace(left: Tensor, right: Tensor) -> float:
        return float((left * right.mT).sum())

    squared_m = 2 * trace(a, c) + 2 * trace(b, b) + 4 * trace(b, c) + trace(c, c)
    norm_k = math.sqrt(trace(a, a))
    k_dot_m = 2 * trace(a, b) + trace(b, b.mT)
    norm_l = math.sqrt(max(0.0, norm_k**2 + 2 * k_dot_m + squared_m))
    if not norm_k * norm_l:
        # A constant is unlike anything but another constant.
        return float(norm_k != norm_l)
    difference = (2 * k_dot_m + squared_m) / (norm_k + norm_l)
    return max(0.0, (squared_m - difference**2) / (2 * norm_k * norm_l))


@torch.no_grad()
def score(network: nn.Module, family: Family, material: Material, ledger: Ledger) -> dict[BlockId, float]:
    """`1 - CKA(H_in, H_out)` over the image tokens of all points.

    Costs one pass over the points, and three (D, D) matrices a block in float32: 6 GB for FLUX.1.
    They are not kept in the ledger; a scoring that is killed begins again.
    """
    blocks = block_ids(network, family)
    chunks = list(material.points.chunks(material.batch))
    ledger.expect(1)
    if "all" not in ledger:
        grams: dict[BlockId, Grams] = {}
        shifts: dict[BlockId, Tensor] = {}
        for part in chunks:
            with captured_inputs(network, family, blocks) as before, captured(network, family, blocks) as after:
                family.predict(network, part.x_t, part.t, part.conditioning)
            for block_id in blocks:
                x = before[block_id]["image"].flatten(0, 1).float()
                z = after[block_id]["image"].flatten(0, 1).float() - x
                # CKA does not see a shift, and float32 does: some channels of FLUX are a hundred
                # times their spread from zero.
                x = x - shifts.setdefault(block_id, x.mean(dim=0))
                found = Grams.of(x, z)
                if block_id in grams:
                    grams[block_id].add(found)
                else:
                    grams[block_id] = found
        ledger.keep("all", [distance(grams[block_id]) for block_id in blocks])
    return dict(zip(blocks, ledger["all"], strict=True))
