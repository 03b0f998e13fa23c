"""Pairs of noise and the sample that a teacher's flow makes of it, cached in shards that an interrupted run continues with."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastdistill.data.latents import LatentBatch
from fastdistill.errors import UserError
from fastdistill.workspace import whole


@dataclass(frozen=True, kw_only=True)
class PairBatch(LatentBatch):
    """The ``latents`` (B, ...) are the teacher's samples from ``noise`` (B, ...), under the guidance ``scale`` (B,) if that was drawn."""

    noise: Tensor
    scale: Tensor | None = None

    def __getitem__(self, index: Tensor | slice) -> PairBatch:
        return PairBatch(
            latents=self.latents[index],
            conditioning=None if self.conditioning is None else self.conditioning[index],
            noise=self.noise[index],
            scale=None if self.scale is None else self.scale[index],
        )


@dataclass(frozen=True, kw_only=True)
class PairPool:
    """Pairs (N, ...), the prompt of each (N,), and the conditioning of every prompt (P, ...)."""

    noise: Tensor
    latents: Tensor
    prompts: Tensor
    conditioning: Any
    scale: Tensor | None = None
    device: torch.device = torch.device("cpu")  # noqa: RUF009, an immutable value
    """Where batches go; the pool itself may be too large for a GPU."""

    def batch(self, size: int, generator: torch.Generator) -> PairBatch:
        """``size`` pairs with replacement."""
        rows = torch.randint(len(self.noise), (size,), generator=generator)
        return PairBatch(
            latents=self.latents[rows].to(self.device),
            noise=self.noise[rows].to(self.device),
            conditioning=self.conditioning[self.prompts[rows].to(self.device)],
            scale=None if self.scale is None else self.scale[rows].to(self.device),
        )


def cached_shards(
    folder: Path,
    *,
    count: int,
    shard: int,
    seed: int,
    settings: Mapping[str, Any],
    make: Callable[[int, torch.Generator], Mapping[str, Tensor]],
) -> dict[str, Tensor]:
    """``count`` rows of what ``make(size, generator)`` returns, made ``shard`` rows at a time and each written to ``folder`` when done.

    Every shard has a generator of its own, seeded by ``seed`` and its number. So a run that was killed goes on at the first shard that
    is not there, and ends with the same bits.

    Raises:
        UserError: the folder holds shards of other settings.
    """
    folder.mkdir(parents=True, exist_ok=True)
    recorded = folder / "pairs.json"
    current = json.loads(json.dumps({"count": count, "shard": shard, "seed": seed, **settings}))
    if recorded.exists():
        earlier = json.loads(recorded.read_text())
        changed = sorted(name for name in current.keys() | earlier.keys() if current.get(name) != earlier.get(name))
        if changed:
            raise UserError(f"{folder} holds pairs of another {', '.join(changed)}: use the recorded values, or another folder")
    else:
        recorded.write_text(json.dumps(current, indent=1))
    parts = []
    for number, start in enumerate(range(0, count, shard)):
        path = folder / f"pairs-{number:05d}.safetensors"
        if not path.exists():
            # A large odd stride keeps the shards of different seeds apart.
            generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
            made = make(min(shard, count - start), generator)
            with whole(path) as partial:
                save_file({name: tensor.cpu().contiguous() for name, tensor in made.items()}, partial)
        parts.append(load_file(path))
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
