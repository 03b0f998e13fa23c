"""Purity of the backgrounds: an emoji image has one colour.

Measured from the images, and from draws to compare.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastdistill.evaluation.backgrounds import backgrounds, border_colours
from fastdistill.evaluation.metrics.metric import Metric, SampledImages, Value, by_seed, values_by_seed


def purity(pixels: Tensor) -> float:
    """Share of border pixels of images (N, 3, H, W) whose nearest colour is the image's background.

    A few-step student that averages over the modes paints patches of several colours, or one
    between them.
    """
    return float((border_colours(pixels) == backgrounds(pixels)[:, None]).double().mean())


def measure(sampled: SampledImages) -> dict[str, Any]:
    pixels = sampled.emoji_pixels
    return {
        "background_purity": purity(pixels),
        "background_purity_of_truth": purity(sampled.truth.draws[0]),
        **by_seed("background_purity", [purity(part) for part in pixels.chunk(sampled.seeds)]),
    }


METRIC = Metric(
    values=(
        Value("background_purity", "background purity", "{:.1%}", headline=True),
        *values_by_seed("background_purity", "{:.2%}"),
        Value("background_purity_of_truth", "  of a perfect sampler", "{:.1%}"),
    ),
    measure=measure,
    needs=("truth",),
)
