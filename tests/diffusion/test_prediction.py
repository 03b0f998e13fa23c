"""The one conversion: every pair of predictions, for every process, and its ends."""

import itertools

import pytest
import torch

from fastdistill.diffusion.prediction import Prediction, Predictor, convert
from fastdistill.diffusion.process import (
    CosineVariancePreserving,
    LinearVariancePreserving,
    Process,
    RectifiedFlow,
    TrigFlow,
)
from tests.toy import PROCESSES, generator

every_process = pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
PAIRS = list(itertools.permutations(Prediction, 2))


def points(process: Process, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    """Data, noise, times away from the ends, and the points between."""
    x_0, noise = torch.randn(2, 9, 2, 3, generator=generator(), dtype=torch.float64).to(dtype)
    t = torch.linspace(0.02, 0.98, 9, dtype=torch.float64)
    return x_0, noise, t, process.add_noise(x_0, noise, t)


@every_process
@pytest.mark.parametrize(("source", "target"), PAIRS, ids=lambda p: p.value)
def test_conversions_hit_the_target_and_come_back(process: Process, source: Prediction, target: Prediction) -> None:
    x_0, noise, t, x_t = points(process)
    given = source.target(process, x_0, noise, t)
    converted = convert(given, x_t, t, process, source, target)
    torch.testing.assert_close(converted, target.target(process, x_0, noise, t), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(convert(converted, x_t, t, process, target, source), given, rtol=1e-9, atol=1e-9)


@every_process
def test_targets_are_their_definitions(process: Process) -> None:
    x_0, noise, t, x_t = points(process)
    time = t.view(-1, 1, 1)
    alpha, sigma = process.alpha(time), process.sigma(time)
    target = {prediction: prediction.target(process, x_0, noise, t) for prediction in Prediction}
    assert torch.equal(target[Prediction.X0], x_0)
    assert torch.equal(target[Prediction.EPSILON], noise)
    torch.testing.assert_close(target[Prediction.V], alpha * noise - sigma * x_0)
    h = 1e-6
    slope = (process.add_noise(x_0, noise, t + h) - process.add_noise(x_0, noise, t - h)) / (2 * h)
    torch.testing.assert_close(target[Prediction.VELOCITY], slope, rtol=1e-6, atol=1e-6)
    # The score of N(alpha x_0, sigma^2), whose mean over x_0 is the marginal's (Vincent 2011).
    torch.testing.assert_close(target[Prediction.SCORE], -(x_t - alpha * x_0) / sigma**2)


def test_the_velocity_of_rectified_flow_is_what_flux_predicts() -> None:
    x_0, noise, t, _ = points(RectifiedFlow())
    assert torch.equal(Prediction.VELOCITY.target(RectifiedFlow(), x_0, noise, t), noise - x_0)


def test_v_of_trig_flow_is_the_derivative_by_the_angle() -> None:
    x_0, noise, t, _ = points(TrigFlow())
    velocity, v = (p.target(TrigFlow(), x_0, noise, t) for p in (Prediction.VELOCITY, Prediction.V))
    torch.testing.assert_close(velocity, torch.pi / 2 * v)


@pytest.mark.parametrize("t", [0.0, 1.0])
@pytest.mark.parametrize("source", [Prediction.VELOCITY, Prediction.V], ids=lambda p: p.value)
@pytest.mark.parametrize("process", [RectifiedFlow(), TrigFlow()], ids=["rectified_flow", "trig_flow"])
def test_velocities_and_v_determine_data_and_noise_at_both_ends(process: Process, source: Prediction, t: float) -> None:
    x_0, noise, _, _ = points(process)
    time = torch.full((9,), t, dtype=torch.float64)
    x_t = process.add_noise(x_0, noise, time)
    given = source.target(process, x_0, noise, time)
    for target in (Prediction.X0, Prediction.EPSILON):
        torch.testing.assert_close(
            convert(given, x_t, time, process, source, target), target.target(process, x_0, noise, time)
        )


@pytest.mark.parametrize(
    ("process", "t", "source", "target"),
    [
        (RectifiedFlow(), 1.0, Prediction.EPSILON, Prediction.X0),
        (RectifiedFlow(), 1.0, Prediction.SCORE, Prediction.VELOCITY),
        (CosineVariancePreserving(), 1.0, Prediction.EPSILON, Prediction.X0),
        (RectifiedFlow(), 0.0, Prediction.X0, Prediction.EPSILON),
        (RectifiedFlow(), 0.0, Prediction.X0, Prediction.VELOCITY),
        (RectifiedFlow(), 0.0, Prediction.VELOCITY, Prediction.SCORE),
        (TrigFlow(), 0.0, Prediction.EPSILON, Prediction.SCORE),
        (LinearVariancePreserving(), 0.0, Prediction.EPSILON, Prediction.VELOCITY),
    ],
    ids=lambda value: getattr(value, "value", None),
)
def test_what_is_not_determined_is_an_error(process: Process, t: float, source: Prediction, target: Prediction) -> None:
    times = torch.tensor([0.5, t])
    with pytest.raises(ValueError, match=f"{source.value} does not determine {target.value}"):
        convert(torch.ones(2, 3), torch.ones(2, 3), times, process, source, target)


def test_noise_and_score_tell_each_other_where_they_do_not_tell_the_data() -> None:
    score = convert(
        torch.full((1, 3), 2.0), torch.ones(1, 3), torch.ones(1), RectifiedFlow(), Prediction.EPSILON, Prediction.SCORE
    )
    torch.testing.assert_close(score, torch.full((1, 3), -2.0))
    epsilon = convert(score, torch.ones(1, 3), torch.ones(1), RectifiedFlow(), Prediction.SCORE, Prediction.EPSILON)
    torch.testing.assert_close(epsilon, torch.full((1, 3), 2.0))


@pytest.mark.parametrize(
    ("p", "x_t", "expected"),
    [
        (torch.bfloat16, torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.float32, torch.float32, torch.float32),
        (torch.float32, torch.float64, torch.float64),
    ],
)
@pytest.mark.parametrize("target", [Prediction.VELOCITY, Prediction.X0])
def test_halves_are_computed_in_float32(
    p: torch.dtype, x_t: torch.dtype, expected: torch.dtype, target: Prediction
) -> None:
    converted = convert(
        torch.ones(2, 3, dtype=p),
        torch.ones(2, 3, dtype=x_t),
        torch.ones(2),
        RectifiedFlow(),
        Prediction.VELOCITY,
        target,
    )
    assert converted.dtype is expected


def test_a_predictor_converts_what_its_function_returns() -> None:
    process = RectifiedFlow()
    x_0, noise, t, x_t = points(process)
    predictor = Predictor(function=lambda x, time: noise - x_0, process=process, prediction=Prediction.VELOCITY)
    torch.testing.assert_close(predictor(x_t, t, Prediction.X0), x_0)
    torch.testing.assert_close(predictor(x_t, t, Prediction.VELOCITY), noise - x_0)


def test_gradients_flow_through_both_arguments() -> None:
    process = CosineVariancePreserving()
    _, _, t, x_t = points(process)
    p = torch.randn(x_t.shape, generator=generator(2), dtype=torch.float64).requires_grad_()
    x_t.requires_grad_()
    torch.autograd.gradcheck(lambda p, x: convert(p, x, t, process, Prediction.V, Prediction.SCORE), (p, x_t))
