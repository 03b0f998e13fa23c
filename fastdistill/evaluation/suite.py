"""Measurements of a pipeline against the known truth of emoji, or against a reference model."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdistill.data.emoji import Emoji
from fastdistill.data.shards import made_shards
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
        return self.draw_timed(pipeline, tick)[0]

    def draw_timed(
        self, pipeline: Any, tick: Callable[[float], None], kept: Path | None = None
    ) -> tuple[Tensor, float]:
        """Images as of `draw`, and the seconds that they took.

        Every batch is kept in the folder `kept`, if there is one, and read from there if it is
        there. The folder has to be one of this set and of these weights.
        """
        wanted = [(prompt, seed * SEED_STRIDE + i) for seed in self.seeds for i, prompt in enumerate(self.prompts)]

        def make(_: int, rows: range) -> dict[str, Tensor]:
            began = time.perf_counter()
            prompts, seeds = zip(*(wanted[row] for row in rows), strict=True)
            images = sample(pipeline, prompts, self.sampling, seeds=seeds, batch=self.batch, tick=tick)
            return {"images": images, "seconds": torch.tensor([time.perf_counter() - began])}

        parts = made_shards(kept, count=len(self), shard=self.batch, make=make, kept=tick)
        return torch.cat([part["images"] for part in parts]), sum(float(part["seconds"]) for part in parts)

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
    kept: Path | None = None,
) -> Evaluated:
    """Sample `image_set` and measure it by every metric that applies.

    Args:
        reference: another model's images of the same set, from `Evaluated.images`.
        tick: called after each sampling step with the number of images that the step is worth.
        other_parts: measure what does not depend on the transformer, too.
        kept: folder for the batches that are drawn, as in `ImageSet.draw_timed`.
    """
    images, seconds = image_set.draw_timed(pipeline, tick, kept)
    metrics: dict[str, Any] = {
        "transformer_parameters": pipeline.transformer.num_parameters(),
        "images": len(images),
        "seeds": list(image_set.seeds),
        "steps": image_set.sampling.num_inference_steps,
        "seconds_per_image": seconds / len(images),
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
