"""Rows of tensors made in shards. An interrupted run continues with the shards that are on disk."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastdistill.errors import UserError
from fastdistill.run.files import atomic_write, read_json, write_json


def cached_shards(
    folder: Path,
    *,
    count: int,
    shard: int,
    seed: int,
    settings: Mapping[str, Any],
    make: Callable[[int, torch.Generator], Mapping[str, Tensor]],
) -> dict[str, Tensor]:
    """Make `count` rows by `make(size, generator)`, `shard` rows at a time.

    Each shard is written to `folder` when it is done. Every shard has a generator of its own,
    seeded by `seed` and its number. A run that was killed goes on at the first missing shard, and
    ends with the same bits.

    Raises:
        UserError: the folder holds shards of other settings.
    """
    folder.mkdir(parents=True, exist_ok=True)
    recorded = folder / "pairs.json"
    current = json.loads(json.dumps({"count": count, "shard": shard, "seed": seed, **settings}))
    if recorded.exists():
        earlier = read_json(recorded)
        changed = sorted(name for name in current.keys() | earlier.keys() if current.get(name) != earlier.get(name))
        if changed:
            raise UserError(
                f"{folder} holds pairs of another {', '.join(changed)}: use the recorded values, or another folder"
            )
    else:
        write_json(recorded, current)
    parts = []
    for number, start in enumerate(range(0, count, shard)):
        path = folder / f"pairs-{number:05d}.safetensors"
        if not path.exists():
            # A large odd stride keeps the shards of different seeds apart.
            generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
            made = make(min(shard, count - start), generator)
            with atomic_write(path) as partial:
                save_file({name: tensor.cpu().contiguous() for name, tensor in made.items()}, partial)
        parts.append(load_file(path))
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
