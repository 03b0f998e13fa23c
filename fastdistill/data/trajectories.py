"""Images that a model drew, each with its noise and a state on the way; or given images.

No data set is needed to compress or distil a model: the pipeline samples prompts as a user would,
with its own scheduler and guidance.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdistill.data.images import Captioned, pixels
from fastdistill.data.latents import LatentPool
from fastdistill.data.shards import made_shards
from fastdistill.diffusion.process import RectifiedFlow
from fastdistill.errors import UserError
from fastdistill.models.families import family_of
from fastdistill.models.families.family import Conditioning, Family
from fastdistill.models.sampling import SamplingDefaults

UNPROMPTED = 0.1
"""Share of states with the empty prompt, as guidance evaluates that prompt, too."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """Origin of trajectories: a pipeline that samples `prompts`, or `images` if there are any."""

    pipeline: Any
    prompts: Sequence[str]
    sampling: SamplingDefaults
    images: Sequence[Captioned] = ()

    def assigned(self, count: int) -> tuple[list[str], Tensor]:
        """Distinct prompts, and the prompt index (`count`,) of each image.

        With images `count` is their number.
        """
        if not self.images:
            return list(self.prompts), torch.arange(count) % len(self.prompts)
        captions = list(dict.fromkeys(image.caption for image in self.images))
        index = {caption: index for index, caption in enumerate(captions)}
        return captions, torch.tensor([index[image.caption] for image in self.images])


@dataclass(frozen=True, kw_only=True)
class TrajectoryOptions:
    """Number of trajectories, and how they are sampled."""

    images: int
    """Images that the pipeline samples, unless the source has images."""
    steps: int
    """Sampling steps of each image."""
    batch: int
    """Samples per forward pass."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("images", "steps", "batch"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class Trajectories:
    """Noise, end, and one state on the way of each of N images, (N, C, H, W)."""

    noise: Tensor
    latents: Tensor
    x_t: Tensor
    t: Tensor
    """Time of `x_t` (N,), float32."""
    state_prompts: Tensor
    """Prompt of `x_t` (N,): the prompt of the image, or the empty one."""
    times: Tensor
    """Schedule of the pipeline (K + 1,), falling, float32."""
    prompts: Tensor
    """Prompt of each image (N,), a row of `conditioning`."""
    conditioning: Conditioning
    """Conditioning of every prompt; the last row is the empty prompt's."""

    def pool(self, *, dropout: float = 0.1) -> LatentPool:
        """Ends as training data, with the empty prompt in place of the own with odds `dropout`."""
        return LatentPool(latents=self.latents, prompts=self.prompts, conditioning=self.conditioning, dropout=dropout)


@dataclass(frozen=True, kw_only=True)
class _Choices:
    """Random choices of N trajectories, drawn before the first is sampled.

    A cache holds no choices.
    """

    steps: Tensor
    """Step of the kept state (N,)."""
    unprompted: Tensor
    """Whether the kept state has the empty prompt (N,)."""
    noise: Tensor
    """Noise (N, C, H, W)."""

    @classmethod
    def draw(cls, options: TrajectoryOptions, count: int, shape: Sequence[int]) -> _Choices:
        generator = torch.Generator().manual_seed(options.seed)
        chosen = torch.randint(options.steps, (count,), generator=generator)
        unprompted = torch.rand(count, generator=generator) < UNPROMPTED
        return cls(steps=chosen, unprompted=unprompted, noise=torch.randn(count, *shape, generator=generator))


@dataclass(frozen=True, kw_only=True)
class _Maker:
    """Maker of what a cache keeps of trajectories: ends, states, and the times of the schedule."""

    pipeline: Any
    family: Family
    sampling: SamplingDefaults
    """Sampling in as many steps as a trajectory has."""
    conditioning: Conditioning
    prompts: Tensor
    choices: _Choices

    def make(self, images: Sequence[Captioned], rows: range) -> dict[str, Tensor]:
        """`x_t` and `latents` (`len(rows)`, C, H, W) and `times` (K + 1,), on the CPU."""
        index = torch.tensor(rows)
        return self._encoded([images[row] for row in rows], index) if images else self._sampled(index)

    @cached_property
    def _times(self) -> Tensor:
        # The schedule may depend on the size of the images; the pipeline knows it once it has
        # sampled one.
        return self._run(torch.zeros(1, dtype=torch.long))[1].float().cpu()

    def _run(self, rows: Tensor) -> tuple[list[Tensor], Tensor]:
        conditioning, device = self.conditioning, self.conditioning.prompt_embeds.device
        return self.family.trajectory(
            self.pipeline,
            self.choices.noise[rows].to(conditioning.prompt_embeds),
            conditioning[self.prompts[rows].to(device)],
            conditioning[torch.full_like(rows, len(conditioning) - 1).to(device)],
            steps=self.sampling.num_inference_steps,
            true_cfg_scale=self.sampling.true_cfg_scale,
            guidance_scale=self.sampling.guidance_scale,
        )

    def _sampled(self, rows: Tensor) -> dict[str, Tensor]:
        states, times = self._run(rows)
        chosen = torch.stack(states).cpu()[self.choices.steps[rows], torch.arange(len(rows))]
        return {"x_t": chosen, "latents": states[-1].cpu(), "times": times.float().cpu()}

    def _encoded(self, images: Sequence[Captioned], rows: Tensor) -> dict[str, Tensor]:
        times = self._times
        dtype, noise = self.conditioning.prompt_embeds.dtype, self.choices.noise[rows]
        height, width = (side * self.pipeline.vae_scale_factor for side in noise.shape[2:])
        x_0 = (
            self.family.encode_images(self.pipeline, torch.stack([pixels(image, height, width) for image in images]))
            .float()
            .cpu()
        )
        x_t = RectifiedFlow().add_noise(x_0, noise, times[self.choices.steps[rows]])
        return {"x_t": x_t.to(dtype), "latents": x_0.to(dtype), "times": times}


def trajectories(
    source: Source,
    options: TrajectoryOptions,
    *,
    cache: Path | None = None,
    tick: Callable[[int], None] = lambda _: None,
) -> Trajectories:
    """Sample `options.images` images in `options.steps` steps.

    Each batch is kept in the folder `cache`, if there is one, and read from there if it is there: a
    sampling that was stopped continues. The folder has to be one of this source and these options,
    such as an entry of `fastdistill.run.store`.

    The images are spread evenly over the prompts. The step of each state is chosen with equal odds.
    Given `images` and their captions stand in for the ends and the prompts, and a state is
    `(1 - t) x_0 + t noise` at the time of the chosen step.
    """
    pipeline, sampling = source.pipeline, source.sampling
    family = family_of(pipeline.transformer)
    prompts, prompt_of = source.assigned(options.images)
    conditioning = encode_prompts([*prompts, ""], pipeline, family, sampling, options.batch)
    shape = family.latent_shape(pipeline, sampling.height, sampling.width)
    choices = _Choices.draw(options, len(prompt_of), shape)
    maker = _Maker(
        pipeline=pipeline,
        family=family,
        sampling=dataclasses.replace(sampling, num_inference_steps=options.steps),
        conditioning=conditioning,
        prompts=prompt_of,
        choices=choices,
    )

    def make(_: int, rows: range) -> dict[str, Tensor]:
        made = maker.make(source.images, rows)
        tick(len(rows))
        return made

    parts = made_shards(cache, count=len(prompt_of), shard=options.batch, make=make, kept=tick)
    tensors = {name: torch.cat([part[name] for part in parts]) for name in ("x_t", "latents")}
    times = parts[0]["times"]
    return Trajectories(
        noise=choices.noise,
        latents=tensors["latents"],
        x_t=tensors["x_t"],
        t=times[choices.steps],
        state_prompts=torch.where(choices.unprompted, len(prompts), prompt_of),
        times=times,
        prompts=prompt_of,
        conditioning=conditioning,
    )


def encode_prompts(
    prompts: Sequence[str], pipeline: Any, family: Family, sampling: SamplingDefaults, batch: int
) -> Conditioning:
    """Conditioning of `prompts`, in batches.

    At FLUX.1-dev's size the text encoder's activations of hundreds of prompts do not fit in memory.
    """
    return Conditioning.cat(
        [
            family.encode_prompts(
                pipeline, list(prompts[start : start + batch]), sampling.guidance_scale, sampling.max_sequence_length
            )
            for start in range(0, len(prompts), batch)
        ]
    )
