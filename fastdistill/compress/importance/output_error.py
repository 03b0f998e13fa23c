"""One block out: how far does the network's output move? (LAPTOP-Diff, arXiv 2404.11098, section
3.2)

The times are weighted: an error in an early step is carried through all later ones, so that it
counts more (Amber-Image weights high noise, OBS-Diff, its time-aware Hessian, from 1.2 in the first
step to 0.8 in the last, decreasing as a logarithm).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from fastdistill.compress.importance.criterion import CalibrationPoints, Material
from fastdistill.compress.importance.ledger import Ledger
from fastdistill.models.blocks import block_ids
from fastdistill.models.families.family import BlockId, Family
from fastdistill.models.hooks import one_out, skipped


def time_weight(t: Tensor) -> Tensor:
    """`1.2 - 0.4 ln(1 + (e - 1) (1 - t))`: 1.2 at noise, 0.8 at data.

    Range and form are OBS-Diff's, over the time instead of the step.
    """
    return 1.2 - 0.4 * torch.log1p((math.e - 1) * (1 - t.double()))


def weighted_square(difference: Tensor, t: Tensor) -> float:
    """Sum over samples of `w(t) ||difference||^2`."""
    return float((time_weight(t) * difference.double().square().flatten(1).sum(dim=1)).sum())


@torch.no_grad()
def predictions(network: nn.Module, family: Family, points: CalibrationPoints, batch: int) -> Tensor:
    """Velocity of the network at every point, (N, C, H, W)."""
    return torch.cat(
        [family.predict(network, part.x_t, part.t, part.conditioning).float() for part in points.chunks(batch)]
    )


class OutputError:
    """Distance of other networks, and of a network without some of its blocks, from what the whole
    network predicts.

    It is `sum w(t) ||v' - v||^2 / sum w(t) ||v||^2` over the points, with `w` of `time_weight`.

    Attributes:
        reference: velocities `v` of the whole network, (N, C, H, W).
    """

    def __init__(self, network: nn.Module, family: Family, points: CalibrationPoints, batch: int) -> None:
        self.network, self.family, self.points, self.batch = network, family, points, batch
        self.reference = predictions(network, family, points, batch)
        self.norm = weighted_square(self.reference, points.t)

    def of(self, network: nn.Module) -> float:
        """Error of another network, which stands for this one."""
        difference = predictions(network, self.family, self.points, self.batch) - self.reference
        return weighted_square(difference, self.points.t) / self.norm

    def without(self, dropped: Iterable[BlockId]) -> float:
        """Error of the network with all of `dropped` skipped at once."""
        with skipped(self.network, self.family, dropped):
            return self.of(self.network)

    @torch.no_grad()
    def without_each(self, blocks: Sequence[BlockId], ledger: Ledger, prefix: str = "") -> dict[BlockId, float]:
        """Error of the network without each of `blocks` alone, on top of what is skipped already.

        A piece of the ledger is one block on one chunk. A scoring that is continued pays one
        forward pass for the streams of its chunk.
        """
        totals = dict.fromkeys(blocks, 0.0)
        parts = zip(self.points.chunks(self.batch), self.reference.split(self.batch), strict=True)
        for chunk, (part, velocity) in enumerate(parts):
            names = [f"{prefix}{chunk} {block_id.stack} {block_id.index}" for block_id in blocks]
            # Pieces are kept in order: what is missing is missing to the end.
            first = sum(name in ledger for name in names)

            def predict(part: CalibrationPoints = part) -> Tensor:
                return self.family.predict(self.network, part.x_t, part.t, part.conditioning).float()

            for name, without in zip(
                names[first:], one_out(self.network, self.family, blocks, predict, first), strict=True
            ):
                ledger.keep(name, weighted_square(without - velocity, part.t))
            for block_id, name in zip(blocks, names, strict=True):
                totals[block_id] += ledger[name]
        return {block_id: total / self.norm for block_id, total in totals.items()}


def score(network: nn.Module, family: Family, material: Material, ledger: Ledger) -> dict[BlockId, float]:
    """Relative output error of leaving out each block alone.

    n blocks cost n / 2 + 3 / 2 passes over the points, for the prefix is shared (`one_out`).
    """
    blocks = block_ids(network, family)
    ledger.expect(len(blocks) * -(-len(material.points) // material.batch))
    return OutputError(network, family, material.points, material.batch).without_each(blocks, ledger)
