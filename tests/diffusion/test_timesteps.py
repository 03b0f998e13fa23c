"""The distributions of times, and the few-step grids of FLUX's scheduler."""

import math

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift

from fastdistill.diffusion.process import RectifiedFlow
from fastdistill.diffusion.timesteps import LogitNormal, Shifted, Uniform, few_step_times, flux_shift, shifted
from tests.toy import generator


def ks_distance(sample: torch.Tensor, cdf: torch.Tensor) -> float:
    """The largest difference between the empirical distribution function and `cdf` at the sorted
    `sample`: Kolmogorov & Smirnov's.
    """
    return float((cdf - (torch.arange(len(sample)) + 0.5) / len(sample)).abs().max())


# At 20 000 draws the distance exceeds 1.63 / sqrt(20000) = 0.0115 with odds of 1 %.
DRAWS, KS_BOUND = 20_000, 0.0115
# The scheduler computes in float32: two units in its last place.
FLOAT32 = 1.2e-7


def test_uniform() -> None:
    t = Uniform(low=0.02, high=0.98)(DRAWS, generator()).sort().values
    assert t[0] >= 0.02
    assert t[-1] < 0.98
    assert ks_distance(t, (t - 0.02) / 0.96) < KS_BOUND


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (math.log(3), 1.0), (-0.4, 0.5)])
def test_logit_normal(mean: float, std: float) -> None:
    t = LogitNormal(mean=mean, std=std)(DRAWS, generator()).sort().values
    cdf = torch.special.ndtr((torch.logit(t) - mean) / std)
    assert ks_distance(t, cdf) < KS_BOUND


def test_a_shift_moves_the_location_of_a_logit_normal() -> None:
    moved = Shifted(base=LogitNormal(), shift=3.0)(100, generator())
    torch.testing.assert_close(moved, LogitNormal(mean=math.log(3))(100, generator()))


def test_a_shift_divides_the_signal_to_noise_ratio() -> None:
    t = torch.linspace(0.1, 0.9, 9, dtype=torch.float64)
    process = RectifiedFlow()
    torch.testing.assert_close(process.log_snr(shifted(t, 3.0)), process.log_snr(t) - 2 * math.log(3))
    torch.testing.assert_close(shifted(torch.tensor([0.0, 1.0]), 3.0), torch.tensor([0.0, 1.0]))


def test_the_same_generator_draws_the_same_times() -> None:
    for times in (Uniform(), LogitNormal(), Shifted(base=Uniform(), shift=2.0)):
        assert torch.equal(times(5, generator(3)), times(5, generator(3)))


@pytest.mark.parametrize("steps", [1, 2, 4, 28])
@pytest.mark.parametrize("shift", [1.0, 3.0, math.exp(1.15)])
def test_few_step_times_are_the_sigmas_of_the_scheduler(steps: int, shift: float) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps))
    torch.testing.assert_close(few_step_times(steps, shift), scheduler.sigmas[:-1], rtol=0, atol=FLOAT32)


@pytest.mark.parametrize("tokens", [256, 1024, 4096])
def test_the_shift_of_flux_depends_on_the_resolution(tokens: int) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    scheduler.set_timesteps(sigmas=np.linspace(1, 0.25, 4), mu=calculate_shift(tokens))
    torch.testing.assert_close(few_step_times(4, flux_shift(tokens)), scheduler.sigmas[:-1], rtol=0, atol=FLOAT32)


def test_the_times_of_few_step_flux() -> None:
    torch.testing.assert_close(
        few_step_times(4, flux_shift(4096)), torch.tensor([1, 0.9045, 0.7595, 0.5128]), rtol=0, atol=5e-5
    )


def test_bad_times_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one step"):
        few_step_times(0)
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        Uniform(low=0.5, high=0.5)
