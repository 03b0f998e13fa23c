"""Calibration: what blocks are scored on and a cut model is recovered on, from the full model's own
trajectories, or from images."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from rich.console import Console

from fastdistill.compress.importance import CRITERIA
from fastdistill.compress.importance.criterion import CalibrationPoints, Material, SamplingRuns
from fastdistill.compress.importance.ledger import Ledger
from fastdistill.compress.importance.output_error import OutputError
from fastdistill.compress.naming import spelled_out
from fastdistill.compress.surgery import check
from fastdistill.data.latents import LatentPool
from fastdistill.data.trajectories import Source, TrajectoryOptions, trajectories
from fastdistill.errors import UserError
from fastdistill.models.blocks import block_ids
from fastdistill.models.families import family_of
from fastdistill.models.families.family import BlockId, Family
from fastdistill.models.patch import patched
from fastdistill.run.options import check_known
from fastdistill.run.progress import bar, share_bar


@dataclass(frozen=True, kw_only=True)
class Amount(TrajectoryOptions):
    """Size of a calibration, and the portions in which it is sampled."""

    points: int
    """States on the way to the images at which blocks are scored, one for each of the first
    `points` images."""

    def __post_init__(self) -> None:
        if self.points < 1:
            raise UserError(f"points must be at least 1, got {self.points}")
        super().__post_init__()


@dataclass(frozen=True, kw_only=True, repr=False)
class Calibration:
    """A network with what its blocks are scored on and a cut model is mended and recovered on.

    The network runs on the fused operators while it is measured, and is left as it was.

    Attributes:
        points: where blocks are scored.
        runs: sampling runs that begin where the trajectories of the points did.
        pool: clean latents to repair and to recover on.
        batch: samples per forward pass.
        console: where progress is shown.
    """

    network: Any
    family: Family
    points: CalibrationPoints
    runs: SamplingRuns
    pool: LatentPool
    batch: int
    seed: int
    console: Console

    def __repr__(self) -> str:
        kind, blocks, points, images = type(self.network).__name__, self.blocks, self.points, self.pool.latents
        return f"<Calibration of a {kind} with {len(blocks)} blocks: {len(points)} points, {len(images)} images>"

    @cached_property
    def blocks(self) -> list[BlockId]:
        """Every block of the network, in the order of the forward pass."""
        return block_ids(self.network, self.family)

    def score(self, criterion: str, *, drops: int | None = None, pieces: Path | None = None) -> dict[BlockId, float]:
        """Worth of each block by `criterion`, in the order of the forward pass.

        Args:
            criterion: a name in `CRITERIA`.
            drops: how many blocks are going to be dropped, where that is known.
            pieces: file for the finished pieces of the scoring. One that was stopped goes on from
                there.
        """
        check_known("criterion", criterion, CRITERIA)
        material = Material(points=self.points, runs=self.runs, batch=self.batch, seed=self.seed, drops=drops)
        with share_bar(self.console, f"score by {criterion}", len(self.blocks)) as tick, patched(self.network):
            scores = CRITERIA[criterion](self.network, self.family, material, Ledger(pieces, tick))
        return {block_id: scores[block_id] for block_id in self.blocks}

    def joint_error(self, dropped: Mapping[str, Sequence[int]] | Iterable[BlockId]) -> float:
        """Relative output error of the network without all of `dropped` at once, which are given as
        to `cut`.

        Raises:
            UserError: the network has no such block.
        """
        dropped = spelled_out(dropped, self.family)
        check(self.network, self.family, dropped)
        error = self._error
        with patched(self.network):
            return error.without(dropped)

    def output_error(self, network: Any) -> float:
        """Relative output error of another network, which stands for this one."""
        error = self._error
        with patched(network):
            return error.of(network)

    @cached_property
    def _error(self) -> OutputError:
        with patched(self.network):
            return OutputError(self.network, self.family, self.points, self.batch)


def calibrated(source: Source, amount: Amount, *, cache: Path | None = None, console: Console) -> Calibration:
    """Sample a calibration from the source.

    What was sampled before is read from the folder `cache`, and what is sampled now is written
    there, batch by batch.

    Raises:
        UserError: the family of the pipeline's transformer cannot be scored.
    """
    network = source.pipeline.transformer
    family = family_of(network)
    with bar(console, "calibrate", len(source.images) or amount.images) as tick, patched(network):
        sampled = trajectories(source, amount, cache=cache, tick=tick)
    conditioning = sampled.conditioning
    device = conditioning.prompt_embeds.device
    first = slice(amount.points)
    return Calibration(
        network=network,
        family=family,
        points=CalibrationPoints(
            x_t=sampled.x_t[first].to(device),
            t=sampled.t[first].to(device),
            conditioning=conditioning[sampled.state_prompts[first].to(device)],
        ),
        runs=SamplingRuns(
            noise=sampled.noise[first].to(conditioning.prompt_embeds),
            times=sampled.times.to(device),
            conditioning=conditioning[sampled.prompts[first].to(device)],
            unconditional=conditioning[len(conditioning) - 1 :] if source.sampling.true_cfg_scale > 1 else None,
            true_cfg_scale=source.sampling.true_cfg_scale,
        ),
        pool=sampled.pool(),
        batch=amount.batch,
        seed=amount.seed,
        console=console,
    )
