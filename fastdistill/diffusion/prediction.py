"""Meaning of a network's output, and the one conversion between all meanings.

Every target is `p = a x_0 + b eps`. Solved together with `x_t = alpha x_0 + sigma eps`, with
`d = a sigma - b alpha`:

    x_0 = (sigma p - b x_t) / d          eps = (a x_t - alpha p) / d

and projected on the coefficients `a', b'` of another target (`d'` likewise):

    p' = (d' p + (a b' - a' b) x_t) / d

The conversion holds for a network's conditional mean in place of `p`, too, as everything is linear
given `x_t`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from fastdistill.diffusion.process import Process, expand_time


class Prediction(Enum):
    """Target of training.

    `velocity` and `v` are two things, although papers on flows use one letter for both.
    """

    X0 = "x0"
    """The data (a denoiser, EDM's `D`)."""
    EPSILON = "epsilon"
    """The noise (Ho et al. 2020)."""
    V = "v"
    """`alpha eps - sigma x_0` (Salimans & Ho 2022, appendix D; diffusers' `v_prediction`)."""
    SCORE = "score"
    """`grad_x log p_t(x_t) = -E[eps | x_t] / sigma` (Vincent 2011); undefined for a single point
    where `sigma = 0`."""
    VELOCITY = "velocity"
    """`dx_t / dt = alpha' x_0 + sigma' eps` (Lipman et al. 2023), with `t = 1` noise: FLUX's
    output, `eps - x_0`."""

    def coefficients(self, process: Process, t: Tensor) -> tuple[Tensor, Tensor]:
        """Coefficients `a` and `b` at `t`, in the shape and dtype of `t`."""
        match self:
            case Prediction.X0:
                return torch.ones_like(t), torch.zeros_like(t)
            case Prediction.EPSILON:
                return torch.zeros_like(t), torch.ones_like(t)
            case Prediction.V:
                return -process.sigma(t), process.alpha(t)
            case Prediction.SCORE:
                return torch.zeros_like(t), -1 / process.sigma(t)
            case Prediction.VELOCITY:
                return process.alpha_dot(t), process.sigma_dot(t)

    def target(self, process: Process, x_0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Target `a x_0 + b noise` (B, ...) in the dtype of `x_0`, for `t` (B,)."""
        a, b = self.coefficients(process, expand_time(t, x_0))
        return a.to(x_0.dtype) * x_0 + b.to(x_0.dtype) * noise


def convert(p: Tensor, x_t: Tensor, t: Tensor, process: Process, source: Prediction, target: Prediction) -> Tensor:
    """Convert `p` (B, ...), a `source` at `x_t` and `t` (B,), to a `target`.

    Coefficients are computed in float64. The result has the dtype of `p` and `x_t` together; it is
    float32 for the half types, in whose few bits `x_t - x_0` would drown. A conversion looks at its
    coefficients, which on a GPU waits for the queued kernels.

    Raises:
        ValueError: the target is not determined, or infinite. Where `alpha` is 0, `epsilon` and
            `score` say nothing about `x_0`. Where `sigma` is 0, `x0` says nothing about the noise,
            a single point has no `score`, and the velocity of variance-preserving schedules other
            than TrigFlow is infinite.
    """
    dtype = torch.promote_types(torch.promote_types(p.dtype, x_t.dtype), torch.float32)
    if source is target:
        return p.to(dtype)
    time = expand_time(t, x_t)
    alpha, sigma = process.alpha(time), process.sigma(time)
    (a, b), (a_new, b_new) = source.coefficients(process, time), target.coefficients(process, time)
    if {source, target} == {Prediction.EPSILON, Prediction.SCORE}:
        # Parallel: where alpha is 0 neither tells x_0, but each tells the other.
        of_p, of_x = b_new / b, torch.zeros_like(b)
    else:
        d, d_new = a * sigma - b * alpha, a_new * sigma - b_new * alpha
        of_p, of_x = d_new / d, (a * b_new - a_new * b) / d
    if not bool((of_p.isfinite() & of_x.isfinite()).all()):
        raise ValueError(
            f"{source.value} does not determine {target.value} at every t in [{float(t.min()):g}, {float(t.max()):g}]: "
            f"keep clear of the ends of {type(process).__name__}, or predict another target"
        )
    return of_p.to(dtype) * p + of_x.to(dtype) * x_t


@dataclass(frozen=True, kw_only=True)
class Predictor:
    """Function of `x_t` (B, ...) and `t` (B,), with the meaning of its values.

    Samplers know no more of a network.
    """

    function: Callable[[Tensor, Tensor], Tensor]
    process: Process
    prediction: Prediction

    def __call__(self, x_t: Tensor, t: Tensor, prediction: Prediction) -> Tensor:
        """Value of the function as a `prediction`. Raises the errors of `convert`."""
        return convert(self.function(x_t, t), x_t, t, self.process, self.prediction, prediction)
