"""Straightness of a flow: the straighter, the fewer steps it needs.

(Liu et al. 2022, arXiv 2209.03003, equation 7.)
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastdistill.diffusion.prediction import Prediction, Predictor
from fastdistill.diffusion.process import RectifiedFlow, repeat_time


@torch.no_grad()
def straightness(predictor: Predictor, noise: Tensor, steps: int = 64) -> float:
    """Integral `int_0^1 E |(x_1 - x_0) - v(x_t, t)|^2 dt`, relative to `E |x_1 - x_0|^2`.

    The rectified flow from `noise` (B, ...) is solved by `steps` of Heun's method, and the squared
    speed averaged by the trapezoidal rule at the steps. The result is zero if and only if every
    trajectory is a straight line of constant speed, which one step of Euler's method solves
    exactly.

    Raises:
        ValueError: the process is not rectified flow, whose `t` measures the way.
    """
    if not isinstance(predictor.process, RectifiedFlow):
        raise ValueError(f"straightness is a property of rectified flow, not of {type(predictor.process).__name__}")
    times = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    x, squares = noise, torch.zeros((), dtype=torch.float64)
    velocity = predictor(x, repeat_time(times[0], x), Prediction.VELOCITY)
    for t_next in times[1:]:
        ahead = predictor(x - velocity / steps, repeat_time(t_next, x), Prediction.VELOCITY)
        x = x - (velocity + ahead) / (2 * steps)
        after = predictor(x, repeat_time(t_next, x), Prediction.VELOCITY)
        squares += (velocity.double().square().mean() + after.double().square().mean()) / (2 * steps)
        velocity = after
    # The mean of v along the way is x_1 - x_0, so the integral is the variance of the speed: its
    # square less that of the mean.
    way = (noise - x).double().square().mean()
    return float((squares - way) / way)
