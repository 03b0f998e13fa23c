"""The exact teachers against densities written out, autograd, and samples."""

import math

import pytest
import torch
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal

from fastdistill.data.closed_form import ExactTeacher, GaussianMixture
from fastdistill.diffusion.prediction import Prediction, convert
from fastdistill.diffusion.process import LinearVariancePreserving, Process, RectifiedFlow
from tests.toy import PROCESSES, gaussian, generator, mixture

every_process = pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)


def marginal(data: GaussianMixture, process: Process, t: float) -> MixtureSameFamily:
    """`p_t` as torch writes it."""
    alpha, sigma = (float(f(torch.tensor(t, dtype=torch.float64))) for f in (process.alpha, process.sigma))
    covariances = alpha**2 * data.covariances + sigma**2 * torch.eye(2, dtype=torch.float64)
    return MixtureSameFamily(Categorical(data.log_weights.exp()), MultivariateNormal(alpha * data.means, covariances))


def noisy_points(process: Process, count: int = 40) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x_0, labels = mixture().draw(count, generator())
    t = torch.linspace(0.03, 0.97, count, dtype=torch.float64)
    return process.add_noise(x_0, torch.randn(x_0.shape, generator=generator(1), dtype=torch.float64), t), t, labels


@every_process
@pytest.mark.parametrize("t", [0.0, 0.3, 0.9, 1.0])
def test_the_density_is_that_of_the_noised_mixture(process: Process, t: float) -> None:
    data = mixture()
    x, _ = data.draw(50, generator())
    times = torch.full((50,), t, dtype=torch.float64)
    torch.testing.assert_close(data.log_density(x, times, process), marginal(data, process, t).log_prob(x))


@every_process
def test_the_score_is_the_gradient_of_the_density(process: Process) -> None:
    data = mixture()
    x_t, t, labels = noisy_points(process)
    x_t.requires_grad_()
    for condition in (None, labels, torch.full_like(labels, data.null_label)):
        (expected,) = torch.autograd.grad(data.log_density(x_t, t, process, condition).sum(), x_t)
        torch.testing.assert_close(data.predict(x_t, t, process, Prediction.SCORE, condition), expected)


@every_process
@pytest.mark.parametrize("prediction", Prediction, ids=lambda p: p.value)
def test_every_prediction_is_the_score_in_other_words(process: Process, prediction: Prediction) -> None:
    data = mixture()
    x_t, t, labels = noisy_points(process)
    score = data.predict(x_t, t, process, Prediction.SCORE, labels)
    expected = convert(score, x_t, t, process, Prediction.SCORE, prediction)
    torch.testing.assert_close(ExactTeacher(data, process, prediction)(x_t, t, labels), expected, rtol=1e-8, atol=1e-8)


def test_the_denoiser_is_the_mean_of_the_data_given_the_point() -> None:
    """Against importance sampling from the prior: 200 000 draws, an error of 0.005 with about 4000
    effective ones.
    """
    data, process = mixture(), RectifiedFlow()
    x_0, _ = data.draw(200_000, generator())
    x_t, t = torch.tensor([[0.2, -0.3]], dtype=torch.float64), torch.tensor([0.5], dtype=torch.float64)
    weights = torch.softmax(-((x_t - 0.5 * x_0).square().sum(1)) / (2 * 0.25), dim=0)
    torch.testing.assert_close(data.predict(x_t, t, process, Prediction.X0)[0], weights @ x_0, rtol=0, atol=0.01)


def test_samples_have_its_moments_weights_and_labels() -> None:
    data, count = mixture(), 100_000
    x, labels = data.draw(count, generator())
    # Four standard errors of the largest: sd 1.1 / sqrt(count), and twice that for a variance.
    torch.testing.assert_close(x.mean(0), data.mean(), rtol=0, atol=0.014)
    torch.testing.assert_close(torch.cov(x.T), data.covariance(), rtol=0, atol=0.03)
    expected = torch.tensor([0.15, 0.25, 0.6])
    torch.testing.assert_close(torch.bincount(labels) / count, expected, rtol=0, atol=0.0065)
    of_two = data.given(2)
    torch.testing.assert_close(x[labels == 2].mean(0), of_two.mean(), rtol=0, atol=0.016)
    torch.testing.assert_close(torch.cov(x[labels == 2].T), of_two.covariance(), rtol=0, atol=0.03)
    again, _ = data.draw(count, generator())
    assert torch.equal(x, again)


def test_labels_choose_components() -> None:
    data, process = mixture(), RectifiedFlow()
    x_t, t, _ = noisy_points(process)
    for label in range(4):
        labels = torch.full((len(x_t),), label)
        expected = data.given(label).log_density(x_t, t, process)
        torch.testing.assert_close(data.log_density(x_t, t, process, labels), expected)
    assert data.null_label == 3
    torch.testing.assert_close(data.given(3).log_density(x_t, t, process), data.log_density(x_t, t, process))
    # Total probability: the unconditional density is the mean of the conditional ones over the
    # classes.
    conditional = torch.stack([data.log_density(x_t, t, process, torch.full((len(x_t),), label)) for label in range(3)])
    prior = torch.tensor([0.15, 0.25, 0.6], dtype=torch.float64).log()[:, None]
    torch.testing.assert_close(torch.logsumexp(conditional + prior, 0), data.log_density(x_t, t, process))


def test_responsibilities_are_those_of_bayes() -> None:
    data = mixture()
    x, _ = data.draw(20, generator())
    densities = torch.stack(
        [MultivariateNormal(m, c).log_prob(x) for m, c in zip(data.means, data.covariances, strict=True)], dim=1
    )
    torch.testing.assert_close(data.responsibilities(x), torch.softmax(densities + data.log_weights, dim=1))


@every_process
def test_the_flow_of_a_gaussian_solves_its_ode(process: Process) -> None:
    data = gaussian()
    x_t = torch.randn(5, 2, generator=generator(), dtype=torch.float64)
    t, s = torch.full((5,), 0.7, dtype=torch.float64), torch.linspace(0.1, 0.9, 5, dtype=torch.float64)
    h = 1e-5
    slope = (data.flow_map(x_t, t, s + h, process) - data.flow_map(x_t, t, s - h, process)) / (2 * h)
    there = data.flow_map(x_t, t, s, process)
    torch.testing.assert_close(data.predict(there, s, process, Prediction.VELOCITY), slope, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(data.flow_map(x_t, t, t, process), x_t)
    torch.testing.assert_close(data.flow_map(there, s, t, process), x_t)


def test_the_gradient_of_distribution_matching_on_gaussians() -> None:
    """`E[(x0_fake - x0_real)]` for `x = m + b z`: `(m - mu) t^2 / V_r` in `m`, in closed form for
    rectified flow.
    """
    mu, s, m, b, t = 1.3, 0.7, -0.4, 1.6, 0.5
    real, fake = (
        GaussianMixture.gaussian(
            torch.tensor([mean], dtype=torch.float64), torch.tensor([[sd**2]], dtype=torch.float64)
        )
        for mean, sd in ((mu, s), (m, b))
    )
    process, count = RectifiedFlow(), 400_000
    z, noise = torch.randn(2, count, 1, generator=generator(), dtype=torch.float64)
    times = torch.full((count,), t, dtype=torch.float64)
    x_t = process.add_noise(m + b * z, noise, times)
    difference = fake.predict(x_t, times, process, Prediction.X0) - real.predict(x_t, times, process, Prediction.X0)
    v_r, v_f = (1 - t) ** 2 * s**2 + t**2, (1 - t) ** 2 * b**2 + t**2
    # The difference has standard deviation 0.7: an error of 0.001 is one standard error.
    assert float(difference.mean()) == pytest.approx((m - mu) * t**2 / v_r, abs=0.004)
    assert float((difference * z).mean()) == pytest.approx(
        b * (1 - t) ** 2 * t**2 * (b**2 - s**2) / (v_f * v_r), abs=0.006
    )


def test_a_teacher_keeps_the_dtype_of_its_points_and_has_nothing_to_train() -> None:
    teacher = ExactTeacher(mixture().float(), LinearVariancePreserving(), Prediction.EPSILON)
    assert list(teacher.parameters()) == []
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        assert teacher(torch.zeros(2, 2, dtype=dtype), torch.full((2,), 0.5)).dtype is dtype


def test_a_gaussian_has_its_moments() -> None:
    data = gaussian()
    torch.testing.assert_close(data.mean(), torch.tensor([0.7, -0.4], dtype=torch.float64))
    torch.testing.assert_close(data.covariance(), torch.tensor([[0.5, 0.2], [0.2, 0.3]], dtype=torch.float64))
    entropy = 0.5 * math.log((2 * math.pi * math.e) ** 2 * 0.11)
    x, _ = data.draw(50_000, generator())
    density = data.log_density(x, torch.zeros(50_000, dtype=torch.float64), RectifiedFlow())
    assert float(-density.mean()) == pytest.approx(entropy, abs=0.02)  # four standard errors of a chi-square / 2


IDENTITY = torch.eye(2).expand(2, 2, 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": torch.ones(3)}, "need as many"),
        ({"weights": torch.tensor([1.0, 0.0])}, "positive"),
        ({"covariances": -IDENTITY}, "positive definite"),
        ({"covariances": IDENTITY + torch.tensor([[0.0, 0.3], [0.0, 0.0]])}, "symmetric"),
        ({"labels": torch.tensor([0, 2])}, "without gaps"),
    ],
    ids=["shape", "weight", "definite", "symmetric", "labels"],
)
def test_what_is_no_mixture_is_refused(change: dict[str, torch.Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GaussianMixture(
            **{"weights": torch.ones(2), "means": torch.zeros(2, 2), "covariances": IDENTITY, "labels": None} | change
        )


def test_unknown_labels_are_refused() -> None:
    data = mixture()
    with pytest.raises(ValueError, match="null label"):
        data.predict(torch.zeros(1, 2), torch.ones(1), RectifiedFlow(), Prediction.X0, torch.tensor([4]))
    with pytest.raises(ValueError, match="no component"):
        data.given(7)
    with pytest.raises(ValueError, match="single Gaussian"):
        data.flow_map(torch.zeros(1, 2), torch.ones(1), torch.zeros(1), RectifiedFlow())
