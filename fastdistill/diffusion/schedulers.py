"""Sampling of any predictor by diffusers' schedulers.

A scheduler steps a state `alpha_s x_0 + sigma_s eps` of its own: variance preserving, exploding, or
rectified flow. The state differs by a factor only from the predictor's `x_t` of equal
signal-to-noise ratio. The predictor is asked at the time of that ratio, with the state rescaled, so
that every scheduler fits every process.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    HeunDiscreteScheduler,
)
from torch import Tensor

from fastdistill.diffusion.prediction import Prediction, Predictor
from fastdistill.diffusion.process import Process, repeat_time

# A ratio of 0, pure noise, has no place in schedulers that divide by alpha; this one has t = 0.999
# in rectified flow.
SMALLEST_SNR = 1e-6
# How far outside [0, 1] the time of a scheduler's first or last state may fall by rounding of its
# float32 tables.
TIME_SLACK = 1e-3

Coordinates = Callable[[Any, int], tuple[Tensor, Tensor]]
"""`(scheduler, index of the call) -> (alpha_s, sigma_s)`."""


def _of_cumulated_alphas(scheduler: Any, index: int) -> tuple[Tensor, Tensor]:
    alpha_bar = scheduler.alphas_cumprod[int(scheduler.timesteps[index])].double()
    return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()


def _variance_preserving(scheduler: Any, index: int) -> tuple[Tensor, Tensor]:
    sigma = scheduler.sigmas[index].double()
    alpha = torch.rsqrt(1 + sigma**2)
    return alpha, sigma * alpha


def _variance_exploding(scheduler: Any, index: int) -> tuple[Tensor, Tensor]:
    sigma = scheduler.sigmas[index].double()
    return torch.ones_like(sigma), sigma


def _rectified_flow(scheduler: Any, index: int) -> tuple[Tensor, Tensor]:
    sigma = scheduler.sigmas[index].double()
    return 1 - sigma, sigma


COORDINATES: dict[type, Coordinates] = {
    DDPMScheduler: _of_cumulated_alphas,
    DDIMScheduler: _of_cumulated_alphas,
    DPMSolverMultistepScheduler: _variance_preserving,
    EulerDiscreteScheduler: _variance_exploding,
    HeunDiscreteScheduler: _variance_exploding,
    FlowMatchEulerDiscreteScheduler: _rectified_flow,
    FlowMatchHeunDiscreteScheduler: _rectified_flow,
}


@torch.no_grad()
def run(predictor: Predictor, scheduler: Any, noise: Tensor, rng: torch.Generator) -> Tensor:
    """Draw samples (B, ...) from `noise` (B, ...) by `scheduler`, after its `set_timesteps`.

    Raises:
        ValueError: the scheduler is none of `COORDINATES`, wants another output than `epsilon`,
            `sample` or a velocity, or starts at more noise than the predictor's process has.
    """
    if type(scheduler) not in COORDINATES:
        names = ", ".join(kind.__name__ for kind in COORDINATES)
        raise ValueError(f"no coordinates are known for {type(scheduler).__name__}, only for {names}")
    coordinates = COORDINATES[type(scheduler)]
    options = {"generator": rng} if "generator" in inspect.signature(scheduler.step).parameters else {}
    state = torch.empty_like(noise)
    for index, timestep in enumerate(scheduler.timesteps):
        alpha, sigma = coordinates(scheduler, index)
        if index == 0:
            state = float(sigma) * noise
        t = _time(predictor.process, alpha, sigma)
        x_t = float(predictor.process.sigma(t) / sigma) * state
        x_0 = predictor(x_t, repeat_time(t, noise), Prediction.X0)
        if coordinates is _variance_exploding:
            # Only so that the scheduler does not warn: its scaling is what x_t replaces.
            scheduler.scale_model_input(state, timestep)
        output = _output(scheduler, x_0, state, float(alpha), float(sigma))
        state = scheduler.step(output, timestep, state, **options).prev_sample
    return state


def _time(process: Process, alpha: Tensor, sigma: Tensor) -> Tensor:
    t = process.time_of_log_snr(2 * (alpha.log() - sigma.log()))
    if not -TIME_SLACK <= float(t) <= 1 + TIME_SLACK:
        raise ValueError(
            f"the scheduler visits alpha = {float(alpha):g}, sigma = {float(sigma):g}, which "
            f"{type(process).__name__} does not reach: "
            "give it the sigmas or betas of the process"
        )
    return t.clamp(0, 1)


def _output(scheduler: Any, x_0: Tensor, state: Tensor, alpha: float, sigma: float) -> Tensor:
    """Network output in which the scheduler, by its own state, finds exactly `x_0`."""
    if COORDINATES[type(scheduler)] is _rectified_flow:
        return (state - x_0) / sigma
    match scheduler.config.prediction_type:
        case "sample":
            return x_0
        case "epsilon":
            return (state - alpha * x_0) / sigma
        case other:
            raise ValueError(f"build the scheduler with prediction_type='sample' or 'epsilon' instead of {other!r}")


def betas(process: Process, times: Tensor) -> list[float]:
    """`trained_betas` of a discrete schedule with one row for each of the falling `times` (steps,).

    Row `i` of its `alphas_cumprod` is `alpha^2 / (alpha^2 + sigma^2)` at the `i`-th time from the
    clean end.

    Raises:
        ValueError: the times do not fall strictly, or end without noise, where no step is left to
            take.
    """
    signal = torch.sigmoid(process.log_snr(times.double())).clamp(min=SMALLEST_SNR).flip(0)
    before = torch.cat([torch.ones(1, dtype=torch.float64), signal[:-1]])
    if not bool((signal < before).all()):
        raise ValueError(f"times must fall strictly and end before sigma = 0, got {times.tolist()}")
    return (1 - signal / before).tolist()


def discrete(kind: type, process: Process, times: Tensor, **options: Any) -> Any:
    """Scheduler of discrete betas that visits exactly `times` (steps,), ready to `run`."""
    # "trailing" visits every row of a table with as many rows as steps, in every kind.
    scheduler = kind(
        num_train_timesteps=len(times), trained_betas=betas(process, times), timestep_spacing="trailing", **options
    )
    scheduler.set_timesteps(len(times))
    return scheduler


def flow_euler(process: Process, times: Tensor) -> Any:
    """`FlowMatchEulerDiscreteScheduler` that visits `times` (steps,).

    In the coordinates of the scheduler the times are `sigma / (alpha + sigma)`.
    """
    time = times.double()
    alpha, sigma = process.alpha(time), process.sigma(time)
    scheduler: Any = FlowMatchEulerDiscreteScheduler(shift=1.0)
    scheduler.set_timesteps(sigmas=(sigma / (alpha + sigma)).tolist())
    return scheduler
