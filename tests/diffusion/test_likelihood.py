"""The likelihood of a flow against densities that are known."""

import pytest
import torch

from fastdistill.data.closed_form import ExactTeacher, GaussianMixture
from fastdistill.diffusion.likelihood import log_likelihood
from fastdistill.diffusion.prediction import Prediction
from fastdistill.diffusion.process import Process, RectifiedFlow, TrigFlow
from tests.toy import PROCESSES, gaussian, generator, mixture


@pytest.mark.parametrize("process", [RectifiedFlow(), TrigFlow()], ids=["rectified_flow", "trig_flow"])
def test_it_is_the_density_of_the_data_where_the_flow_has_both_ends(process: Process) -> None:
    data = mixture()
    x, _ = data.draw(50, generator())
    predictor = ExactTeacher(data, process, Prediction.VELOCITY).predictor()
    value = log_likelihood(predictor, x, torch.linspace(0, 1, 101, dtype=torch.float64))
    expected = data.log_density(x, torch.zeros(50, dtype=torch.float64), process)
    torch.testing.assert_close(value, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
def test_it_is_the_density_of_what_the_flow_makes_of_noise(process: Process) -> None:
    """Exact on a Gaussian, whose flow is a known affine map, from the last time's noise to the
    first time's points.
    """
    data, count = gaussian(), 20
    times = process.log_snr_times(120, low=-8, high=6).flip(0)
    first, last = times[:1].expand(count), times[-1:].expand(count)
    x = torch.randn(count, 2, generator=generator(), dtype=torch.float64)
    value = log_likelihood(ExactTeacher(data, process, Prediction.EPSILON).predictor(), x, times)
    jacobian = torch.autograd.functional.jacobian(
        lambda point: data.flow_map(point, first[:1], last[:1], process), x[:1]
    )
    prior = (
        torch.distributions.Normal(0, process.sigma(last[0])).log_prob(data.flow_map(x, first, last, process)).sum(1)
    )
    torch.testing.assert_close(value, prior + torch.linalg.slogdet(jacobian.view(2, 2)).logabsdet, rtol=0, atol=1e-4)


def test_it_is_conditional_on_labels() -> None:
    data, process = mixture(), RectifiedFlow()
    x, labels = data.draw(20, generator())
    value = log_likelihood(
        ExactTeacher(data, process, Prediction.VELOCITY).predictor(labels), x, torch.linspace(0, 1, 101)
    )
    torch.testing.assert_close(value, data.log_density(x, torch.zeros(20), process, labels), rtol=0, atol=1e-5)


def test_an_error_of_fourth_order() -> None:
    data, process = mixture(), RectifiedFlow()
    x, _ = data.draw(30, generator())
    exact = data.log_density(x, torch.zeros(30, dtype=torch.float64), process)
    predictor = ExactTeacher(data, process, Prediction.VELOCITY).predictor()
    errors = [
        float((log_likelihood(predictor, x, torch.linspace(0, 1, n + 1, dtype=torch.float64)) - exact).abs().mean())
        for n in (16, 32)
    ]
    assert errors[0] / errors[1] > 10


def test_hutchinson_is_exact_for_a_diagonal_jacobian() -> None:
    """A Gaussian with diagonal covariance: `z^T J z = tr J` for every `z` of signs."""
    data = GaussianMixture.gaussian(
        torch.zeros(3, dtype=torch.float64), torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64).diag()
    )
    x, _ = data.draw(10, generator())
    predictor = ExactTeacher(data, RectifiedFlow(), Prediction.VELOCITY).predictor()
    times = torch.linspace(0, 1, 11, dtype=torch.float64)
    torch.testing.assert_close(log_likelihood(predictor, x, times, probes=1), log_likelihood(predictor, x, times))


def test_hutchinson_is_unbiased() -> None:
    """4000 copies of a point, one probe each: the mean within four standard errors of the exact
    value, and the spread not zero.
    """
    data, process = mixture(), RectifiedFlow()
    x = torch.tensor([[0.3, -0.2]], dtype=torch.float64)
    predictor = ExactTeacher(data, process, Prediction.VELOCITY).predictor()
    times = torch.linspace(0, 1, 21, dtype=torch.float64)
    estimates = log_likelihood(predictor, x.expand(4000, 2), times, probes=1, rng=generator())
    error = float(estimates.std()) / 4000**0.5
    assert error > 1e-3
    assert float(estimates.mean()) == pytest.approx(float(log_likelihood(predictor, x, times)), abs=4 * error)
    # As many probes divide the spread.
    averaged = log_likelihood(predictor, x.expand(1000, 2), times, probes=4, rng=generator())
    assert float(averaged.std()) == pytest.approx(float(estimates.std()) / 2, rel=0.1)


def test_it_differentiates_nothing_but_the_path() -> None:
    scale = torch.ones(2, dtype=torch.float64, requires_grad=True)
    data = mixture()
    teacher = ExactTeacher(data, RectifiedFlow(), Prediction.VELOCITY).predictor()
    value = log_likelihood(teacher, scale * data.draw(3, generator())[0], torch.linspace(0, 1, 5, dtype=torch.float64))
    assert not value.requires_grad


@pytest.mark.parametrize("times", [[1.0, 0.5, 0.0], [0.0], [0.0, 0.0, 1.0]], ids=["falling", "one", "twice"])
def test_times_must_rise(times: list[float]) -> None:
    predictor = ExactTeacher(mixture(), RectifiedFlow(), Prediction.VELOCITY).predictor()
    with pytest.raises(ValueError, match="must rise"):
        log_likelihood(predictor, torch.zeros(1, 2), torch.tensor(times))
