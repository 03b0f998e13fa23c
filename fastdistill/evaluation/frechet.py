"""Frechet distance between two sets of images in the autoencoder's latent space.

`d^2 = |m_1 - m_2|^2 + tr(C_1 + C_2 - 2 (C_1 C_2)^(1/2))` (Dowson & Landau 1982; Heusel et al. 2017,
equation 6). The features are the posterior means in the transformer's scale, averaged over the
cells of a 4 x 4 grid. No network trained on photographs is involved. Few samples bias every Frechet
distance upwards: compare only values of equal sample counts.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

GRID = 4
"""Cells along each side, for images of any size: a covariance of more features than images says
little."""


@torch.no_grad()
def features(vae: Any, pixels: Tensor, batch: int = 64) -> Tensor:
    """Compute features (N, F) in float64 of pixels (N, 3, H, W) in [-1, 1]."""
    parts = []
    for chunk in pixels.split(batch):
        latents = vae.encode(chunk.to(vae.device, vae.dtype)).latent_dist.mean.float()
        latents = (latents - vae.config.shift_factor) * vae.config.scaling_factor
        parts.append(F.adaptive_avg_pool2d(latents, GRID).flatten(1).double().cpu())
    return torch.cat(parts)


def frechet_distance(first: Tensor, second: Tensor) -> float:
    """Squared distance `d^2` between Gaussians fitted to two feature sets, (N, F) and (M, F).

    The trace of the square root is the sum of the square roots of the eigenvalues of `A C_2 A` with
    `A = C_1^(1/2)`. This matrix is symmetric, so that the sum is stable where a general matrix
    square root of `C_1 C_2` is not.

    Raises:
        ValueError: a set has fewer than two samples.
    """
    if len(first) < 2 or len(second) < 2:
        raise ValueError(f"a covariance needs at least two samples, got {len(first)} and {len(second)}")
    first, second = first.double(), second.double()
    cov_1, cov_2 = torch.cov(first.T), torch.cov(second.T)
    values, vectors = torch.linalg.eigh(cov_1)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_2 @ root).clamp(min=0).sqrt().sum()
    means = (first.mean(dim=0) - second.mean(dim=0)).square().sum()
    return float(means + cov_1.trace() + cov_2.trace() - 2 * cross)
