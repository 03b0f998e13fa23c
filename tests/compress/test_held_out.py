"""The held-out measure: zero for the full model alone, from noise of its own, at a tenth of the
training."""

import copy

import pytest
import torch
from rich.console import Console

from fastdistill.compress.held_out import FEWEST_IMAGES, IMAGES, PASSES_OF_A_STEP, HeldOut, images_for, steps_between
from fastdistill.compress.importance.calibrate import Amount, calibrated
from fastdistill.data.trajectories import Source
from fastdistill.models.patch import patched
from fastdistill.models.sampling import SamplingDefaults
from tests.tiny import mixing_transformer, tiny_flux_pipeline


@pytest.fixture(scope="module")
def calibration():
    pipeline = tiny_flux_pipeline()
    pipeline.transformer = mixing_transformer().requires_grad_(False)
    sampling = SamplingDefaults(num_inference_steps=2, true_cfg_scale=2.0, height=64, width=64, max_sequence_length=8)
    source = Source(pipeline=pipeline, prompts=["a cat", "a dog"], sampling=sampling)
    return calibrated(source, Amount(images=4, points=4, steps=3, batch=3, seed=5), console=Console(quiet=True))


@pytest.fixture(scope="module")
def held_out(calibration):
    return HeldOut.of(calibration, calibration.pool.conditioning[torch.tensor([0, 1, 0, 1, 1])], (16, 8, 8))


def test_the_full_model_alone_has_no_distance(calibration, held_out):
    same = copy.deepcopy(calibration.network)
    assert held_out.distance(same) == 0
    distances = []
    for change in (1e-3, 1e-2, 1e-1):
        other = copy.deepcopy(calibration.network)
        with torch.no_grad():
            other.proj_out.weight.mul_(1 + change)
        distances.append(held_out.distance(other))
    assert 0 < distances[0] < distances[1] < distances[2]
    with patched(other):
        assert held_out.distance(other) == distances[2], "a student in training is patched already"


def test_the_distance_is_that_of_the_pipelines_own_images(calibration, held_out):
    """By another way: the pipeline itself, its scheduler and its guidance, an image at a time."""
    pipeline = tiny_flux_pipeline()
    other = copy.deepcopy(calibration.network)
    with torch.no_grad():
        other.proj_out.weight.mul_(1.05)
    shares = []
    for index in range(len(held_out.runs)):
        latents = []
        for network in (other, calibration.network):
            pipeline.transformer = network
            states, _ = calibration.family.trajectory(
                pipeline,
                held_out.runs.noise[index : index + 1],
                held_out.runs.conditioning[index : index + 1],
                held_out.runs.unconditional,
                steps=3,
                true_cfg_scale=2.0,
                guidance_scale=3.5,
            )
            latents.append(states[-1].double())
        shares.append(float((latents[0] - latents[1]).square().sum() / latents[1].square().sum()))
    assert held_out.distance(other) == pytest.approx(sum(shares) / len(shares), rel=1e-3)


def test_the_noise_is_of_its_own(calibration, held_out):
    for own in held_out.runs.noise:
        assert not any(torch.equal(own, other) for other in calibration.runs.noise)


@pytest.mark.parametrize("steps", [0, 1, 7, 100, 400, 5000])
@pytest.mark.parametrize(("batch", "passes"), [(1, 14), (4, 28), (64, 28), (64, 2)])
def test_measurements_take_a_tenth_of_the_training(steps, batch, passes):
    images = images_for(steps, batch, passes)
    assert FEWEST_IMAGES <= images <= IMAGES
    if not steps:
        return
    every = steps_between(steps, batch, passes, images)
    assert 1 <= every <= steps
    measured = -(-steps // every)
    cost = measured * images * passes
    assert measured == 1 or cost <= 0.1 * steps * batch * PASSES_OF_A_STEP + images * passes
    assert measured <= 11
