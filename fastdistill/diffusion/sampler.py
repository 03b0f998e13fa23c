"""Sampling of any predictor by name: by diffusers' schedulers, or by solvers that diffusers lacks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
)
from torch import Tensor

from fastdistill.diffusion import schedulers, solvers
from fastdistill.diffusion.prediction import Predictor

Sampler = Callable[[Predictor, Tensor, Tensor, torch.Generator], Tensor]
"""`(predictor, noise (B, ...), times (steps,), rng) -> samples (B, ...)`."""


def _discrete(kind: type, **options: Any) -> Sampler:
    def sampler(predictor: Predictor, noise: Tensor, times: Tensor, rng: torch.Generator) -> Tensor:
        return schedulers.run(predictor, schedulers.discrete(kind, predictor.process, times, **options), noise, rng)

    return sampler


def _flow_euler(predictor: Predictor, noise: Tensor, times: Tensor, rng: torch.Generator) -> Tensor:
    return schedulers.run(predictor, schedulers.flow_euler(predictor.process, times), noise, rng)


def _deterministic(solver: Callable[[Predictor, Tensor, Tensor], Tensor]) -> Sampler:
    return lambda predictor, noise, times, rng: solver(predictor, noise, times)


# Schedulers are given x_0 where they take it, as it needs no division by alpha; diffusers would
# clip it by default.
_X0 = {"prediction_type": "sample"}

SAMPLERS: dict[str, Sampler] = {
    "ddpm": _discrete(DDPMScheduler, clip_sample=False, **_X0),
    "ddim": _discrete(DDIMScheduler, clip_sample=False, **_X0),
    "dpmsolver++": _discrete(DPMSolverMultistepScheduler, **_X0),
    "sde-dpmsolver++": _discrete(DPMSolverMultistepScheduler, algorithm_type="sde-dpmsolver++", **_X0),
    "euler": _discrete(EulerDiscreteScheduler, **_X0),
    "heun": _discrete(HeunDiscreteScheduler, prediction_type="epsilon"),
    "flow_euler": _flow_euler,
    "ode_euler": _deterministic(solvers.euler),
    "ode_heun": _deterministic(solvers.heun),
    "euler_maruyama": solvers.euler_maruyama,
    "annealed_langevin": solvers.annealed_langevin,
}


def sample(
    predictor: Predictor, noise: Tensor, times: Tensor, *, sampler: str, rng: torch.Generator | None = None
) -> Tensor:
    """Samples (B, ...) of the data from standard normal `noise` (B, ...), by one of `SAMPLERS`.

    Args:
        times: (steps,), falling: the times at which the predictor is called. After the last a
            sampler goes to `x_0`. With `few_step_times` and `flow_euler`, a rectified flow is
            sampled as FLUX is.
        rng: generator of samplers that draw noise; by default seeded with 0.

    Raises:
        ValueError: there is no such sampler, or it cannot visit these times (its docstring says
            why).
    """
    if sampler not in SAMPLERS:
        raise ValueError(f"no sampler {sampler!r}; there are {', '.join(SAMPLERS)}")
    if times.ndim != 1 or len(times) == 0 or not bool((times.diff() < 0).all()):
        raise ValueError(f"times must be a falling sequence, got {times.tolist()}")
    return SAMPLERS[sampler](predictor, noise, times, rng if rng is not None else torch.Generator().manual_seed(0))
