"""Cached shards: what an interrupted run leaves, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdistill.data import shards as shards_module
from fastdistill.data.pairs import PairPool
from fastdistill.data.shards import cached_shards
from fastdistill.errors import UserError
from tests.toy import generator


def rows(size: int, rng: torch.Generator) -> dict[str, Tensor]:
    return {"noise": torch.randn(size, 3, generator=rng), "prompts": torch.randint(5, (size,), generator=rng)}


def shards(folder: Path, make: object = rows, **changes: object) -> dict[str, Tensor]:
    arguments = {"count": 10, "shard": 4, "seed": 0, "settings": {"steps": 7}} | changes
    return cached_shards(folder, make=make, **arguments)  # type: ignore[arg-type]


def test_an_interrupted_run_makes_the_same_pairs_and_none_twice(tmp_path: Path) -> None:
    whole = shards(tmp_path / "whole")
    assert {name: tensor.shape[0] for name, tensor in whole.items()} == {"noise": 10, "prompts": 10}
    calls = []

    def killed(size: int, rng: torch.Generator) -> dict[str, Tensor]:
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(size)
        return rows(size, rng)

    with pytest.raises(KeyboardInterrupt):
        shards(tmp_path / "broken", killed)
    (tmp_path / "broken" / "pairs-00002.partial").write_bytes(b"half a file")
    calls.clear()
    resumed = shards(tmp_path / "broken", killed)
    assert calls == [2]
    for name, tensor in whole.items():
        assert torch.equal(resumed[name], tensor)
    calls.clear()
    shards(tmp_path / "broken", killed)
    assert calls == []


@pytest.mark.parametrize("changes", [{"seed": 1}, {"count": 12}, {"settings": {"steps": 8}}])
def test_pairs_of_other_settings_are_refused(tmp_path: Path, changes: dict[str, object]) -> None:
    shards(tmp_path)
    with pytest.raises(UserError, match="of another " + ("steps" if "settings" in changes else next(iter(changes)))):
        shards(tmp_path, **changes)


def test_of_two_processes_that_begin_together_the_first_says_what_the_folder_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = shards_module.write_json

    def write_late(path: Path, value: Any) -> None:
        monkeypatch.setattr(shards_module, "write_json", write)
        shards(tmp_path, settings={"steps": 8})  # the other process, meanwhile
        write(path, value)

    monkeypatch.setattr(shards_module, "write_json", write_late)
    with pytest.raises(UserError, match="pairs of another steps"):
        shards(tmp_path)
    assert all(shards(tmp_path, settings={"steps": 8}))


def test_a_batch_keeps_together_what_belongs_together() -> None:
    index = torch.arange(6)
    pool = PairPool(
        noise=index[:, None].float(), latents=2 * index[:, None].float(), prompts=index.flip(0), conditioning=index * 10
    )
    batch = pool.batch(50, generator())
    assert torch.equal(batch.latents, 2 * batch.noise)
    assert torch.equal(batch.conditioning, 10 * (5 - batch.noise[:, 0].long()))
    assert len(batch.noise.unique()) > 3
    part = batch[10:20]
    assert len(part) == 10
    assert torch.equal(part.latents, 2 * part.noise)
    assert torch.equal(part.noise, batch.noise[10:20])
