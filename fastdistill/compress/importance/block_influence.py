"""Block influence: how much does a block turn what flows through it? (ShortGPT, Men et al. 2024, equation 1)"""

from __future__ import annotations

import torch
from torch import nn

from fastdistill.compress.importance.criterion import CalibrationPoints, Tick
from fastdistill.models.family import BlockId, Family
from fastdistill.models.features import block_ids, captured, captured_inputs
from fastdistill.ops import block_statistics


@torch.no_grad()
def score(network: nn.Module, family: Family, points: CalibrationPoints, batch: int, tick: Tick) -> dict[BlockId, float]:
    """``BI = 1 - E[cos(h_in, h_out)]`` over the image tokens of all points. Costs one pass over the points."""
    blocks = block_ids(network, family)
    cosine = dict.fromkeys(blocks, 0.0)
    samples = 0
    with captured_inputs(network, family, blocks) as before, captured(network, family, blocks) as after:
        for part in points.chunks(batch):
            family.predict(network, part.x_t, part.t, part.conditioning)
            for block_id in blocks:
                statistics = block_statistics(before[block_id]["image"], after[block_id]["image"])
                cosine[block_id] += float(statistics.cosine.double().sum())
            samples += len(part.x_t)
    for _ in blocks:
        tick()
    return {block_id: 1 - total / samples for block_id, total in cosine.items()}
