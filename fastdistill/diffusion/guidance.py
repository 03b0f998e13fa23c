"""Classifier-free guidance, in one convention: `u + w (c - u)`.

`w = 1` is no guidance, `w = 0` unconditional. This is the convention of diffusers' `guidance_scale`
and `true_cfg_scale`, and of Imagen's `w` (Saharia et al. 2022, equation 2). Ho & Salimans (2022,
equation 6), Self-Forcing and diffusers' LCM script write `c + w (c - u)` instead: add 1 to a scale
in their convention.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fastdistill.diffusion.prediction import Predictor
from fastdistill.diffusion.process import expand_time


def guide(unconditional: Tensor, conditional: Tensor, scale: float | Tensor) -> Tensor:
    """Guided prediction `u + w (c - u)` of predictions (B, ...) of one kind at the same `x_t`.

    The result does not depend on the kind of prediction, as conversions are affine and the weights
    `1 - w` and `w` sum to 1.

    Args:
        scale: `w`, one for all samples or one per sample (B,).
    """
    if isinstance(scale, Tensor):
        scale = expand_time(scale, conditional).to(conditional.dtype)
    return unconditional + scale * (conditional - unconditional)


def guided(
    conditional: Predictor, unconditional: Predictor, scale: float | Tensor, interval: tuple[float, float] = (0.0, 1.0)
) -> Predictor:
    """Guided field as a predictor: both functions are called at every step.

    Args:
        interval: guide at `low <= t <= high` only, as guidance near noise costs diversity and near
            data does nothing (Kynkäänniemi et al. 2024).

    Raises:
        ValueError: the two differ in process or prediction.
    """
    if (conditional.process, conditional.prediction) != (unconditional.process, unconditional.prediction):
        raise ValueError("guidance combines predictions of one kind and one process")
    low, high = interval

    def function(x_t: Tensor, t: Tensor) -> Tensor:
        inside = (t >= low) & (t <= high)
        return guide(unconditional.function(x_t, t), conditional.function(x_t, t), torch.where(inside, scale, 1.0))

    return replace(conditional, function=function)
