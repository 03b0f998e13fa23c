"""Block influence: how much does a block turn what flows through it? (ShortGPT, Men et al. 2024,
equation 1)"""

from __future__ import annotations

import torch
from torch import nn

from fastdistill.compress.importance.criterion import CalibrationPoints, Material, sums_over_chunks
from fastdistill.compress.importance.ledger import Ledger
from fastdistill.models.blocks import block_ids
from fastdistill.models.families.family import BlockId, Family
from fastdistill.models.hooks import captured, captured_inputs
from fastdistill.ops import block_statistics


@torch.no_grad()
def score(network: nn.Module, family: Family, material: Material, ledger: Ledger) -> dict[BlockId, float]:
    """`BI = 1 - E[cos(h_in, h_out)]` over the image tokens of all points. Costs one pass over the
    points."""
    blocks = block_ids(network, family)

    def turned(part: CalibrationPoints, _start: int) -> list[list[float]]:
        with captured_inputs(network, family, blocks) as before, captured(network, family, blocks) as after:
            family.predict(network, part.x_t, part.t, part.conditioning)
        cosines = (block_statistics(before[block_id]["image"], after[block_id]["image"]).cosine for block_id in blocks)
        return [[float((1 - cosine.double()).sum())] for cosine in cosines]

    totals = sums_over_chunks(material, ledger, turned)[:, 0] / len(material.points)
    return dict(zip(blocks, totals.tolist(), strict=True))
