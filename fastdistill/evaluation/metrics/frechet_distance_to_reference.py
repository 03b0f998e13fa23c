"""Frechet distance of the images from the reference's. Measured through the pipeline's autoencoder."""

from __future__ import annotations

from typing import Any

from fastdistill.evaluation.frechet import features, frechet_distance
from fastdistill.evaluation.metrics.metric import Metric, SampledImages, Value


def measure(sampled: SampledImages) -> dict[str, Any]:
    found, wanted = (features(sampled.pipeline.vae, images) for images in (sampled.images, sampled.reference))
    return {"frechet_distance_to_reference": frechet_distance(found, wanted)}


METRIC = Metric(
    values=(Value("frechet_distance_to_reference", "Frechet distance to the reference", "{:.2f}"),),
    measure=measure,
    needs=("reference", "several images"),
)
