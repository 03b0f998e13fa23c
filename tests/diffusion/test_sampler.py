"""Every sampler on every process: the distribution it reaches, and the exact flow it follows."""

import math

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler, PNDMScheduler

from fastdistill.data.closed_form import ExactTeacher
from fastdistill.diffusion import schedulers
from fastdistill.diffusion.prediction import Prediction, Predictor
from fastdistill.diffusion.process import LinearVariancePreserving, Process, RectifiedFlow, TrigFlow, VarianceExploding
from fastdistill.diffusion.sampler import SAMPLERS, sample
from fastdistill.diffusion.timesteps import few_step_times
from tests.toy import PROCESSES, gaussian, generator, mixture, quasi_random_noise

# The steps at which a sampler's own error is below the tolerances that follow.
DETERMINISTIC = {
    "ddim": 200,
    "dpmsolver++": 40,
    "euler": 200,
    "heun": 40,
    "flow_euler": 200,
    "ode_euler": 400,
    "ode_heun": 60,
}
STOCHASTIC = {"ddpm": 200, "sde-dpmsolver++": 100, "euler_maruyama": 200, "annealed_langevin": 30}
# The order of convergence. The last step, to x_0 from the last time's noise, is common to all and
# part of the exact solution below.
ORDER = {"ddim": 1, "dpmsolver++": 2, "euler": 1, "heun": 2, "flow_euler": 1, "ode_euler": 1, "ode_heun": 2}

every_process = pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)


def test_the_tables_name_every_sampler() -> None:
    assert set(DETERMINISTIC) | set(STOCHASTIC) == set(SAMPLERS)
    assert set(ORDER) == set(DETERMINISTIC)


@pytest.mark.slow_but_first("sampler")
@every_process
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_samples_have_the_moments_and_mode_weights_of_the_mixture(process: Process, sampler: str) -> None:
    """Mode weights, mean, covariance, and the volume `sqrt(det)` of each mode's covariance,
    relative to the true one.

    Deterministic samplers map 1024 evenly spread points, which scatter little: the tolerances are
    their errors at these steps. Those that draw noise have 4096 samples, and four standard errors:
    `sqrt(w (1 - w) / N)` of a weight, 1.04 / sqrt(N) of the mean, `sqrt(2 / N)` of a variance,
    `1 / sqrt(w N)` of a mode's volume.
    """
    data = mixture()
    if sampler in DETERMINISTIC:
        steps, count = DETERMINISTIC[sampler], 1024
        weight, mean, covariance, volume = 0.015, 0.015, 0.05, 0.08
    else:
        steps, count = STOCHASTIC[sampler], 4096
        weight, mean, covariance, volume = 0.03, 0.065, 0.095, 0.16
    predictor = ExactTeacher(data, process, Prediction.VELOCITY).predictor()
    x = sample(predictor, quasi_random_noise(count), process.log_snr_times(steps), sampler=sampler, rng=generator())
    responsibilities = data.responsibilities(x)
    torch.testing.assert_close(responsibilities.mean(0), data.log_weights.exp(), rtol=0, atol=weight)
    torch.testing.assert_close(x.mean(0), data.mean(), rtol=0, atol=mean)
    torch.testing.assert_close(torch.cov(x.T), data.covariance(), rtol=0, atol=covariance)
    modes = responsibilities.argmax(1)
    volumes = torch.stack([torch.linalg.det(torch.cov(x[modes == k].T)) for k in range(4)]).sqrt()
    torch.testing.assert_close(
        volumes / torch.linalg.det(data.covariances).sqrt(), torch.ones_like(volumes), rtol=0, atol=volume
    )


@pytest.mark.slow_but_first("sampler")
@every_process
@pytest.mark.parametrize("sampler", DETERMINISTIC)
def test_it_converges_to_the_exact_flow_of_a_gaussian(process: Process, sampler: str) -> None:
    """Sample by sample, at the order that it claims: doubled steps divide the error by 2^order,
    within a factor of 1.5.
    """
    data = gaussian()
    teacher = ExactTeacher(data, process, Prediction.VELOCITY).predictor()
    noise = torch.randn(16, 2, generator=generator(), dtype=torch.float64)
    errors = []
    for steps in (160, 320) if ORDER[sampler] == 1 else (50, 100):
        times = process.log_snr_times(steps, low=-8, high=6)
        first, last = (time.expand(16) for time in (times[0], times[-1]))
        start = process.sigma(first)[:, None] * noise
        exact = data.predict(data.flow_map(start, first, last, process), last, process, Prediction.X0)
        errors.append(float((sample(teacher, noise, times, sampler=sampler) - exact).abs().max()))
    assert errors[1] < 0.1
    assert math.log2(errors[0] / errors[1]) == pytest.approx(ORDER[sampler], abs=0.6)


@pytest.mark.parametrize("prediction", [p for p in Prediction if p is not Prediction.VELOCITY], ids=lambda p: p.value)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_what_the_network_predicts_makes_no_difference(sampler: str, prediction: Prediction) -> None:
    process, noise = LinearVariancePreserving(), torch.randn(8, 2, generator=generator(), dtype=torch.float64)
    results = [
        sample(
            ExactTeacher(mixture(), process, p).predictor(),
            noise,
            process.log_snr_times(6),
            sampler=sampler,
            rng=generator(),
        )
        for p in (prediction, Prediction.VELOCITY)
    ]
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("sampler", STOCHASTIC)
def test_the_same_generator_draws_the_same_samples(sampler: str) -> None:
    predictor = ExactTeacher(mixture(), TrigFlow(), Prediction.V).predictor()
    noise, times = torch.randn(4, 2, generator=generator()), TrigFlow().log_snr_times(5)
    first, second, other = (sample(predictor, noise, times, sampler=sampler, rng=generator(seed)) for seed in (0, 0, 1))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    assert first.dtype is torch.float32


def test_few_steps_are_those_of_a_flux_pipeline() -> None:
    """The loop of `FluxPipeline`: the scheduler's step on the raw velocity.

    ODE, DDIM and flow matching are one thing here.
    """
    process, shift = RectifiedFlow(), 3.0
    teacher = ExactTeacher(mixture().float(), process, Prediction.VELOCITY)
    noise = torch.randn(32, 2, generator=generator())
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / 4, 4))
    latents = noise
    for timestep in scheduler.timesteps:
        latents = scheduler.step(teacher(latents, (timestep / 1000).expand(32)), timestep, latents, return_dict=False)[
            0
        ]
    for sampler in ("flow_euler", "ode_euler"):
        result = sample(teacher.predictor(), noise, few_step_times(4, shift), sampler=sampler)
        torch.testing.assert_close(result, latents, rtol=0, atol=2e-5)
    # Without alpha = 0, which a table of betas cannot hold: there the last SNR is 1e-6.
    result = sample(teacher.predictor(), noise, few_step_times(4, shift), sampler="ddim")
    torch.testing.assert_close(result, latents, rtol=0, atol=5e-3)


def test_the_predictor_is_called_at_the_times() -> None:
    for process in (RectifiedFlow(), VarianceExploding()):
        times = process.log_snr_times(5, low=-6, high=6)
        for sampler in ("ddpm", "ddim", "dpmsolver++", "euler", "flow_euler", "ode_euler", "euler_maruyama"):
            seen = []

            def network(x: torch.Tensor, t: torch.Tensor, seen: list[float] = seen) -> torch.Tensor:
                seen.append(float(t[0]))
                return torch.zeros_like(x)

            predictor = Predictor(function=network, process=process, prediction=Prediction.X0)
            sample(predictor, torch.ones(1, 2, dtype=torch.float64), times, sampler=sampler)
            assert seen == pytest.approx(times.tolist(), abs=2e-5), sampler


def test_a_users_own_scheduler_of_another_process() -> None:
    """Stable Diffusion's DDIM on a rectified flow: other times and another state, the same
    distribution.
    """
    data = mixture()
    scheduler = DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False)
    scheduler.set_timesteps(200)
    predictor = ExactTeacher(data, RectifiedFlow(), Prediction.VELOCITY).predictor()
    x = schedulers.run(predictor, scheduler, quasi_random_noise(1024), generator())
    torch.testing.assert_close(data.responsibilities(x).mean(0), data.log_weights.exp(), rtol=0, atol=0.02)
    # Its last alpha still holds 7 % of the data, and is started from noise alone.
    torch.testing.assert_close(x.mean(0), data.mean(), rtol=0, atol=0.06)
    torch.testing.assert_close(torch.cov(x.T), data.covariance(), rtol=0, atol=0.06)


def test_heun_of_flow_matching() -> None:
    data = gaussian()
    scheduler = FlowMatchHeunDiscreteScheduler()
    scheduler.set_timesteps(100)
    noise, one = torch.randn(8, 2, generator=generator(), dtype=torch.float64), torch.ones(8, dtype=torch.float64)
    predictor = ExactTeacher(data, RectifiedFlow(), Prediction.X0).predictor()
    exact = data.flow_map(noise, one, 0 * one, RectifiedFlow())
    torch.testing.assert_close(schedulers.run(predictor, scheduler, noise, generator()), exact, rtol=0, atol=1e-3)


def test_guidance_concentrates_samples_on_the_label() -> None:
    data, process = mixture(), RectifiedFlow()
    labels, teacher = torch.full((256,), 2), ExactTeacher(mixture(), RectifiedFlow(), Prediction.VELOCITY)
    shares = []
    for scale in (0.0, 1.0, 3.0):
        x = sample(
            teacher.predictor(labels, scale=scale), quasi_random_noise(256), process.log_snr_times(40), sampler="heun"
        )
        t = torch.zeros(256, dtype=torch.float64)
        shares.append(
            float(
                (data.log_density(x, t, process, labels) + math.log(0.6) - data.log_density(x, t, process)).exp().mean()
            )
        )
    assert shares[0] == pytest.approx(0.6, abs=0.02)
    assert shares[1] > 0.97
    assert shares[2] > shares[1]


def test_bad_requests_say_what_to_do() -> None:
    process = RectifiedFlow()
    predictor = ExactTeacher(mixture(), process, Prediction.VELOCITY).predictor()
    noise = torch.randn(2, 2, generator=generator())
    with pytest.raises(ValueError, match="there are ddpm, ddim"):
        sample(predictor, noise, few_step_times(4), sampler="dimm")
    with pytest.raises(ValueError, match="falling"):
        sample(predictor, noise, few_step_times(4).flip(0), sampler="ddim")
    with pytest.raises(ValueError, match=r"before sigma = 0"):
        sample(predictor, noise, torch.tensor([1.0, 0.5, 0.0]), sampler="ddim")
    with pytest.raises(ValueError, match=r"start it later than t = 1"):
        sample(predictor, noise, few_step_times(4), sampler="euler_maruyama")
    with pytest.raises(ValueError, match="no coordinates are known for PNDMScheduler"):
        schedulers.run(predictor, PNDMScheduler(), noise, generator())
    of_v = schedulers.discrete(DDIMScheduler, process, few_step_times(4), prediction_type="v_prediction")
    with pytest.raises(ValueError, match="prediction_type='sample'"):
        schedulers.run(predictor, of_v, noise, generator())
    exploding = ExactTeacher(mixture(), VarianceExploding(), Prediction.X0).predictor()
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(4)
    with pytest.raises(ValueError, match="VarianceExploding does not reach"):
        schedulers.run(exploding, scheduler, noise, generator())
