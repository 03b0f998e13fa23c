"""Guidance: its convention, and that the guided field is what it claims to be on exact teachers."""

import pytest
import torch

from fastdistill.data.closed_form import ExactTeacher
from fastdistill.diffusion.guidance import guide, guided
from fastdistill.diffusion.prediction import Prediction, Predictor
from fastdistill.diffusion.process import Process, RectifiedFlow, TrigFlow
from tests.toy import PROCESSES, generator, mixture


def test_one_is_no_guidance_and_zero_unconditional() -> None:
    u, c = torch.randn(2, 3, 4, generator=generator())
    torch.testing.assert_close(guide(u, c, 1.0), c)
    assert torch.equal(guide(u, c, 0.0), u)
    torch.testing.assert_close(guide(u, c, 4.0), c + 3.0 * (c - u))  # Ho & Salimans' w = 3


def test_a_scale_per_sample() -> None:
    u, c = torch.randn(2, 3, 4, 5, generator=generator())
    scales = torch.tensor([0.0, 1.0, 7.5])
    expected = torch.stack([guide(a, b, float(w)) for a, b, w in zip(u, c, scales, strict=True)])
    torch.testing.assert_close(guide(u, c, scales), expected)


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
def test_the_guided_score_is_that_of_the_sharpened_posterior(process: Process) -> None:
    """`u + w (c - u) = grad log [p(x) p(y | x)^w]` up to a constant, `p(y | x) = p(x | y) / p(x)`
    (Ho & Salimans 2022, section 3.2).
    """
    data, scale = mixture(), 3.0
    x, labels = data.draw(64, generator())
    t = torch.linspace(0.05, 0.95, 64, dtype=torch.float64)
    x_t = process.add_noise(x, torch.randn(x.shape, generator=generator(1), dtype=torch.float64), t).requires_grad_()
    log_posterior = data.log_density(x_t, t, process, labels) - data.log_density(x_t, t, process)
    (expected,) = torch.autograd.grad((data.log_density(x_t, t, process) + scale * log_posterior).sum(), x_t)
    for prediction in Prediction:
        field = ExactTeacher(data, process, prediction).predictor(labels, scale=scale)
        torch.testing.assert_close(field(x_t.detach(), t, Prediction.SCORE), expected, rtol=1e-8, atol=1e-8)


def test_guidance_only_inside_its_interval() -> None:
    process = RectifiedFlow()
    conditional, unconditional = (
        Predictor(
            function=lambda x, t, value=value: torch.full_like(x, value),
            process=process,
            prediction=Prediction.VELOCITY,
        )
        for value in (1.0, 0.0)
    )
    t = torch.tensor([0.1, 0.2, 0.5, 0.8, 0.9])
    field = guided(conditional, unconditional, 4.0, interval=(0.2, 0.8))
    assert field(torch.zeros(5, 1), t, Prediction.VELOCITY).squeeze(1).tolist() == [1, 4, 4, 4, 1]
    per_sample = guided(conditional, unconditional, torch.arange(5.0), interval=(0.2, 0.8))
    assert per_sample(torch.zeros(5, 1), t, Prediction.VELOCITY).squeeze(1).tolist() == [1, 1, 2, 3, 1]


def test_predictions_of_two_kinds_are_not_combined() -> None:
    data = mixture()
    velocity = ExactTeacher(data, RectifiedFlow(), Prediction.VELOCITY).predictor()
    for other in (
        ExactTeacher(data, RectifiedFlow(), Prediction.X0),
        ExactTeacher(data, TrigFlow(), Prediction.VELOCITY),
    ):
        with pytest.raises(ValueError, match="one kind and one process"):
            guided(velocity, other.predictor(), 2.0)
