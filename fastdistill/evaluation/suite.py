"""Measurements of a pipeline against the known truth of emoji, or against a reference model."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastdistill.data.emoji import Emoji
from fastdistill.evaluation.metrics import METRICS
from fastdistill.evaluation.metrics.metric import SampledImages, Truth
from fastdistill.evaluation.testbed import draws_emoji
from fastdistill.models.sampling import SamplingDefaults, sample

SEED_STRIDE = 1_000_000


@dataclass(frozen=True, kw_only=True)
class ImageSet:
    """Images to measure: every one of `prompts` once for each of `seeds`, `batch` at once."""

    prompts: Sequence[str]
    seeds: Sequence[int]
    sampling: SamplingDefaults
    batch: int

    def __len__(self) -> int:
        return len(self.prompts) * len(self.seeds)

    def draw(self, pipeline: Any, tick: Callable[[float], None]) -> Tensor:
        """Images (S * N, 3, H, W) in [-1, 1]: of all prompts for the first seed, then for the next."""
        return torch.cat(
            [
                sample(
                    pipeline,
                    self.prompts,
                    self.sampling,
                    seeds=[seed * SEED_STRIDE + i for i in range(len(self.prompts))],
                    batch=self.batch,
                    tick=tick,
                )
                for seed in self.seeds
            ]
        )

    def truth(self, pipeline: Any) -> Truth | None:
        """Known distribution of the images; None unless `pipeline` draws emoji and every prompt is
        an emoji's caption."""
        if not draws_emoji(pipeline):
            return None
        data = Emoji()
        index = {caption: index for index, caption in enumerate(data.captions)}
        if not all(prompt in index for prompt in self.prompts):
            return None
        captions = torch.tensor([index[prompt] for prompt in self.prompts])
        return Truth(data=data, captions=captions.repeat(len(self.seeds)))


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    """Measurements as JSON, and the images that they were taken from, (S * N, 3, H, W)."""

    metrics: dict[str, Any]
    images: Tensor


def evaluate(
    pipeline: Any,
    image_set: ImageSet,
    *,
    reference: Tensor | None = None,
    tick: Callable[[float], None] = lambda count: None,
    other_parts: bool = False,
) -> Evaluated:
    """Sample `image_set` and measure it by every metric that applies.

    Args:
        reference: another model's images of the same set, from `Evaluated.images`.
        tick: called after each sampling step with the number of images that the step is worth.
        other_parts: measure what does not depend on the transformer, too.
    """
    began = time.perf_counter()
    images = image_set.draw(pipeline, tick)
    metrics: dict[str, Any] = {
        "transformer_parameters": pipeline.transformer.num_parameters(),
        "images": len(images),
        "seeds": list(image_set.seeds),
        "steps": image_set.sampling.num_inference_steps,
        "seconds_per_image": (time.perf_counter() - began) / len(images),
    }
    sampled = SampledImages(
        pipeline=pipeline,
        images=images,
        seeds=len(image_set.seeds),
        known_truth=image_set.truth(pipeline),
        given_reference=reference,
    )
    for metric in METRICS.values():
        if metric.of_transformer or other_parts:
            metrics |= metric(sampled)
    return Evaluated(metrics=metrics, images=images)
