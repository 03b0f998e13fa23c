"""Exact log-likelihood under a probability flow, by the instantaneous change of variables."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor

from fastdistill.diffusion.prediction import Prediction, Predictor
from fastdistill.diffusion.process import repeat_time


def log_likelihood(
    predictor: Predictor, x: Tensor, times: Tensor, *, probes: int | None = None, rng: torch.Generator | None = None
) -> Tensor:
    """Log-likelihood `log p(x)` (B,) in nats of `x` (B, ...), under the samples of a flow.

    The flow `dx/dt = velocity` makes samples of noise `N(0, sigma_1^2 I)`.

    `log p_0(x_0) = log N(x_1; 0, sigma_1^2 I) + int_0^1 div velocity(x_t, t) dt` (Chen et al. 2018,
    theorem 1; FFJORD, Grathwohl et al. 2019; Song et al. 2021, equation 39), integrated from data
    to noise by the classical Runge-Kutta method, an error of fourth order. The density of the data
    differs from `p` where `alpha_1 > 0`, by `alpha_1 E[x_0] x_1 / sigma_1^2` to first order.

    Args:
        times: (steps + 1,), rising, from the time of `x` to 1. The time of `x` is 0, or a little
            later where the velocity is not defined at 0: the density is then the density of `x_t`.
        probes: number of Rademacher vectors to estimate the divergence by, the same along the whole
            path: `E[z^T J z] = tr J` (Hutchinson 1990). The estimate is unbiased, and takes
            `probes` backward passes a call of the velocity. By default the divergence is exact, and
            takes one backward pass for each dimension.

    Raises:
        ValueError: `times` do not rise, or the velocity is not defined at one of them.
    """
    if times.ndim != 1 or len(times) < 2 or not bool((times.diff() > 0).all()):
        raise ValueError(f"times must rise, from data to noise, got {times.tolist()}")
    dimensions = x[0].numel()
    if probes is None:
        directions = (
            torch.eye(dimensions, device=x.device, dtype=x.dtype).view(dimensions, 1, *x.shape[1:]).expand(-1, *x.shape)
        )
    else:
        rng = rng if rng is not None else torch.Generator().manual_seed(0)
        signs = torch.randint(2, (probes, *x.shape), generator=rng, device=rng.device)
        directions = (2 * signs - 1).to(x) / math.sqrt(probes)

    def slope(x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        return _velocity_and_divergence(predictor, x_t, repeat_time(t, x), directions)

    x = x.detach()
    integral = x.new_zeros(x.shape[0])
    for t, t_next in pairwise(times):
        step, middle = float(t_next - t), (t + t_next) / 2
        v_1, d_1 = slope(x, t)
        v_2, d_2 = slope(x + step / 2 * v_1, middle)
        v_3, d_3 = slope(x + step / 2 * v_2, middle)
        v_4, d_4 = slope(x + step * v_3, t_next)
        x = x + step / 6 * (v_1 + 2 * v_2 + 2 * v_3 + v_4)
        integral = integral + step / 6 * (d_1 + 2 * d_2 + 2 * d_3 + d_4)
    sigma = float(predictor.process.sigma(times[-1].double()))
    prior = -(x.flatten(1) / sigma).square().sum(1) / 2 - dimensions * math.log(sigma * math.sqrt(2 * math.pi))
    return prior + integral


@torch.enable_grad()
def _velocity_and_divergence(predictor: Predictor, x_t: Tensor, t: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
    """Velocity (B, ...) and `sum_i z_i^T J z_i` (B,) over `directions` (N, B, ...)."""
    x_t = x_t.detach().requires_grad_()
    velocity = predictor(x_t, t, Prediction.VELOCITY)
    divergence = x_t.new_zeros(x_t.shape[0])
    for z in directions:
        (product,) = torch.autograd.grad(velocity, x_t, z, retain_graph=True)
        divergence += (product * z).flatten(1).sum(1)
    return velocity.detach(), divergence
