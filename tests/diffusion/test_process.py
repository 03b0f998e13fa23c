"""The rectified flow: its path, its velocity, and the times that training draws."""

import math

import pytest
import torch

from fastdistill.diffusion.process import RectifiedFlow


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_the_path_leads_from_data_to_noise_at_the_velocity() -> None:
    process = RectifiedFlow()
    data, noise = torch.randn(2, 3, 2, 4, 5, generator=generator(), dtype=torch.float64)
    torch.testing.assert_close(process.add_noise(data, noise, torch.zeros(3)), data, rtol=0, atol=0)
    torch.testing.assert_close(process.add_noise(data, noise, torch.ones(3)), noise, rtol=0, atol=0)
    t = torch.tensor([0.2, 0.5, 0.7], dtype=torch.float64)
    step = 1e-4
    slope = (process.add_noise(data, noise, t + step) - process.add_noise(data, noise, t - step)) / (2 * step)
    torch.testing.assert_close(slope, process.velocity(data, noise))


@pytest.mark.parametrize("t", [torch.zeros(()), torch.zeros(2), torch.zeros(3, 1)], ids=["scalar", "wrong length", "two axes"])
def test_one_time_per_sample_or_an_error(t: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="one time per sample"):
        RectifiedFlow().add_noise(torch.zeros(3, 4), torch.zeros(3, 4), t)


def test_a_drawn_point_lies_on_its_path() -> None:
    process, data = RectifiedFlow(), torch.randn(4, 3, 2, 2, generator=generator(1), dtype=torch.float64)
    x_t, t, velocity = process.draw(data, generator())
    torch.testing.assert_close(x_t - t.double().view(-1, 1, 1, 1) * velocity, data)
    again = process.draw(data, generator())
    assert all(torch.equal(one, other) for one, other in zip((x_t, t, velocity), again, strict=True))


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_drawn_times_are_shifted_logit_normal(shift: float) -> None:
    """``t' = s t / (1 + (s - 1) t)`` of a logit-normal ``t`` is logit-normal with location ``log s``."""
    _, t, _ = RectifiedFlow(time_mean=math.log(shift)).draw(torch.zeros(20_000, 1), generator())
    unshifted = torch.logit(t / (shift - (shift - 1) * t))
    assert abs(float(unshifted.mean())) < 0.03
    assert abs(float(unshifted.std()) - 1) < 0.03
