"""The processes: their ends, their derivatives, their SDE, and how they agree with diffusers'
tables.
"""

import dataclasses

import pytest
import torch
from diffusers import DDPMScheduler

from fastdistill.diffusion.process import (
    CosineVariancePreserving,
    LinearVariancePreserving,
    Process,
    RectifiedFlow,
    TrigFlow,
    VarianceExploding,
    VariancePreserving,
)
from fastdistill.diffusion.timesteps import Uniform
from tests.toy import PROCESSES, generator

every_process = pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
INSIDE = torch.linspace(0.002, 0.998, 97, dtype=torch.float64)
ENDS = torch.tensor([0.0, 1.0], dtype=torch.float64)


@every_process
def test_it_leads_from_data_to_noise(process: Process) -> None:
    alpha, sigma = process.alpha(ENDS), process.sigma(ENDS)
    assert alpha[0] == 1
    if isinstance(process, VarianceExploding):
        torch.testing.assert_close(sigma, torch.tensor([process.sigma_min, process.sigma_max], dtype=torch.float64))
        assert alpha[1] == 1
    else:
        assert sigma[0] == 0
        assert 1 - 2.2e-5 < sigma[1] <= 1  # DDPM leaves exp(-10.05 / 2) of the data
        assert alpha[1] == 0 or isinstance(process, LinearVariancePreserving)
    assert (process.log_snr(INSIDE).diff() < 0).all()


@every_process
@pytest.mark.parametrize("name", ["alpha", "sigma"])
def test_derivatives_are_those_of_autograd(process: Process, name: str) -> None:
    t = INSIDE.clone().requires_grad_()
    (expected,) = torch.autograd.grad(getattr(process, name)(t).sum() + 0 * t.sum(), t)
    torch.testing.assert_close(getattr(process, f"{name}_dot")(INSIDE), expected, rtol=1e-10, atol=1e-12)


@every_process
def test_time_of_log_snr_is_the_inverse(process: Process) -> None:
    torch.testing.assert_close(process.time_of_log_snr(process.log_snr(INSIDE)), INSIDE, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "process", [LinearVariancePreserving(), CosineVariancePreserving(), TrigFlow()], ids=lambda p: type(p).__name__
)
def test_variance_is_preserved_to_the_last_digit_near_data(process: VariancePreserving) -> None:
    t = torch.tensor([1e-9, 1e-6, 1e-3, 0.3, 0.9], dtype=torch.float64)
    torch.testing.assert_close(process.alpha(t) ** 2 + process.sigma(t) ** 2, torch.ones_like(t))
    # sigma^2 is the integral of beta = g^2 to first order, which 1 - alpha^2 would lose.
    slope = process.diffusion_squared(t[:1] / 2)
    torch.testing.assert_close(process.sigma(t[:1]) ** 2, slope * t[:1], rtol=1e-5, atol=0)


@every_process
def test_the_sde_has_these_marginals(process: Process) -> None:
    """`d(alpha)/dt = f alpha` and `d(sigma^2)/dt = 2 f sigma^2 + g^2` (Särkkä & Solin 2019,
    equations 5.50, 5.51), by differences.
    """
    h = 1e-6
    f, g_squared = process.drift(INSIDE), process.diffusion_squared(INSIDE)
    alpha_slope = (process.alpha(INSIDE + h) - process.alpha(INSIDE - h)) / (2 * h)
    variance_slope = (process.sigma(INSIDE + h) ** 2 - process.sigma(INSIDE - h) ** 2) / (2 * h)
    torch.testing.assert_close(f * process.alpha(INSIDE), alpha_slope, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(2 * f * process.sigma(INSIDE) ** 2 + g_squared, variance_slope, rtol=1e-6, atol=1e-7)
    log_snr_slope = (process.log_snr(INSIDE + h) - process.log_snr(INSIDE - h)) / (2 * h)
    torch.testing.assert_close(g_squared, -(process.sigma(INSIDE) ** 2) * log_snr_slope, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("process", "schedule", "tolerance", "time_tolerance"),
    [(LinearVariancePreserving(), "linear", 1e-3, 4e-3), (CosineVariancePreserving(), "squaredcos_cap_v2", 1e-6, 1e-5)],
    ids=["linear", "cosine"],
)
def test_agreement_with_the_tables_of_diffusers(
    process: Process, schedule: str, tolerance: float, time_tolerance: float
) -> None:
    table = DDPMScheduler(beta_schedule=schedule).alphas_cumprod.double()
    t = torch.arange(1, 1001, dtype=torch.float64) / 1000
    torch.testing.assert_close(process.alpha(t) ** 2, table, rtol=0, atol=tolerance)
    times = process.time_of_log_snr(torch.logit(table))
    torch.testing.assert_close(times[:-1], t[:-1], rtol=0, atol=time_tolerance)


def test_the_edm_and_ncsn_schedules_are_geometric() -> None:
    sigma = VarianceExploding(sigma_min=0.01, sigma_max=1.0).sigma(torch.linspace(0, 1, 10, dtype=torch.float64))
    torch.testing.assert_close(sigma[1:] / sigma[:-1], torch.full((9,), 100 ** (1 / 9), dtype=torch.float64))


def test_trig_flow_is_the_arc_from_data_to_noise() -> None:
    process = TrigFlow()
    torch.testing.assert_close(process.alpha(torch.tensor([0.5])), process.sigma(torch.tensor([0.5])))
    # Rectified flow at equal signal-to-noise ratio: t_rf = sin / (sin + cos).
    rectified = RectifiedFlow().time_of_log_snr(process.log_snr(INSIDE))
    torch.testing.assert_close(rectified, process.sigma(INSIDE) / (process.sigma(INSIDE) + process.alpha(INSIDE)))


@every_process
def test_add_noise_is_its_definition_in_the_dtype_of_the_data(process: Process) -> None:
    data, noise = torch.randn(2, 3, 2, 4, 5, generator=generator(), dtype=torch.float64)
    t = torch.tensor([0.2, 0.5, 0.7])
    expected = torch.stack(
        [process.alpha(u) * d + process.sigma(u) * n for d, n, u in zip(data, noise, t.double(), strict=True)]
    )
    torch.testing.assert_close(process.add_noise(data, noise, t), expected)
    assert process.add_noise(data.bfloat16(), noise.bfloat16(), t).dtype is torch.bfloat16


@pytest.mark.parametrize(
    "t", [torch.zeros(()), torch.zeros(2), torch.zeros(3, 1)], ids=["scalar", "wrong length", "two axes"]
)
def test_one_time_per_sample_or_an_error(t: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="one time per sample"):
        RectifiedFlow().add_noise(torch.zeros(3, 4), torch.zeros(3, 4), t)


@every_process
def test_a_drawn_point_lies_on_its_path(process: Process) -> None:
    data = torch.randn(4, 3, 2, 2, generator=generator(1), dtype=torch.float64)
    x_t, t, noise = process.draw(data, Uniform(), generator())
    assert t.shape == (4,)
    torch.testing.assert_close(x_t, process.add_noise(data, noise, t))
    again = process.draw(data, Uniform(), generator())
    assert all(torch.equal(one, other) for one, other in zip((x_t, t, noise), again, strict=True))


@every_process
def test_log_snr_times_are_even_in_it_and_keep_clear_of_the_ends(process: Process) -> None:
    times = process.log_snr_times(21, low=-8, high=8)
    ratios = process.log_snr(times)
    highest = min(8.0, float(process.log_snr(ENDS[:1])))
    lowest = max(-8.0, float(process.log_snr(ENDS[1:])))
    torch.testing.assert_close(ratios, torch.linspace(lowest, highest, 21, dtype=torch.float64))
    assert ((times >= 0) & (times <= 1)).all()


def test_processes_are_values() -> None:
    assert RectifiedFlow() == RectifiedFlow()
    assert VarianceExploding() != VarianceExploding(sigma_max=80.0)
    assert dataclasses.asdict(LinearVariancePreserving()) == {"beta_min": 0.1, "beta_max": 20.0}


@every_process
def test_a_ddim_step_keeps_the_data_and_the_noise_and_tells_the_data(process: Process) -> None:
    rng = generator()
    x_0, noise = (torch.randn(97, 3, generator=rng, dtype=torch.float64) for _ in range(2))
    t, s = INSIDE, INSIDE.flip(0) / 2
    x_t, x_s = process.add_noise(x_0, noise, t), process.add_noise(x_0, noise, s)
    torch.testing.assert_close(process.ddim_step(x_t, x_0, t, s), x_s)
    apart = (t - s).abs() > 1e-3
    torch.testing.assert_close(process.ddim_data(x_t, x_s, t, s)[apart], x_0[apart], rtol=1e-6, atol=1e-6)
    # At t = 0 it is the data, but for the noise that a variance-exploding process leaves there.
    left = process.sigma(ENDS[:1]) * noise
    torch.testing.assert_close(process.ddim_step(x_t, x_0, t, torch.zeros_like(t)), x_0 + left)


def test_a_ddim_step_on_rectified_flow_is_eulers() -> None:
    x_t, velocity = torch.randn(2, 97, 3, generator=generator(), dtype=torch.float64)
    t, s = INSIDE[:, None], INSIDE.flip(0)[:, None]
    step = RectifiedFlow().ddim_step(x_t, x_t - t * velocity, t[:, 0], s[:, 0])
    torch.testing.assert_close(step, x_t + (s - t) * velocity)
