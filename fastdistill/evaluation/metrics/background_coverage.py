"""Coverage of the eight background colours, which a perfect sampler draws with equal odds.

Measured from the images.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastdistill.data.emoji import BACKGROUNDS
from fastdistill.evaluation.backgrounds import backgrounds
from fastdistill.evaluation.metrics.metric import Metric, SampledImages, Value, by_seed, values_by_seed


def total_variation(indices: Tensor, classes: int = len(BACKGROUNDS)) -> float:
    """Total variation of the empirical distribution of `indices` (N,) from the uniform one.

    It is `1/2 sum_k |p_k - 1/classes|`. 0 is uniform; `1 - 1/classes` is one colour only.
    """
    frequency = torch.bincount(indices, minlength=classes).double() / len(indices)
    return float((frequency - 1 / classes).abs().sum() / 2)


def expected_total_variation(samples: int, classes: int = len(BACKGROUNDS)) -> float:
    """Mean of `total_variation` over sets of `samples` uniform draws.

    By the normal approximation, `E|x| = s sqrt(2/pi)`.
    """
    deviation = math.sqrt((1 / classes) * (1 - 1 / classes) / samples)
    return classes / 2 * deviation * math.sqrt(2 / math.pi)


def measure(sampled: SampledImages) -> dict[str, Any]:
    colours = backgrounds(sampled.emoji_pixels)
    return {
        "background_total_variation": total_variation(colours),
        "background_total_variation_of_truth": expected_total_variation(len(colours)),
        **by_seed("background_total_variation", [total_variation(part) for part in colours.view(sampled.seeds, -1)]),
    }


METRIC = Metric(
    values=(
        Value("background_total_variation", "background total variation from uniform", "{:.3f}", headline=True),
        *values_by_seed("background_total_variation", "{:.3f}"),
        Value("background_total_variation_of_truth", "  of a perfect sampler", "{:.3f}"),
    ),
    measure=measure,
    needs=("truth",),
)
