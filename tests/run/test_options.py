"""Options check their types, and outputs are checked before the work."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastdistill.errors import UserError
from fastdistill.evaluate import EvaluateConfig
from fastdistill.run.options import RunOptions, SamplingOptions, check_output
from fastdistill.sample import SampleConfig


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"height": "64"}, "--height must be a whole number, got '64'"),
        ({"height": 64.0}, "--height must be a whole number, got 64.0"),
        ({"width": True}, "--width must be a whole number, got True"),
        ({"guidance_scale": "strong"}, "--guidance-scale must be a number, got 'strong'"),
        ({"guidance_scale": [3.5]}, r"--guidance-scale must be a number, got \[3.5\]"),
        ({"true_cfg_scale": math.nan}, "--true-cfg-scale must be a finite number"),
        ({"true_cfg_scale": 0.5}, "--true-cfg-scale must be at least 1, got 0.5"),
    ],
)
def test_values_of_another_type_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        SamplingOptions(**values)


def test_numbers_of_numpy_are_numbers() -> None:
    options = SamplingOptions(height=np.int64(64), true_cfg_scale=np.float32(1.5), guidance_scale=2)
    assert (options.height, options.true_cfg_scale) == (64, 1.5)


@pytest.mark.parametrize("seed", [-1, 2**32, 10**30])
def test_seeds_that_no_generator_takes(seed: int) -> None:
    for make in (
        lambda: SampleConfig(seed=seed),
        lambda: EvaluateConfig(seeds=(0, seed)),
        lambda: RunOptions(seed=seed),
    ):
        with pytest.raises(UserError, match=r"--seeds? must be"):
            make()


def test_outputs_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_output(tmp_path / "grid.png", overwrite=False)
    assert not list(tmp_path.iterdir()), "nothing is left behind"
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(UserError, match=r"folder\.png is a folder"):
        check_output(tmp_path / "folder.png", overwrite=True)
    with pytest.raises(UserError, match=r"there is no folder .*nowhere"):
        check_output(tmp_path / "nowhere" / "grid.png", overwrite=False)


def test_names_of_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "mine" / "inside"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    names = [RunOptions(model=model).model_name for model in (".", "..", "../inside/", "emoji", "owner/name", "/")]
    assert names == ["inside", "mine", "inside", "emoji", "name", "model"]
