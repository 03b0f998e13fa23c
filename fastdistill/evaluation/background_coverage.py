"""Diversity on the emoji testbed: are the eight background colours drawn with equal odds, and each image in one of them?"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastdistill.data.emoji import BACKGROUNDS

BORDER_PIXELS = 2


def backgrounds(pixels: Tensor) -> Tensor:
    """The background index of each image (N, 3, H, W) in [-1, 1]: the colour nearest in RGB to the median of its border."""
    return _nearest(_border(pixels).median(dim=-1).values)


def purity(pixels: Tensor) -> float:
    """The share of the border pixels of ``pixels`` (N, 3, H, W) whose nearest colour is that of their image.

    A few-step student that averages over the modes paints patches of several colours, or one between them.
    """
    each = _nearest(_border(pixels).transpose(1, 2))
    return float((each == backgrounds(pixels)[:, None]).double().mean())


def _border(pixels: Tensor) -> Tensor:
    """(N, 3, P): the pixels along the edges."""
    frame = torch.ones(pixels.shape[-2:], dtype=torch.bool)
    frame[BORDER_PIXELS:-BORDER_PIXELS, BORDER_PIXELS:-BORDER_PIXELS] = False
    return pixels[..., frame]


def _nearest(rgb: Tensor) -> Tensor:
    """The index of the colour nearest to each of ``rgb`` (..., 3)."""
    colours = torch.tensor(list(BACKGROUNDS.values())) / 127.5 - 1
    return torch.cdist(rgb, colours.expand(*rgb.shape[:-2], -1, -1)).argmin(dim=-1)


def total_variation(indices: Tensor, classes: int = len(BACKGROUNDS)) -> float:
    """``1/2 sum_k |p_k - 1/classes|`` of the empirical distribution of ``indices`` (N,): 0 is uniform, 1 - 1/classes one colour only."""
    frequency = torch.bincount(indices, minlength=classes).double() / len(indices)
    return float((frequency - 1 / classes).abs().sum() / 2)


def expected_total_variation(samples: int, classes: int = len(BACKGROUNDS)) -> float:
    """What a perfect sampler scores on average with that many samples, by the normal approximation: ``E|x| = s sqrt(2/pi)``."""
    deviation = math.sqrt((1 / classes) * (1 - 1 / classes) / samples)
    return classes / 2 * deviation * math.sqrt(2 / math.pi)
