"""The emoji FLUX and its descendants are known, and no other model is taken for one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, FluxPipeline

from fastdistill.compress import cut
from fastdistill.evaluation.suite import ImageSet, evaluate
from fastdistill.evaluation.testbed import draws_emoji
from fastdistill.models.loading import embedded_folder
from fastdistill.models.sampling import SamplingDefaults
from tests.tiny import tiny_flux_pipeline

SAMPLING = SamplingDefaults(num_inference_steps=1, height=64, width=64, max_sequence_length=8)


def emoji(**options: Any) -> FluxPipeline:
    pipeline = FluxPipeline.from_pretrained(embedded_folder(), **options)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_emoji_flux_is_known_in_every_dtype(dtype: torch.dtype) -> None:
    assert draws_emoji(emoji(dtype=dtype))


def test_a_model_made_of_it_is_known(tmp_path: Path) -> None:
    pipeline = emoji(dtype=torch.bfloat16)
    pipeline.transformer = cut(pipeline.transformer, "double:1 single:0-3")
    pipeline.save_pretrained(tmp_path)
    assert draws_emoji(FluxPipeline.from_pretrained(tmp_path, dtype=torch.float16))


def test_another_model_is_not(tmp_path: Path) -> None:
    assert not draws_emoji(tiny_flux_pipeline())
    pipeline = emoji()
    torch.manual_seed(0)
    own, pipeline.vae = pipeline.vae, AutoencoderKL.from_config(pipeline.vae.config)
    assert not draws_emoji(pipeline), "of the same architecture"
    pipeline.vae = own
    with torch.no_grad():
        own.decoder.conv_out.bias.add_(0.05)
    assert not draws_emoji(pipeline), "trained on"


def measured(pipeline: FluxPipeline, prompts: list[str]) -> dict[str, Any]:
    return evaluate(pipeline, ImageSet(prompts=prompts, seeds=[0], sampling=SAMPLING, batch=2)).metrics


def test_emoji_are_judged_where_a_model_draws_them() -> None:
    """Captions alone make no emoji: "rocket" is a word like others."""
    pipeline = emoji()
    assert "caption_accuracy" in measured(pipeline, ["cat face", "rocket"])
    assert "caption_accuracy" not in measured(pipeline, ["cat face", "a photograph of a rocket"])
    other = tiny_flux_pipeline()
    other.set_progress_bar_config(disable=True)
    found = measured(other, ["cat face", "rocket"])
    assert not {"caption_accuracy", "frechet_distance", "background_purity"} & found.keys()
    assert found["images"] == 2
