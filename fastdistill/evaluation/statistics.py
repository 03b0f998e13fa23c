"""Uncertainty of a number."""

from __future__ import annotations

import math
from collections.abc import Sequence

Z_95 = 1.959964


def wilson_interval(successes: int, trials: int) -> tuple[float, float]:
    """95 % confidence interval of a proportion (Wilson 1927).

    It is sound near 0 and 1, where the normal interval is not.
    """
    if not 0 <= successes <= trials or trials == 0:
        raise ValueError(f"need 0 <= successes <= trials and trials > 0, got {successes} of {trials}")
    proportion, z2 = successes / trials, Z_95**2
    centre = (proportion + z2 / (2 * trials)) / (1 + z2 / trials)
    half = Z_95 / (1 + z2 / trials) * math.sqrt(proportion * (1 - proportion) / trials + z2 / (4 * trials**2))
    return (centre - half if successes else 0.0), (centre + half if successes < trials else 1.0)


def over_seeds(values: Sequence[float], form: str) -> str:
    """Mean ± sample standard deviation of at least one value, each in `form`.

    One value has no deviation.
    """
    mean = form.format(sum(values) / len(values))
    return f"{mean} ± {form.format(spread(values))}" if len(values) > 1 else mean


def spread(values: Sequence[float]) -> float:
    """Sample standard deviation of at least two values."""
    mean = sum(values) / len(values)
    return math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))
