"""One block out: how far does the network's output move? (LAPTOP-Diff, arXiv 2404.11098, section 3.2)"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from fastdistill.compress.importance.criterion import CalibrationPoints, Tick
from fastdistill.models.family import BlockId, Family
from fastdistill.models.features import block_ids, skipped


@torch.no_grad()
def predictions(network: nn.Module, family: Family, points: CalibrationPoints, batch: int) -> Tensor:
    """The network's velocity at every point, (N, C, H, W)."""
    return torch.cat([family.predict(network, part.x_t, part.t, part.conditioning).float() for part in points.chunks(batch)])


def relative_error(predicted: Tensor, reference: Tensor) -> float:
    """``||predicted - reference||^2 / ||reference||^2`` over all points."""
    return float((predicted.double() - reference.double()).square().sum() / reference.double().square().sum())


def joint_output_error(
    network: nn.Module, family: Family, points: CalibrationPoints, batch: int, dropped: Iterable[BlockId], reference: Tensor
) -> float:
    """The relative output error with all of ``dropped`` skipped at once; ``reference`` is the whole network's prediction."""
    with skipped(network, family, dropped):
        return relative_error(predictions(network, family, points, batch), reference)


def score(network: nn.Module, family: Family, points: CalibrationPoints, batch: int, tick: Tick) -> dict[BlockId, float]:
    """The relative output error of leaving out each block alone. Costs one pass over the points per block, and one more."""
    reference = predictions(network, family, points, batch)
    scores = {}
    for block_id in block_ids(network, family):
        scores[block_id] = joint_output_error(network, family, points, batch, [block_id], reference)
        tick()
    return scores
