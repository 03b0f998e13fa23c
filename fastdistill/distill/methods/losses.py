"""The losses of the methods, as pure functions: tensors in, a scalar out.

Shapes: B batch, ... any axes of a sample. `dmd_loss` and `feature_kd_loss` are operators, in `ops`.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import kl_div, relu, softplus

from fastdistill.diffusion.process import Process, expand_time

GanLoss = Literal["non_saturating", "hinge"]


def weighted_mse(student: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """`mean(w |student - target|^2)` for predictions (B, ...) and one weight per sample (B,)."""
    return (expand_time(weight, student).to(student.dtype) * (student - target).square()).mean()


def pseudo_huber(student: Tensor, target: Tensor, c: float = 1e-3) -> Tensor:
    """`mean(sqrt((student - target)^2 + c^2) - c)`, element by element: quadratic near zero, linear
    where far (LCM's and SenseFlow's)."""
    return (((student - target).square() + c**2).sqrt() - c).mean()


def generator_loss(fake: Tensor, kind: GanLoss) -> Tensor:
    """Loss of the student, by the logits (any shape) of its samples: `softplus(-fake)` (Goodfellow
    et al. 2014) or `-fake` (hinge)."""
    return softplus(-fake).mean() if kind == "non_saturating" else -fake.mean()


def discriminator_loss(real: Tensor, fake: Tensor, kind: GanLoss) -> Tensor:
    """`softplus(-real) + softplus(fake)`, or the hinge `relu(1 - real) + relu(1 + fake)` (Lim & Ye
    2017), by logits of any shape."""
    if kind == "non_saturating":
        return softplus(-real).mean() + softplus(fake).mean()
    return relu(1 - real).mean() + relu(1 + fake).mean()


def softened_targets(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """`T^2 KL(softmax(teacher / T) || softmax(student / T))` of logits (..., classes), mean over
    samples (Hinton et al. 2015, section 2).

    The factor keeps the gradient's size as `T` varies; for a large `T` it is that of `|student -
    teacher|^2 / (2 classes)` of centred logits. The entropy of the targets, a constant, is left out
    of the paper's cross entropy.
    """
    log_student, log_teacher = ((logits / temperature).log_softmax(-1) for logits in (student, teacher.detach()))
    return temperature**2 * kl_div(log_student, log_teacher, reduction="none", log_target=True).sum(-1).mean()


def error_weight(
    process: Process, t: Tensor, weighting: Literal["x0", "truncated_snr", "snr_plus_one", "velocity"]
) -> Tensor:
    """The weight (B,) of the squared error of `x_0` at `t` (B,), in float64, for `weighted_mse`.

    | weighting | weight | equal to the error of |
    |---|---|---|
    | `x0` | 1 | `x_0` |
    | `truncated_snr` | `max(alpha^2 / sigma^2, 1)` | `x_0` or `epsilon`, whichever is larger (Salimans & Ho, eq. 9) |
    | `snr_plus_one` | `alpha^2 / sigma^2 + 1` | `v`, if `alpha^2 + sigma^2 = 1` (Salimans & Ho, eq. 10) |
    | `velocity` | `(alpha' - sigma' alpha / sigma)^2` | the velocity, for any process: `1 / t^2` on rectified flow |
    """
    t = t.double()
    alpha, sigma = process.alpha(t), process.sigma(t)
    snr = (alpha / sigma).square()
    match weighting:
        case "x0":
            return torch.ones_like(t)
        case "truncated_snr":
            return snr.clamp(min=1)
        case "snr_plus_one":
            return snr + 1
        case "velocity":
            return (process.alpha_dot(t) - process.sigma_dot(t) * alpha / sigma).square()
