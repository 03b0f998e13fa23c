"""Calibration from prompts alone: the full model's own trajectories and pictures.

No data set is needed. The pipeline samples the prompts as a user would, with its own scheduler and guidance; the states on the way are
the points at which blocks are scored, the final latents what recovery trains on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from fastdistill.compress.importance.criterion import CalibrationPoints, SamplingRuns
from fastdistill.data.latents import LatentPool
from fastdistill.models.family import Family
from fastdistill.models.sampling import SamplingDefaults


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """``points`` and sampling ``runs`` to score blocks by, and the ``pool`` of clean latents to recover on."""

    points: CalibrationPoints
    runs: SamplingRuns
    pool: LatentPool


def calibrate(
    pipeline: Any,
    family: Family,
    prompts: Sequence[str],
    sampling: SamplingDefaults,
    *,
    pictures: int,
    steps: int,
    points: int,
    batch: int,
    seed: int,
    cache: Path | None = None,
    tick: Callable[[int], None] = lambda _: None,
) -> Calibration:
    """Sample ``pictures`` spread evenly over the prompts in ``steps`` steps, or read them from ``cache`` if it is there.

    The runs begin where the trajectories of the first ``points`` pictures did. The points are one state of each of these, at a step
    chosen with equal odds; one in ten is paired with the empty prompt, as guidance evaluates it too.
    """
    conditioning = family.encode_prompts(pipeline, [*prompts, ""], sampling.guidance_scale, sampling.max_sequence_length)
    device = conditioning.prompt_embeds.device
    generator = torch.Generator().manual_seed(seed)
    which = torch.arange(pictures) % len(prompts)
    chosen_step = torch.randint(steps, (pictures,), generator=generator)
    dropped = torch.rand(pictures, generator=generator) < 0.1
    noise = torch.randn(pictures, *family.latent_shape(pipeline, sampling.height, sampling.width), generator=generator)
    if cache is not None and cache.exists():
        tensors = load_file(cache)
    else:
        parts = []
        for rows in torch.arange(pictures).split(batch):
            states, times = family.trajectory(
                pipeline,
                noise[rows].to(conditioning.prompt_embeds),
                conditioning[which[rows].to(device)],
                conditioning[torch.full_like(rows, len(prompts)).to(device)],
                steps=steps,
                true_cfg_scale=sampling.true_cfg_scale,
                guidance_scale=sampling.guidance_scale,
            )
            chosen = torch.stack(states).cpu()[chosen_step[rows], torch.arange(len(rows))]
            parts.append({"x_t": chosen, "t": times.cpu()[chosen_step[rows]].float(), "latents": states[-1].cpu()})
            tick(len(rows))
        tensors = {name: torch.cat([part[name] for part in parts]) for name in parts[0]} | {"times": times.float().cpu()}
        if cache is not None:
            partial = cache.with_suffix(".partial")
            save_file(tensors, partial)
            partial.replace(cache)
    point_prompts = torch.where(dropped, len(prompts), which)[:points]
    return Calibration(
        points=CalibrationPoints(
            x_t=tensors["x_t"][:points].to(device), t=tensors["t"][:points].to(device), conditioning=conditioning[point_prompts.to(device)]
        ),
        runs=SamplingRuns(
            noise=noise[:points].to(conditioning.prompt_embeds),
            times=tensors["times"].to(device),
            conditioning=conditioning[which[:points].to(device)],
            unconditional=conditioning[len(prompts) :] if sampling.true_cfg_scale > 1 else None,
            true_cfg_scale=sampling.true_cfg_scale,
        ),
        pool=LatentPool(latents=tensors["latents"], prompts=which, conditioning=conditioning),
    )
