"""Frechet distance of the images from draws with the same captions.

Measured through the pipeline's autoencoder. The distance between two sets of draws comes with it:
the least that so few images can show.
"""

from __future__ import annotations

from typing import Any

from fastdistill.evaluation.frechet import features, frechet_distance
from fastdistill.evaluation.metrics.metric import Metric, SampledImages, Value, by_seed, values_by_seed


def measure(sampled: SampledImages) -> dict[str, Any]:
    found, real, other = (
        features(sampled.pipeline.vae, images) for images in (sampled.emoji_pixels, *sampled.truth.draws)
    )
    parts = zip(found.chunk(sampled.seeds), real.chunk(sampled.seeds), strict=True)
    return {
        "frechet_distance": frechet_distance(found, real),
        "frechet_distance_of_truth": frechet_distance(other, real),
        **by_seed("frechet_distance", [frechet_distance(*part) for part in parts]),
    }


METRIC = Metric(
    values=(
        Value("frechet_distance", "Frechet distance in latent space", "{:.2f}", headline=True),
        *values_by_seed("frechet_distance", "{:.2f}"),
        Value("frechet_distance_of_truth", "  of a perfect sampler", "{:.2f}"),
    ),
    measure=measure,
    needs=("truth", "several prompts"),
)
