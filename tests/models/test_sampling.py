"""Sampling through diffusers: how many images at once, and that every step is told."""

import pytest

from fastdistill.models.sampling import SamplingDefaults, images_at_once, sample
from tests.tiny import tiny_flux_pipeline


@pytest.mark.parametrize(
    ("batch", "height", "width", "at_once"),
    [
        (64, 64, 64, 64),
        (64, 256, 256, 64),
        (64, 512, 512, 16),
        (64, 1024, 1024, 4),
        (2, 1024, 1024, 2),
        (8, 4096, 2048, 1),
    ],
)
def test_large_images_are_drawn_a_few_at_once(batch, height, width, at_once):
    assert images_at_once(batch, SamplingDefaults(height=height, width=width)) == at_once


def test_progress_is_told_within_a_batch():
    sampling = SamplingDefaults(num_inference_steps=3, height=64, width=64, max_sequence_length=8)
    told = []
    images = sample(tiny_flux_pipeline(), ["a cat"] * 5, sampling, seeds=range(5), batch=4, tick=told.append)
    assert len(images) == 5
    assert told == pytest.approx([4 / 3] * 3 + [1 / 3] * 3)
