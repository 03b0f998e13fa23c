"""The gallery: what it measures, and what it only draws."""

from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from fastdistill.evaluation import gallery as module
from fastdistill.evaluation import suite
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


def test_a_measurement_that_was_stopped_continues_with_the_next_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the same weights; others begin again."""
    drawn, whole = [], suite.sample

    def stopped(pipeline: Any, prompts: Any, *arguments: Any, **more: Any) -> torch.Tensor:
        if len(drawn) == 2:
            raise KeyboardInterrupt
        drawn.append(len(prompts))
        return whole(pipeline, prompts, *arguments, **more)

    pipeline = tiny_flux_pipeline()
    expected = gallery(tmp_path / "whole", count=7).evaluate(pipeline, "full")
    found = gallery(tmp_path / "broken", count=7)
    assert len(found.prompts) * len(found.seeds) == 10
    monkeypatch.setattr(suite, "sample", stopped)
    with pytest.raises(KeyboardInterrupt):
        found.evaluate(pipeline, "full", continues=True)
    drawn.clear()
    bias = pipeline.transformer.proj_out.bias
    before = bias.detach().clone()
    with torch.no_grad():
        bias.add_(1)
    with pytest.raises(KeyboardInterrupt):
        found.evaluate(pipeline, "full", continues=True)
    assert drawn == [2, 2], "from the start"
    with torch.no_grad():
        bias.copy_(before)
    ticks: list[int] = []
    monkeypatch.setattr(suite, "sample", lambda *arguments, **more: ticks.append(1) or whole(*arguments, **more))
    metrics = found.evaluate(pipeline, "full", continues=True)
    assert len(ticks) == 3, "two of five batches were drawn before"
    timed = ("seconds_per_image",)
    assert {name: value for name, value in metrics.items() if name not in timed} == {
        name: value for name, value in expected.items() if name not in timed
    }
    assert metrics["seconds_per_image"] > 0
    assert not list((tmp_path / "broken").glob("images-full.drawn-*"))
