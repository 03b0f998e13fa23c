"""What a repair gets: a cut model, the full one, where they should agree, and data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastdistill.compress.surgery import boundary_map, cut
from fastdistill.data.latents import LatentBatch, LatentPool
from fastdistill.diffusion.process import RectifiedFlow, noise_like
from fastdistill.models.blocks import block_ids
from fastdistill.models.families.family import BlockId, Conditioning, Family


@dataclass(frozen=True, kw_only=True)
class Span:
    """A block of the cut model that has to stand for more than it did."""

    block: BlockId
    """In the cut model."""
    kept: BlockId
    """The same block in the full one."""
    target: BlockId
    """Of the full model, whose output ``block`` should give."""
    at_end: bool
    """Nothing reads the text stream behind it."""


@dataclass(frozen=True, kw_only=True)
class Damage:
    """Attributes:
    boundaries: for each kept block of the full model, in the order of the cut one's, the block whose output it should give.
    pool: clean latents, which are noised afresh.
    points: how many to look at, ``batch`` at once.
    tick: called with the share of the repair that is done.
    """

    student: nn.Module
    teacher: nn.Module
    family: Family
    boundaries: Mapping[BlockId, BlockId]
    pool: LatentPool
    points: int
    batch: int
    seed: int = 0
    tick: Callable[[float], None] = lambda share: None

    @classmethod
    def by_cutting(cls, teacher: nn.Module, family: Family, dropped: Sequence[BlockId], **data: Any) -> Damage:
        """That of the teacher without the blocks ``dropped``; ``data`` are the pool and how to use it."""
        boundaries = boundary_map(block_ids(teacher, family), dropped)
        return cls(student=cut(teacher, dropped), teacher=teacher, family=family, boundaries=boundaries, **data)

    def spans(self) -> list[Span]:
        """The blocks ahead of a gap, in the order of the forward pass, and the first one if blocks ahead of it are gone."""
        existing = block_ids(self.teacher, self.family)
        own = block_ids(self.student, self.family)
        return [
            Span(block=own[position], kept=kept, target=target, at_end=target == existing[-1])
            for position, (kept, target) in enumerate(self.boundaries.items())
            if kept != target or (position == 0 and kept != existing[0])
        ]

    def chunks(self) -> Iterator[tuple[Tensor, Tensor, Conditioning]]:
        """``(x_t, t, conditioning)`` of ``points`` noised latents at uniform times; the same in every pass, without holding them."""
        for start in range(0, self.points, self.batch):
            rng = torch.Generator().manual_seed(self.seed * 1_000_003 + start)
            batch: LatentBatch = self.pool.batch(min(self.batch, self.points - start), rng)
            t = torch.rand(len(batch), generator=rng).to(batch.latents)
            yield RectifiedFlow().add_noise(batch.latents, noise_like(batch.latents, rng), t), t, batch.conditioning


Repair = Callable[[Damage], None]
"""Mends ``damage.student`` in place; everything else stays as it is."""
