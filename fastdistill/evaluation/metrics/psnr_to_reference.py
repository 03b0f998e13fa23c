"""PSNR of each image to the reference's from the same prompt and noise. Measured from the images."""

from __future__ import annotations

from typing import Any

from fastdistill.evaluation.metrics.metric import Metric, SampledImages, Value, by_seed, values_by_seed
from fastdistill.evaluation.psnr import psnr


def measure(sampled: SampledImages) -> dict[str, Any]:
    values = psnr(sampled.images, sampled.reference)
    # Identical images have no finite ratio.
    finite = values[values.isfinite()]
    measured: dict[str, Any] = {"psnr_to_reference": float(finite.mean()) if len(finite) else None}
    if len(finite) == len(values):
        measured |= by_seed("psnr_to_reference", [float(part.mean()) for part in values.view(sampled.seeds, -1)])
    return measured


METRIC = Metric(
    values=(
        Value("psnr_to_reference", "PSNR to the reference at the same noise, dB", "{:.1f}"),
        *values_by_seed("psnr_to_reference", "{:.2f}"),
    ),
    measure=measure,
    needs=("reference",),
)
