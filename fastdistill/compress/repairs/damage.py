"""Input of a repair: a cut model, the full one, where both should agree, and data."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from rich.console import Console
from torch import Tensor

from fastdistill.compress.importance.calibrate import Calibration
from fastdistill.compress.repairs import REPAIRS
from fastdistill.compress.surgery import CutModel
from fastdistill.data.latents import LatentBatch, LatentPool
from fastdistill.diffusion.process import RectifiedFlow, noise_like
from fastdistill.models.blocks import block_ids
from fastdistill.models.families.family import BlockId, Conditioning
from fastdistill.models.patch import patched
from fastdistill.run.progress import share_bar


@dataclass(frozen=True, kw_only=True)
class Span:
    """A block of the cut model that has to stand for more than it did."""

    block: BlockId
    """Block of the cut model."""
    kept: BlockId
    """Block of the full model that `block` is a copy of."""
    target: BlockId
    """Block of the full model whose output `block` should give."""
    at_end: bool
    """Whether nothing reads the text stream after it."""


@dataclass(frozen=True, kw_only=True)
class Damage(CutModel):
    """A cut model to mend, with the data to mend it by.

    Attributes:
        pool: clean latents, to be noised.
        points: how many noised latents to look at.
        batch: latents at once.
        tick: called with the share of the repair that is done.
    """

    pool: LatentPool
    points: int
    batch: int
    seed: int = 0
    tick: Callable[[float], None] = lambda share: None

    @classmethod
    def of(cls, model: CutModel, calibration: Calibration, points: int) -> Damage:
        """Damage of a cut model, to be mended by a calibration of the full one."""
        return cls(
            student=model.student,
            teacher=model.teacher,
            family=model.family,
            boundaries=model.boundaries,
            pool=calibration.pool,
            points=points,
            batch=calibration.batch,
            seed=calibration.seed,
        )

    def spans(self) -> list[Span]:
        """Blocks before a gap, in the order of the forward pass, and the first one if blocks before
        it are gone."""
        existing = block_ids(self.teacher, self.family)
        own = block_ids(self.student, self.family)
        return [
            Span(block=own[position], kept=kept, target=target, at_end=target == existing[-1])
            for position, (kept, target) in enumerate(self.boundaries.items())
            if kept != target or (position == 0 and kept != existing[0])
        ]

    def chunks(self) -> Iterator[tuple[Tensor, Tensor, Conditioning]]:
        """`(x_t, t, conditioning)` of `points` noised latents at uniform times.

        Every pass gives the same ones, and none is held.
        """
        for start in range(0, self.points, self.batch):
            rng = torch.Generator().manual_seed(self.seed * 1_000_003 + start)
            batch: LatentBatch = self.pool.batch(min(self.batch, self.points - start), rng)
            t = torch.rand(len(batch), generator=rng).to(batch.latents)
            yield RectifiedFlow().add_noise(batch.latents, noise_like(batch.latents, rng), t), t, batch.conditioning


Repair = Callable[[Damage], None]
"""Mends `damage.student` in place; everything else stays as it is."""


def mend(damage: Damage, kind: str, console: Console) -> None:
    """Mend `damage.student` in place by the repair `kind`, with the full model on the fused
    operators."""
    with share_bar(console, "repair") as tick, patched(damage.teacher):
        REPAIRS[kind](replace(damage, tick=tick))
