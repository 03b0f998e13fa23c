"""What a pruning criterion is: a function from a network and calibration points to one score per block; the lowest goes first."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from fastdistill.models.family import BlockId, Conditioning, Family


@dataclass(frozen=True, kw_only=True)
class CalibrationPoints:
    """Points (x_t, t, conditioning) on the teacher's own trajectories: (N, C, H, W), (N,), N rows."""

    x_t: Tensor
    t: Tensor
    conditioning: Conditioning

    def chunks(self, size: int) -> Iterator[CalibrationPoints]:
        for start in range(0, self.x_t.shape[0], size):
            part = slice(start, start + size)
            yield CalibrationPoints(x_t=self.x_t[part], t=self.t[part], conditioning=self.conditioning[part])


Tick = Callable[[], None]
"""Called once per block that has been scored, for the progress bar."""

Criterion = Callable[[nn.Module, Family, CalibrationPoints, int, Tick], dict[BlockId, float]]
"""``(network, family, points, batch size, tick) -> score of each block``, in the order of the forward pass."""
