"""The contract of a pruning criterion: a function from a network and calibration to one score per
block; the lowest goes first."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastdistill.compress.importance.ledger import Ledger
from fastdistill.models.families.family import BlockId, Conditioning, Family


@dataclass(frozen=True, kw_only=True)
class CalibrationPoints:
    """Points (x_t, t, conditioning) on the teacher's own trajectories: (N, C, H, W), (N,), N rows."""

    x_t: Tensor
    t: Tensor
    conditioning: Conditioning

    def __len__(self) -> int:
        return self.x_t.shape[0]

    def chunks(self, size: int) -> Iterator[CalibrationPoints]:
        for start in range(0, len(self), size):
            part = slice(start, start + size)
            yield CalibrationPoints(x_t=self.x_t[part], t=self.t[part], conditioning=self.conditioning[part])


@dataclass(frozen=True, kw_only=True)
class SamplingRuns:
    """Starts and times of the teacher's trajectories: noise (N, C, H, W), N rows of conditioning,
    falling times (K + 1,).

    With guidance, `unconditional` is one row, of the empty prompt, and the velocity is `u +
    true_cfg_scale (c - u)`.
    """

    noise: Tensor
    times: Tensor
    conditioning: Conditioning
    unconditional: Conditioning | None = None
    true_cfg_scale: float = 1.0

    def __len__(self) -> int:
        return self.noise.shape[0]

    @property
    def passes(self) -> int:
        """Forward passes of the network for one run."""
        return (len(self.times) - 1) * (2 if self.true_cfg_scale > 1 else 1)

    def __getitem__(self, rows: slice) -> SamplingRuns:
        return SamplingRuns(
            noise=self.noise[rows],
            times=self.times,
            conditioning=self.conditioning[rows],
            unconditional=self.unconditional,
            true_cfg_scale=self.true_cfg_scale,
        )


@dataclass(frozen=True, kw_only=True)
class Material:
    """Data for a criterion; each takes what it needs."""

    points: CalibrationPoints
    runs: SamplingRuns
    batch: int
    """Samples per forward pass."""
    seed: int = 0
    drops: int | None = None
    """Number of blocks that are going to be dropped, where that is known: a search need not look
    further."""


Criterion = Callable[[nn.Module, Family, Material, Ledger], dict[BlockId, float]]
"""`(network, family, material, ledger) -> score of each block`, in the order of the forward pass.

The same seed gives the same scores, and so does a ledger that holds any number of the first pieces.
"""


def sums_over_chunks(
    material: Material, ledger: Ledger, measure: Callable[[CalibrationPoints, int], Sequence[Sequence[float]]]
) -> Tensor:
    """`measure(chunk, index of its first point)` summed over all chunks of the points, float64. A
    chunk is a piece of the ledger."""
    chunks = list(material.points.chunks(material.batch))
    ledger.expect(len(chunks))
    for index, part in enumerate(chunks):
        if str(index) not in ledger:
            ledger.keep(str(index), measure(part, index * material.batch))
    return torch.tensor([ledger[str(index)] for index in range(len(chunks))], dtype=torch.float64).sum(dim=0)
