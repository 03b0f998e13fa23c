"""Calibration from prompts alone, by the full model's own trajectories and pictures, or from pictures.

No data set is needed. The pipeline samples the prompts as a user would, with its own scheduler and guidance; the states on the way are
the points at which blocks are scored, the final latents what recovery trains on. Where there are pictures, their latents are, and the
points are the same with noise, at times of the pipeline's own schedule.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastdistill.compress.importance.criterion import CalibrationPoints, SamplingRuns
from fastdistill.data.images import Captioned, pixels
from fastdistill.data.latents import LatentPool
from fastdistill.diffusion.process import RectifiedFlow
from fastdistill.models.family import Conditioning, Family
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
    images: Sequence[Captioned] = (),
    cache: Path | None = None,
    tick: Callable[[int], None] = lambda _: None,
) -> Calibration:
    """Sample ``pictures`` spread evenly over the prompts in ``steps`` steps, or read them from ``cache`` if it is there.

    The runs begin where the trajectories of the first ``points`` pictures did. The points are one state of each of these, at a step
    chosen with equal odds; one in ten is paired with the empty prompt, as guidance evaluates it too.

    With ``images`` nothing but the runs is sampled: these and their captions stand in for the pictures and the prompts, and a point is
    ``(1 - t) x_0 + t noise`` at the time of the chosen step.
    """
    if images:
        prompts = list(dict.fromkeys(image.caption for image in images))
        row_of = {prompt: row for row, prompt in enumerate(prompts)}
        which = torch.tensor([row_of[image.caption] for image in images])
        pictures = len(images)
    else:
        which = torch.arange(pictures) % len(prompts)
    conditioning = _encode([*prompts, ""], pipeline, family, sampling, batch)
    device = conditioning.prompt_embeds.device
    generator = torch.Generator().manual_seed(seed)
    chosen_step = torch.randint(steps, (pictures,), generator=generator)
    dropped = torch.rand(pictures, generator=generator) < 0.1
    shape = family.latent_shape(pipeline, sampling.height, sampling.width)
    noise = torch.randn(pictures, *shape, generator=generator)

    def sample(rows: Tensor) -> tuple[list[Tensor], Tensor]:
        return family.trajectory(
            pipeline,
            noise[rows].to(conditioning.prompt_embeds),
            conditioning[which[rows].to(device)],
            conditioning[torch.full_like(rows, len(prompts)).to(device)],
            steps=steps,
            true_cfg_scale=sampling.true_cfg_scale,
            guidance_scale=sampling.guidance_scale,
        )

    def sampled(rows: Tensor) -> dict[str, Tensor]:
        states, times = sample(rows)
        chosen = torch.stack(states).cpu()[chosen_step[rows], torch.arange(len(rows))]
        return {"x_t": chosen, "latents": states[-1].cpu(), "times": times.float().cpu()}

    def encoded(rows: Tensor) -> dict[str, Tensor]:
        height, width = (side * pipeline.vae_scale_factor for side in shape[1:])
        x_0 = family.encode_pictures(pipeline, torch.stack([pixels(images[row], height, width) for row in rows.tolist()])).float().cpu()
        x_t = RectifiedFlow().add_noise(x_0, noise[rows], times[chosen_step[rows]])
        return {"x_t": x_t.to(conditioning.prompt_embeds.dtype), "latents": x_0.to(conditioning.prompt_embeds.dtype), "times": times}

    if cache is not None and cache.exists():
        tensors = load_file(cache)
    else:
        if images:
            # The schedule may depend on the size of the pictures; the pipeline knows it once it has sampled one.
            times = sample(torch.zeros(1, dtype=torch.long))[1].float().cpu()
        parts = []
        for rows in torch.arange(pictures).split(batch):
            parts.append(encoded(rows) if images else sampled(rows))
            tick(len(rows))
        tensors = {name: torch.cat([part[name] for part in parts]) for name in ("x_t", "latents")} | {"times": parts[0]["times"]}
        if cache is not None:
            partial = cache.with_suffix(".partial")
            save_file(tensors, partial)
            partial.replace(cache)
    point_prompts = torch.where(dropped, len(prompts), which)[:points]
    return Calibration(
        points=CalibrationPoints(
            x_t=tensors["x_t"][:points].to(device),
            t=tensors["times"][chosen_step[:points]].to(device),
            conditioning=conditioning[point_prompts.to(device)],
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


def _encode(prompts: Sequence[str], pipeline: Any, family: Family, sampling: SamplingDefaults, batch: int) -> Conditioning:
    """In batches: at FLUX.1-dev's size hundreds of captions at once do not fit the text encoder's activations."""
    return Conditioning.cat(
        [
            family.encode_prompts(pipeline, list(prompts[start : start + batch]), sampling.guidance_scale, sampling.max_sequence_length)
            for start in range(0, len(prompts), batch)
        ]
    )
