"""Rows of tensors made in shards. An interrupted run continues with the shards that are on disk."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastdistill.errors import UserError
from fastdistill.run.files import atomic_write, read_json, write_json
from fastdistill.run.signals import stop_if_asked


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
    recorded = folder / "settings.json"
    current = json.loads(json.dumps({"count": count, "shard": shard, "seed": seed, **settings}))
    if not recorded.exists():
        _write_first(recorded, current)
    earlier = read_json(recorded)
    changed = sorted(name for name in current.keys() | earlier.keys() if current.get(name) != earlier.get(name))
    if changed:
        raise UserError(
            f"{folder} holds pairs of another {', '.join(changed)}: use the recorded values, or another folder"
        )

    def seeded(number: int, rows: range) -> Mapping[str, Tensor]:
        # A large odd stride keeps the shards of different seeds apart.
        return make(len(rows), torch.Generator().manual_seed(seed * 1_000_003 + number))

    parts = made_shards(folder, count=count, shard=shard, make=seeded)
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def made_shards(
    folder: Path | None,
    *,
    count: int,
    shard: int,
    make: Callable[[int, range], Mapping[str, Tensor]],
    kept: Callable[[int], None] = lambda rows: None,
) -> list[dict[str, Tensor]]:
    """Tensors of each shard of `shard` rows, of `count` in all, by `make(number, rows)`.

    A shard that is in `folder` is read, of which `kept` is told; any other is written there when it
    is made. Without a folder nothing is kept.
    """
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    parts = []
    for number, start in enumerate(range(0, count, shard)):
        rows = range(start, min(start + shard, count))
        path = None if folder is None else folder / f"shard-{number:05d}.safetensors"
        if path is not None and path.exists():
            kept(len(rows))
            parts.append(load_file(path))
            continue
        stop_if_asked()
        made = {name: tensor.cpu().contiguous() for name, tensor in make(number, rows).items()}
        if path is not None:
            with atomic_write(path) as partial:
                save_file(made, partial)
        parts.append(made)
    return parts


def _write_first(path: Path, value: Any) -> None:
    """Write `value` as JSON, unless another process writes `path` at the same time and is first."""
    own = path.with_name(f"{path.stem}.partial-{uuid4().hex[:12]}{path.suffix}")
    try:
        write_json(own, value)
        os.link(own, path)
    except FileExistsError:
        pass
    except OSError:  # a disk without links
        write_json(path, value)
    finally:
        own.unlink(missing_ok=True)
