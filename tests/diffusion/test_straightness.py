"""Straightness: closed forms on Gaussians."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastdistill.data.closed_form import ExactTeacher, GaussianMixture
from fastdistill.diffusion.prediction import Prediction, Predictor
from fastdistill.diffusion.process import RectifiedFlow, TrigFlow
from fastdistill.diffusion.straightness import straightness
from tests.toy import quasi_random_noise

FLOW = RectifiedFlow()


def test_straight_lines_have_none() -> None:
    """`x_t = (1 - t)(m + s z) + t z`: every point moves towards `m + s z` at a speed of its own."""

    def velocity(x_t: Tensor, t: Tensor) -> Tensor:
        t = t[:, None]
        z = (x_t - (1 - t) * 2) / ((1 - t) * 0.3 + t)
        return z - (2 + 0.3 * z)

    predictor = Predictor(function=velocity, process=FLOW, prediction=Prediction.VELOCITY)
    assert abs(straightness(predictor, quasi_random_noise(1024))) < 1e-4


def test_the_flow_of_a_gaussian_has_that_of_its_closed_form() -> None:
    """`x_t = sqrt(V_t) z`, `V_t = (1 - t)^2 s^2 + t^2`:
    `int (d sqrt(V) / dt)^2 dt / (1 - s)^2 - 1`.
    """
    s = 0.3
    t = torch.linspace(0, 1, 100_001, dtype=torch.float64)
    speed = (t - (1 - t) * s**2) / ((1 - t) ** 2 * s**2 + t**2).sqrt()
    expected = float(torch.trapezoid(speed**2, t)) / (1 - s) ** 2 - 1
    data = GaussianMixture.gaussian(torch.zeros(2, dtype=torch.float64), s**2 * torch.eye(2, dtype=torch.float64))
    predictor = ExactTeacher(data, FLOW, Prediction.VELOCITY).predictor()
    assert straightness(predictor, quasi_random_noise(1024), steps=256) == pytest.approx(expected, rel=2e-3)
    assert expected > 0.1


def test_it_is_a_property_of_rectified_flow() -> None:
    predictor = Predictor(function=lambda x_t, t: x_t, process=TrigFlow(), prediction=Prediction.VELOCITY)
    with pytest.raises(ValueError, match="not of TrigFlow"):
        straightness(predictor, torch.zeros(2, 2))
