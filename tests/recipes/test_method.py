"""A new method at the cost that CONTRIBUTING states: a file with its options, a line in the table,
a case in the tests."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastdistill.models.sampling import SamplingDefaults
from tests.tiny import tiny_flux_pipeline

ROOT = Path(__file__).parents[2]

METHOD = '''"""A throw-away method: the student is pulled to the data."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fastdistill.data.latents import LatentBatch
from fastdistill.diffusion.prediction import Prediction
from fastdistill.distill.methods.distillation import Distillation, time_distribution
from fastdistill.distill.options import MethodOptions
from fastdistill.run.options import at_least
from fastdistill.train.method import Loss


@dataclass(frozen=True, kw_only=True)
class PulledOptions(MethodOptions):
    """Pull the student to the data."""

    pull: float = 1.0
    """Weight of the loss."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 0, "pull")


class Pulled(Distillation):
    """`L = pull E |x_0 - x|^2 + E |x_0 - x_0_teacher|^2`."""

    Options = PulledOptions
    options: PulledOptions
    command_defaults = {"learning_rate": 2e-4, "pull": 0.5}

    def loss(self, role: str, batch: LatentBatch, rng: torch.Generator) -> Loss:
        x_t, t, _ = self.process.draw(batch.latents, time_distribution("uniform", self.shift), rng)
        scale = self.teacher.draw_scale(x_t, rng)
        x_0 = self.student.predict(x_t, t, batch.conditioning, Prediction.X0, scale)
        taught = self.teacher.guided(x_t, t, batch.conditioning, Prediction.X0, scale)
        return Loss(total=self.options.pull * (x_0 - batch.latents).square().mean() + (x_0 - taught).square().mean())
'''
LINE = '        "pulled": ("pulled:Pulled", "the data"),\n'
CASE = '    "pulled": Case(options={"true_cfg_scale": 2.0}),\n'


def shadow(original: Path, copy: Path, *changed: str) -> None:
    """Make the folder `copy` look like `original`: links, and real copies of the files `changed`."""
    copy.mkdir()
    for path in original.iterdir():
        inside = [name.partition("/")[2] for name in changed if name.partition("/")[0] == path.name]
        if path.name == "__pycache__":
            continue
        if not inside:
            (copy / path.name).symlink_to(path)
        elif path.is_file():
            (copy / path.name).write_text(path.read_text())
        else:
            shadow(path, copy / path.name, *inside)


def insert(file: Path, line: str, after: str) -> None:
    head, found, tail = file.read_text().partition(after)
    assert found
    file.write_text(f"{head}{found}{line}{tail}")


@pytest.mark.slow
def test_a_method_by_the_recipe(tmp_path: Path) -> None:
    shadow(ROOT / "fastdistill", tmp_path / "fastdistill", "distill/methods/__init__.py")
    shadow(
        ROOT / "tests",
        tmp_path / "tests",
        "distill/methods/cases.py",
        "distill/methods/golden_losses.json",
        "distill/methods/test_methods.py",
    )
    (tmp_path / "fastdistill/distill/methods/pulled.py").write_text(METHOD)
    insert(tmp_path / "fastdistill/distill/methods/__init__.py", LINE, "    {\n")
    insert(tmp_path / "tests/distill/methods/cases.py", CASE, "CASES: dict[str, Case] = {\n")
    (tmp_path / "pyproject.toml").symlink_to(ROOT / "pyproject.toml")

    def python(*arguments: object) -> str:
        environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
        run = subprocess.run(
            [sys.executable, *map(str, arguments)], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert run.returncode == 0, run.stdout + run.stderr
        return run.stdout

    python("-m", "tests.distill.methods.cases")
    assert set(json.loads((tmp_path / "tests/distill/methods/golden_losses.json").read_text())) > {"pulled", "tdm"}
    tested = python(
        "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/distill/methods/test_methods.py", "-k", "pulled"
    )
    assert " passed" in tested
    assert "--pull " in python("-m", "fastdistill.distill", "--method", "pulled", "--help")

    pipeline = tiny_flux_pipeline()
    pipeline.save_pretrained(tmp_path / "tiny")
    SamplingDefaults(num_inference_steps=2, height=64, width=64, max_sequence_length=8).save(tmp_path / "tiny")
    (tmp_path / "tiny" / "prompts.txt").write_text("a cat\na dog\n")
    quick = ("--training-steps", 2, "--batch", 2, "--num-images", 2, "--watch-every", 0, "--evaluate-images", 0)
    python(
        "-m", "fastdistill.distill", "--method", "pulled", "--steps", 1, "--model", "tiny", "--output", "out", *quick
    )
    record = json.loads((tmp_path / "out" / "distill.json").read_text())
    assert (record["config"]["pull"], record["config"]["learning_rate"]) == (0.5, 2e-4)
