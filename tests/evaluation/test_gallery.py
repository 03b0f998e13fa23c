"""The gallery: what it measures, and what it only draws."""

from pathlib import Path

import pytest
from rich.console import Console

from fastdistill.evaluation import gallery as module
from fastdistill.evaluation.gallery import Gallery
from fastdistill.models.sampling import SamplingDefaults
from tests.tiny import tiny_flux_pipeline, untrained_emoji_pipeline


def gallery(folder: Path, *, count: int, width: int = 64) -> Gallery:
    # Captions of the emoji testbed, so that all metrics with a known truth apply.
    prompts = ["cat face", "rocket"]
    sampling = SamplingDefaults(num_inference_steps=1, height=64, width=width, max_sequence_length=8)
    console = Console(quiet=True)
    return Gallery(folder, prompts, sampling, reference="full", count=count, seed=0, batch=2, console=console)


def test_a_count_of_zero_draws_and_measures_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "evaluate", lambda *_, **__: pytest.fail("measured"))
    found = gallery(tmp_path, count=0)
    assert found.evaluate(tiny_flux_pipeline(), "full") == {}
    assert found.grid(["full"]).size[0] > 64


def test_images_that_are_not_square_are_measured(tmp_path: Path) -> None:
    metrics = gallery(tmp_path, count=2, width=96).evaluate(untrained_emoji_pipeline(), "full")
    assert 0 <= metrics["caption_accuracy"] <= 1
