"""Case of each metric: images of a perfect and of a poor model, and the perfect values."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from fastdistill.data.emoji import BACKGROUNDS, Emoji
from fastdistill.evaluation.metrics.metric import SampledImages, Truth

PROMPTS, SEEDS = 8, 2


class Autoencoder:
    """Pixels as latents, decoded `error` away from what was encoded."""

    device, dtype = torch.device("cpu"), torch.float32
    config = SimpleNamespace(shift_factor=0.0, scaling_factor=1.0)

    def __init__(self, error: float = 0.0) -> None:
        self.error = error

    def encode(self, pixels: Tensor) -> Any:
        return SimpleNamespace(latent_dist=SimpleNamespace(mean=pixels))

    def decode(self, latents: Tensor) -> Any:
        return SimpleNamespace(sample=latents + self.error)


@cache
def perfect() -> SampledImages:
    """Draws of the captions with each background equally often."""
    data, generator = Emoji(), torch.Generator().manual_seed(0)
    captions = torch.arange(PROMPTS).repeat(SEEDS)
    draws = data.draw(captions.repeat_interleave(100), generator)
    wanted = torch.arange(len(captions)) % len(BACKGROUNDS)
    found = (draws.backgrounds.view(len(captions), -1) == wanted[:, None]).double().argmax(dim=1)
    images = draws.pixels.view(len(captions), 100, *draws.pixels.shape[1:])[torch.arange(len(captions)), found]
    return SampledImages(
        pipeline=SimpleNamespace(vae=Autoencoder()),
        images=images,
        seeds=SEEDS,
        known_truth=Truth(data=data, captions=captions),
        given_reference=images,
    )


@cache
def real() -> SampledImages:
    """Images that are the draws of the truth."""
    sampled = perfect()
    return dataclasses.replace(sampled, images=sampled.truth.draws[0])


@cache
def poor() -> SampledImages:
    """Noise for images, by a pipeline with a poor autoencoder."""
    sampled = perfect()
    noise = torch.randn(sampled.images.shape, generator=torch.Generator().manual_seed(1))
    return dataclasses.replace(sampled, images=noise, pipeline=SimpleNamespace(vae=Autoencoder(error=0.5)))


@dataclass(frozen=True, kw_only=True)
class Case:
    best: Mapping[str, float | None]
    """Values of a perfect model."""
    perfect: Callable[[], SampledImages] = perfect
    poor: Callable[[], SampledImages] = poor


CASES = {
    "caption_accuracy": Case(best={"caption_accuracy": 1.0, "caption_accuracy_spread": 0.0}),
    "background_coverage": Case(best={"background_total_variation": 0.0}),
    "background_purity": Case(best={"background_purity": 1.0, "background_purity_of_truth": 1.0}),
    "frechet_distance": Case(best={"frechet_distance": 0.0}, perfect=real),
    "frechet_distance_to_reference": Case(best={"frechet_distance_to_reference": 0.0}),
    "psnr_to_reference": Case(best={"psnr_to_reference": None}),
    "autoencoder_psnr": Case(best={"autoencoder_psnr": math.inf}),
}
