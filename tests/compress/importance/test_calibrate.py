"""Calibration on images: what is sampled, what is noised, and that it is read again."""

import pytest
import torch
from PIL import Image
from rich.console import Console

from fastdistill.compress.importance.calibrate import Amount, calibrated
from fastdistill.data.images import pixels, read_folder
from fastdistill.data.trajectories import Source
from fastdistill.models.families.flux import Flux
from fastdistill.models.sampling import SamplingDefaults
from tests.tiny import tiny_flux_pipeline

CAPTIONS = ["a cat", "a dog", "a cat"]


@pytest.fixture
def images(tmp_path):
    for index, caption in enumerate(CAPTIONS):
        Image.new("RGB", (100, 80), (80 * index, 255, 0)).save(tmp_path / f"{index}.png")
        (tmp_path / f"{index}.txt").write_text(caption)
    return read_folder(tmp_path, 3).images


@pytest.fixture(scope="module")
def pipeline():
    pipeline = tiny_flux_pipeline()
    # As convolutions of some sizes choose by themselves; a file takes no other order than the plain
    # one.
    pipeline.vae.to(memory_format=torch.channels_last)
    return pipeline


@pytest.fixture
def calibration(pipeline, images):
    sampling = SamplingDefaults(height=64, width=48, max_sequence_length=8, true_cfg_scale=2.0)
    source = Source(pipeline=pipeline, prompts=["unused"], sampling=sampling, images=images)

    def call(seed=0, cache=None):
        return calibrated(
            source, Amount(images=99, steps=4, points=3, batch=2, seed=seed), cache=cache, console=Console(quiet=True)
        )

    return call


def test_points_lie_between_the_images_latents_and_the_noise_of_the_runs(calibration, pipeline, images):
    found = calibration()
    x_0 = Flux().encode_images(pipeline, torch.stack([pixels(image, 64, 48) for image in images]))
    # Two at a time and three at once may take different convolutions, with differences of 3e-5 on
    # some machines.
    torch.testing.assert_close(found.pool.latents, x_0, atol=2e-4, rtol=0)
    t = found.points.t.view(-1, 1, 1, 1)
    torch.testing.assert_close(found.points.x_t, (1 - t) * x_0 + t * found.runs.noise, atol=2e-4, rtol=0)
    # The pipeline's own times; nothing is scored at the end, where nothing is predicted.
    assert len(found.runs.times) == 5
    assert set(found.points.t.tolist()) <= set(found.runs.times[:-1].tolist())


def test_captions_are_encoded_once_and_the_empty_prompt_is_last(calibration, pipeline):
    found = calibration()
    assert found.pool.prompts.tolist() == [0, 1, 0]
    expected = Flux().encode_prompts(pipeline, ["a cat", "a dog", ""], 3.5, 8)
    torch.testing.assert_close(found.pool.conditioning.prompt_embeds, expected.prompt_embeds)
    torch.testing.assert_close(found.runs.conditioning.prompt_embeds[2], expected.prompt_embeds[0])
    torch.testing.assert_close(found.runs.unconditional.prompt_embeds[0], expected.prompt_embeds[2])


def test_the_same_seed_and_the_cache_give_the_same_points(calibration, tmp_path, monkeypatch):
    cache = tmp_path / "calibration"
    first, second = calibration(cache=cache), calibration()
    assert torch.equal(first.points.x_t, second.points.x_t)
    assert not torch.equal(first.points.x_t, calibration(seed=1).points.x_t)
    monkeypatch.setattr(Flux, "encode_images", lambda *args: pytest.fail("encoded again"))
    monkeypatch.setattr(Flux, "trajectory", lambda *args, **kwargs: pytest.fail("sampled again"))
    third = calibration(cache=cache)
    assert torch.equal(first.points.x_t, third.points.x_t)
    assert torch.equal(first.pool.latents, third.pool.latents)


def test_a_calibration_that_was_stopped_continues_with_the_next_batch(calibration, tmp_path, monkeypatch):
    cache, encoded, whole = tmp_path / "calibration", [], Flux.encode_images

    def stopped(*args):
        if len(encoded) == 1:
            raise KeyboardInterrupt
        encoded.append(1)
        return whole(*args)

    monkeypatch.setattr(Flux, "encode_images", stopped)
    with pytest.raises(KeyboardInterrupt):
        calibration(cache=cache)
    monkeypatch.setattr(Flux, "encode_images", lambda self, *args: encoded.append(2) or whole(self, *args))
    continued = calibration(cache=cache)
    assert encoded == [1, 2], "two images before, the third after"
    assert torch.equal(continued.pool.latents, calibration().pool.latents)
    assert torch.equal(continued.points.x_t, calibration().points.x_t)
