"""Calibration: what blocks are scored on and a cut model is recovered on, from the full model's own trajectories, or from images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fastdistill.compress.importance.criterion import CalibrationPoints, SamplingRuns
from fastdistill.data.latents import LatentPool
from fastdistill.data.trajectories import trajectories
from fastdistill.models.families.family import Family
from fastdistill.models.sampling import SamplingDefaults


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """``points`` and sampling ``runs`` to score blocks by, and the ``pool`` of clean latents to recover on."""

    points: CalibrationPoints
    runs: SamplingRuns
    pool: LatentPool


def calibrate(
    pipeline: Any, family: Family, prompts: Sequence[str], sampling: SamplingDefaults, *, points: int, seed: int, **options: Any
) -> Calibration:
    """The runs begin where the trajectories of the first ``points`` images did; a point is the state that was kept of each of these.

    ``options`` are those of :func:`fastdistill.data.trajectories.trajectories`, which samples, or reads what it sampled before.
    """
    sampled = trajectories(pipeline, family, prompts, sampling, generator=torch.Generator().manual_seed(seed), **options)
    conditioning = sampled.conditioning
    device = conditioning.prompt_embeds.device
    return Calibration(
        points=CalibrationPoints(
            x_t=sampled.x_t[:points].to(device),
            t=sampled.t[:points].to(device),
            conditioning=conditioning[sampled.state_prompts[:points].to(device)],
        ),
        runs=SamplingRuns(
            noise=sampled.noise[:points].to(conditioning.prompt_embeds),
            times=sampled.times.to(device),
            conditioning=conditioning[sampled.prompts[:points].to(device)],
            unconditional=conditioning[len(conditioning) - 1 :] if sampling.true_cfg_scale > 1 else None,
            true_cfg_scale=sampling.true_cfg_scale,
        ),
        pool=sampled.pool(),
    )
