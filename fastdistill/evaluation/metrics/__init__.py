"""Measurements of a pipeline's images.

A new one is a file and a line here; people read them in this order.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastdistill.lazy import Table

if TYPE_CHECKING:
    from fastdistill.evaluation.metrics.metric import Metric

METRICS: Table[Metric] = Table(
    __name__,
    {
        "caption_accuracy": "caption_accuracy:METRIC",
        "background_coverage": "background_coverage:METRIC",
        "background_purity": "background_purity:METRIC",
        "frechet_distance": "frechet_distance:METRIC",
        "frechet_distance_to_reference": "frechet_distance_to_reference:METRIC",
        "psnr_to_reference": "psnr_to_reference:METRIC",
        "autoencoder_psnr": "autoencoder_psnr:METRIC",
    },
)
