"""Distances between two sets of vectors, and the modes of a mixture that samples reach.

Images need features before such distances mean something. Vectors of few dimensions do not, and the
modes of a mixture are known.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fastdistill.data.closed_form import GaussianMixture

# Rows of a matrix of distances that are in memory at a time.
ROWS = 1024


def directions(count: int, dimensions: int) -> Tensor:
    """Unit vectors (count, D) in float64, the same at every call.

    They are evenly spaced in the plane, and drawn at random in other dimensions.
    """
    if dimensions == 2:
        # A direction and its opposite give the same projection, so half of the circle is all.
        angle = math.pi * torch.arange(count, dtype=torch.float64) / count
        return torch.stack([angle.cos(), angle.sin()], dim=1)
    drawn = torch.randn(count, dimensions, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return torch.nn.functional.normalize(drawn, dim=1)


def sliced_wasserstein(first: Tensor, second: Tensor, projections: int = 64) -> float:
    """Mean over `directions` of the Wasserstein-1 distance between projections of two sets (N, D).

    (Bonneel et al. 2015.) In one dimension the best coupling pairs sorted points:
    `mean |a_(i) - b_(i)|`. The distance is above zero even between two sets of one distribution, in
    the order of `1 / sqrt(N)`: compare only values of equal sample counts, and compare them with
    the distance between two such sets.

    Raises:
        ValueError: shapes differ.
    """
    if first.shape != second.shape:
        raise ValueError(
            "sorted points are paired one to one: the sets need one shape, "
            f"got {tuple(first.shape)} and {tuple(second.shape)}"
        )
    onto = directions(projections, first.shape[1])
    a, b = ((onto @ points.double().T).sort(dim=1).values for points in (first, second))
    return float((a - b).abs().mean())


def energy_distance(first: Tensor, second: Tensor) -> float:
    """Energy distance `2 E|X - Y| - E|X - X'| - E|Y - Y'|` of two sets (N, D) and (M, D).

    It is zero for equal distributions only (Szekely & Rizzo 2013). The estimate is the U-statistic:
    a point is not compared with itself, so that the estimate is unbiased. Between two sets of one
    distribution it scatters around zero, and may be negative.

    Raises:
        ValueError: a set has fewer than two points.
    """
    if len(first) < 2 or len(second) < 2:
        raise ValueError(f"distances within a set need at least two points, got {len(first)} and {len(second)}")
    first, second = first.double(), second.double()
    between = _sum_of_distances(first, second) / (len(first) * len(second))
    within = sum(_sum_of_distances(points, points) / (len(points) * (len(points) - 1)) for points in (first, second))
    return 2 * between - within


def _sum_of_distances(first: Tensor, second: Tensor) -> float:
    # By differences: the product form, which is cdist's for large sets, cancels where points are
    # close.
    return sum(
        float(torch.cdist(rows, second, compute_mode="donot_use_mm_for_euclid_dist").sum())
        for rows in first.split(ROWS)
    )


@dataclass(frozen=True, kw_only=True)
class Modes:
    """Result of `modes`."""

    weights: tuple[float, ...]
    """Share of the samples in each component."""
    total_variation: float
    """Distance `sum_k |share_k - w_k| / 2`: the share of samples in excess of their component's."""
    outside: float
    """Share of samples in no mode."""
    spread: float
    """Variance within modes, relative to the true one: below 1 the samples are too narrow. NaN if
    all are outside."""


def modes(samples: Tensor, mixture: GaussianMixture, radius: float = 4.0) -> Modes:
    """Assign each of `samples` (N, D) to its most probable component.

    A sample is in no mode if its Mahalanobis distance `m_k = |S_k^-1/2 (x - mu_k)|` is above
    `radius` for each component, as for `exp(-radius^2 / 2)` of a Gaussian's own samples in two
    dimensions. The spread is the mean of `m_k^2 / D`, `k` the sample's own component, over those in
    a mode.
    """
    along = torch.einsum("kij,bki->bkj", mixture.axes, samples.to(mixture.means.dtype)[:, None] - mixture.means)
    squared = (along.square() / mixture.variances).sum(-1)
    component = mixture.responsibilities(samples.to(mixture.means.dtype)).argmax(dim=1)
    inside = squared.min(dim=1).values <= radius**2
    shares = torch.bincount(component, minlength=len(mixture.means)).double() / len(samples)
    own = squared.gather(1, component[:, None])[:, 0][inside]
    return Modes(
        weights=tuple(shares.tolist()),
        total_variation=float((shares - mixture.log_weights.double().exp()).abs().sum() / 2),
        outside=1 - float(inside.double().mean()),
        spread=float(own.mean()) / samples.shape[1],
    )
