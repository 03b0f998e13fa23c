"""Background colours of emoji images, read off their borders."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdistill.data.emoji import BACKGROUNDS

BORDER_PIXELS = 2


def backgrounds(pixels: Tensor) -> Tensor:
    """Background index (N,) of each image (N, 3, H, W) in [-1, 1].

    The background is the colour nearest in RGB to the median of the border.
    """
    return _nearest(_border(pixels).median(dim=-1).values)


def border_colours(pixels: Tensor) -> Tensor:
    """Index (N, P) of the colour nearest in RGB to each border pixel of the images (N, 3, H, W)."""
    return _nearest(_border(pixels).transpose(1, 2))


def _border(pixels: Tensor) -> Tensor:
    """Pixels along the edges, (N, 3, P)."""
    frame = torch.ones(pixels.shape[-2:], dtype=torch.bool)
    frame[BORDER_PIXELS:-BORDER_PIXELS, BORDER_PIXELS:-BORDER_PIXELS] = False
    return pixels[..., frame]


def _nearest(rgb: Tensor) -> Tensor:
    """Index of the colour nearest to each of `rgb` (..., 3)."""
    colours = torch.tensor(list(BACKGROUNDS.values())) / 127.5 - 1
    return torch.cdist(rgb, colours.expand(*rgb.shape[:-2], -1, -1)).argmin(dim=-1)
