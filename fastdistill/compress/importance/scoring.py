"""Scores of a network's blocks and joint errors of sets of them, all on one calibration."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import Tensor

from fastdistill.compress.importance import CRITERIA
from fastdistill.compress.importance.calibrate import Calibration
from fastdistill.compress.importance.criterion import Material
from fastdistill.compress.importance.ledger import Ledger
from fastdistill.compress.importance.output_error import joint_output_error, output_error, predictions
from fastdistill.models.blocks import block_ids
from fastdistill.models.families.family import BlockId, Family
from fastdistill.models.patch import patched
from fastdistill.run.progress import share_bar


class Scorer:
    """The network runs on the fused operators while it is measured, and is left as it was."""

    def __init__(
        self,
        network: Any,
        family: Family,
        calibration: Calibration,
        *,
        batch: int,
        seed: int = 0,
        drops: int | None = None,
        console: Console | None = None,
    ) -> None:
        """
        Args:
            batch: samples per forward pass.
            drops: how many blocks are going to be dropped, where that is known.
            console: to show progress on.
        """
        self.network, self.family = network, family
        self.blocks = block_ids(network, family)
        self._material = Material(points=calibration.points, runs=calibration.runs, batch=batch, seed=seed, drops=drops)
        self._console = console or Console(quiet=True)

    def score(self, criterion: str, pieces: Path | None = None) -> dict[BlockId, float]:
        """What each block is worth by ``criterion``, in the order of the forward pass.

        ``pieces`` is a file in which finished pieces are kept: a scoring that was stopped goes on from there.
        """
        with share_bar(self._console, f"score by {criterion}", len(self.blocks)) as tick, patched(self.network):
            scores = CRITERIA[criterion](self.network, self.family, self._material, Ledger(pieces, tick))
        return {block_id: scores[block_id] for block_id in self.blocks}

    def joint_error(self, dropped: Iterable[BlockId]) -> float:
        """The relative output error without all of ``dropped`` at once."""
        points, batch = self._material.points, self._material.batch
        with patched(self.network):
            return joint_output_error(self.network, self.family, points, batch, dropped, self._reference)

    def output_error(self, network: Any) -> float:
        """That of another network, which stands for this one."""
        points, batch = self._material.points, self._material.batch
        with patched(network), patched(self.network):
            return output_error(network, self.family, points, batch, self._reference)

    @cached_property
    def _reference(self) -> Tensor:
        return predictions(self.network, self.family, self._material.points, self._material.batch)
