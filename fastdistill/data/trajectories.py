"""A model's own images, with where they began and a state on the way; or given images in their place.

No data set is needed to compress or distil a model: the pipeline samples prompts as a user would, with its own scheduler and guidance.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastdistill.data.images import Captioned, pixels
from fastdistill.data.latents import LatentPool
from fastdistill.diffusion.process import RectifiedFlow
from fastdistill.models.families.family import Conditioning, Family
from fastdistill.models.sampling import SamplingDefaults
from fastdistill.run.files import whole


@dataclass(frozen=True, kw_only=True)
class Trajectories:
    """Of each of N images: noise, end, and one state on the way, (N, C, H, W)."""

    noise: Tensor
    latents: Tensor
    x_t: Tensor
    t: Tensor
    """Of ``x_t`` (N,), float32."""
    state_prompts: Tensor
    """Of ``x_t`` (N,): that of the image, or for one in ten the empty one, as guidance evaluates it too."""
    times: Tensor
    """The pipeline's schedule (K + 1,), falling, float32."""
    prompts: Tensor
    """Of each image (N,), a row of ``conditioning``."""
    conditioning: Conditioning
    """Of every prompt; the last row is the empty one."""

    def pool(self, *, dropout: float = 0.1) -> LatentPool:
        return LatentPool(latents=self.latents, prompts=self.prompts, conditioning=self.conditioning, dropout=dropout)


def trajectories(
    pipeline: Any,
    family: Family,
    prompts: Sequence[str],
    sampling: SamplingDefaults,
    *,
    count: int,
    steps: int,
    batch: int,
    generator: torch.Generator,
    images: Sequence[Captioned] = (),
    cache: Path | None = None,
    tick: Callable[[int], None] = lambda _: None,
) -> Trajectories:
    """Sample ``count`` images spread evenly over the prompts in ``steps`` steps, or read them from ``cache`` if it is there.

    The state of each is that of a step chosen with equal odds. With ``images`` these and their captions stand in for the ends and the
    prompts, and a state is ``(1 - t) x_0 + t noise`` at the time of the chosen step.
    """
    if images:
        prompts = list(dict.fromkeys(image.caption for image in images))
        row_of = {prompt: row for row, prompt in enumerate(prompts)}
        which = torch.tensor([row_of[image.caption] for image in images])
        count = len(images)
    else:
        which = torch.arange(count) % len(prompts)
    conditioning = encode_prompts([*prompts, ""], pipeline, family, sampling, batch)
    device = conditioning.prompt_embeds.device
    chosen_step = torch.randint(steps, (count,), generator=generator)
    unprompted = torch.rand(count, generator=generator) < 0.1
    shape = family.latent_shape(pipeline, sampling.height, sampling.width)
    noise = torch.randn(count, *shape, generator=generator)

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
        x_0 = family.encode_images(pipeline, torch.stack([pixels(images[row], height, width) for row in rows.tolist()])).float().cpu()
        x_t = RectifiedFlow().add_noise(x_0, noise[rows], times[chosen_step[rows]])
        return {"x_t": x_t.to(conditioning.prompt_embeds.dtype), "latents": x_0.to(conditioning.prompt_embeds.dtype), "times": times}

    if cache is not None and cache.exists():
        tensors = load_file(cache)
    else:
        if images:
            # The schedule may depend on the size of the images; the pipeline knows it once it has sampled one.
            times = sample(torch.zeros(1, dtype=torch.long))[1].float().cpu()
        parts = []
        for rows in torch.arange(count).split(batch):
            parts.append(encoded(rows) if images else sampled(rows))
            tick(len(rows))
        tensors = {name: torch.cat([part[name] for part in parts]) for name in ("x_t", "latents")} | {"times": parts[0]["times"]}
        if cache is not None:
            with whole(cache) as partial:
                save_file(tensors, partial)
    return Trajectories(
        noise=noise,
        latents=tensors["latents"],
        x_t=tensors["x_t"],
        t=tensors["times"][chosen_step],
        state_prompts=torch.where(unprompted, len(prompts), which),
        times=tensors["times"],
        prompts=which,
        conditioning=conditioning,
    )


def encode_prompts(prompts: Sequence[str], pipeline: Any, family: Family, sampling: SamplingDefaults, batch: int) -> Conditioning:
    """The conditioning of ``prompts``, in batches: at FLUX.1-dev's size hundreds at once do not fit the text encoder's activations."""
    return Conditioning.cat(
        [
            family.encode_prompts(pipeline, list(prompts[start : start + batch]), sampling.guidance_scale, sampling.max_sequence_length)
            for start in range(0, len(prompts), batch)
        ]
    )
