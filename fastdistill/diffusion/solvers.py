"""Solvers that diffusers lacks, for any process: the ODE and the SDE in `t`, and Langevin dynamics.

A solver calls the predictor at the falling `times` (steps,) and ends with its `x_0` at the last
time, which removes the noise that is left there (Tweedie's formula; Jolicoeur-Martineau et al.
2021). On rectified flow the end is Euler's step to `t = 0`.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from fastdistill.diffusion.prediction import Prediction, Predictor
from fastdistill.diffusion.process import noise_like, repeat_time


def _start(predictor: Predictor, noise: Tensor, times: Tensor) -> Tensor:
    return float(predictor.process.sigma(times[0].double())) * noise


@torch.no_grad()
def euler(predictor: Predictor, noise: Tensor, times: Tensor) -> Tensor:
    """Solve the probability-flow ODE `dx/dt = velocity` by Euler's method, an error of first order.

    (Song et al. 2021, equation 13.)
    """
    x = _start(predictor, noise, times)
    for t, t_next in pairwise(times):
        x = x + float(t_next - t) * predictor(x, repeat_time(t, x), Prediction.VELOCITY)
    return predictor(x, repeat_time(times[-1], x), Prediction.X0)


@torch.no_grad()
def heun(predictor: Predictor, noise: Tensor, times: Tensor) -> Tensor:
    """Solve the probability-flow ODE by Heun's method, an error of second order.

    It takes two calls a step (Karras et al. 2022, algorithm 1).
    """
    x = _start(predictor, noise, times)
    for t, t_next in pairwise(times):
        step = float(t_next - t)
        velocity = predictor(x, repeat_time(t, x), Prediction.VELOCITY)
        corrector = predictor(x + step * velocity, repeat_time(t_next, x), Prediction.VELOCITY)
        x = x + step * (velocity + corrector) / 2
    return predictor(x, repeat_time(times[-1], x), Prediction.X0)


@torch.no_grad()
def euler_maruyama(predictor: Predictor, noise: Tensor, times: Tensor, rng: torch.Generator) -> Tensor:
    """Solve the reverse SDE `dx = (f x - g^2 score) dt + g dw` by Euler's method.

    (Song et al. 2021, equation 6.) The error is of first order in distribution. The solver is
    stable where `log_snr` changes by less than 2 a step: `Process.log_snr_times` are the best times
    for it.

    Raises:
        ValueError: a time but the last has `alpha = 0`, where `f` and `g` are infinite.
    """
    process = predictor.process
    drift, diffusion_squared = process.drift(times.double()), process.diffusion_squared(times.double())
    if not bool(drift[:-1].isfinite().all()):
        raise ValueError(
            f"the SDE of {type(process).__name__} is infinite where alpha = 0: "
            f"start it later than t = {float(times[0]):g}"
        )
    x = _start(predictor, noise, times)
    for index, (t, t_next) in enumerate(pairwise(times)):
        f, g_squared, step = float(drift[index]), float(diffusion_squared[index]), float(t - t_next)
        score = predictor(x, repeat_time(t, x), Prediction.SCORE)
        x = x - step * (f * x - g_squared * score) + (step * g_squared) ** 0.5 * noise_like(x, rng)
    return predictor(x, repeat_time(times[-1], x), Prediction.X0)


@torch.no_grad()
def annealed_langevin(
    predictor: Predictor,
    noise: Tensor,
    times: Tensor,
    rng: torch.Generator,
    *,
    corrections: int = 20,
    step_size: float = 0.4,
) -> Tensor:
    """Take `corrections` steps of Langevin dynamics at each time.

    A step is `x <- x + h/2 score + sqrt(h) z`, `h = step_size sigma^2` (Song & Ermon 2019,
    algorithm 1). `step_size` is the step of the standardised state `x / sigma`: the paper's
    `epsilon / sigma_L^2`. The stationary variance is too large by `step_size / 4` of `sigma^2`,
    which later levels forget.
    """
    process = predictor.process
    sigmas, scales = (
        process.sigma(times.double()),
        torch.hypot(process.alpha(times.double()), process.sigma(times.double())),
    )
    x = _start(predictor, noise, times)
    for index, t in enumerate(times):
        if index:
            # Once sigma is below the width of a mode, the steps are too small to follow an alpha
            # that still changes.
            x = x * float(scales[index] / scales[index - 1])
        size = step_size * float(sigmas[index]) ** 2
        for _ in range(corrections):
            x = x + size / 2 * predictor(x, repeat_time(t, x), Prediction.SCORE) + size**0.5 * noise_like(x, rng)
    return predictor(x, repeat_time(times[-1], x), Prediction.X0)
