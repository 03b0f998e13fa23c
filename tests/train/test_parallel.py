"""Two processes with half of every network each compute what one computes, and go on from each
other's checkpoints.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from fastdistill.errors import UserError
from fastdistill.train import parallel
from fastdistill.train.trainer import Trainer
from tests.tiny import mixing_transformer
from tests.train import layouts
from tests.train.rivals import Blocks, Rivals, batches, rivals_config

MIDDLE = "checkpoint-6"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The folders of one process and of two.

    The `continued` of each goes on from the middle of the other's `rivals`.
    """
    one, two = (tmp_path_factory.mktemp(name) for name in ("one", "two"))
    layouts.finish(layouts.rivals(one / "rivals"))
    layouts.finish(layouts.flux(one / "flux"))
    shutil.copytree(one / "rivals" / MIDDLE, two / "continued" / MIDDLE)
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "tests.train.layouts",
    ]
    done = subprocess.run([*torchrun, str(two)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    shutil.copytree(two / "rivals" / MIDDLE, one / "continued" / MIDDLE)
    layouts.finish(layouts.rivals(one / "continued"))
    return one, two


def metrics(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rivals", "flux"])
def test_losses_and_gradient_norms_agree(runs: tuple[Path, Path], name: str) -> None:
    one, two = (metrics(folder / name) for folder in runs)
    assert len(one) == len(two) == (12 if name == "rivals" else 3)
    for alone, shared in zip(one, two, strict=True):
        alone.pop("seconds")
        assert shared.pop("seconds") > 0
        assert shared == pytest.approx(alone, rel=5e-6, abs=1e-7)
    # Clipped, so that a norm of each process's own gradients would show in the weights.
    assert any(value > 0.5 for line in one for key, value in line.items() if key.endswith("gradient_norm"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rivals", "flux", "continued"])
def test_weights_averages_and_targets_agree(runs: tuple[Path, Path], name: str) -> None:
    reference = load_file(runs[0] / ("rivals" if name == "continued" else name) / "result.safetensors")
    for folder in runs:
        result = load_file(folder / name / "result.safetensors")
        assert result.keys() == reference.keys()
        for key, value in reference.items():
            torch.testing.assert_close(
                result[key], value, rtol=1e-4, atol=2e-6, msg=lambda message, key=key: f"{key}: {message}"
            )


@pytest.mark.slow
def test_the_best_and_the_grids_agree(runs: tuple[Path, Path]) -> None:
    best, grids = [], []
    for folder in runs:
        best.append(load_file(folder / "rivals/best/student.safetensors"))
        grids.append(
            {path.name: np.asarray(Image.open(path), dtype=int) for path in (folder / "rivals/samples").iterdir()}
        )
    assert best[0].keys() == best[1].keys() == Blocks().state_dict().keys()
    for name, value in best[0].items():
        torch.testing.assert_close(best[1][name], value, rtol=1e-4, atol=2e-6)
    assert grids[0].keys() == grids[1].keys() == {"0000004.png", "0000008.png", "0000012.png"}
    assert all(abs(grids[0][name] - grids[1][name]).max() <= 1 for name in grids[0])


@pytest.mark.slow
def test_checkpoints_are_the_same_files(runs: tuple[Path, Path]) -> None:
    one, two = (folder / "rivals" / MIDDLE for folder in runs)
    assert sorted(path.name for path in one.iterdir()) == sorted(path.name for path in two.iterdir())
    for path in one.glob("*.safetensors"):
        mine, other = load_file(path), load_file(two / path.name)
        assert {key: value.shape for key, value in mine.items()} == {key: value.shape for key, value in other.items()}


def test_one_process_needs_no_group() -> None:
    network = Blocks()
    with parallel.processes():
        assert (parallel.world_size(), parallel.rank()) == (1, 0)
        parallel.shard(network)
    assert type(network) is Blocks
    assert all(type(parameter) is nn.Parameter for parameter in network.parameters())


def test_blocks_are_those_of_the_outermost_lists() -> None:
    transformer = mixing_transformer()
    expected = [*transformer.transformer_blocks, *transformer.single_transformer_blocks]
    assert parallel.blocks(transformer) == expected


def test_processes_that_cannot_share_the_batch_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="batch of 8 cannot be cut into 3"):
        Trainer(Rivals(), batches, rivals_config(micro_batches=3), tmp_path).fit()
    monkeypatch.setattr(parallel, "world_size", lambda: 2)
    with pytest.raises(UserError, match="2 processes cannot share 1 micro-batches"):
        Trainer(Rivals(), batches, rivals_config(micro_batches=1), tmp_path)
    monkeypatch.setattr(parallel, "shard", lambda network: None)
    with pytest.raises(UserError, match="adamw8bit runs in a single process"):
        Trainer(Rivals(), batches, rivals_config(optimizer="adamw8bit"), tmp_path)
