"""Labelled grid of images."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

GAP = 4
FONT_SIZE = 13


def grid(images: Tensor, row_labels: Sequence[str], column_labels: Sequence[str], *, cell: int = 128) -> Image.Image:
    """Draw `images` (R, C, 3, H, W) in [-1, 1] as an RGB image.

    Labels may be empty; long labels are cut to their cell. Small images are enlarged to `cell`
    pixels without smoothing: every pixel that the model drew can be seen.
    """
    rows, columns = images.shape[:2]
    if len(row_labels) not in (0, rows) or len(column_labels) not in (0, columns):
        raise ValueError(f"{rows} x {columns} images with {len(row_labels)} row and {len(column_labels)} column labels")
    font = ImageFont.load_default(FONT_SIZE)
    left = max((int(font.getlength(label)) for label in row_labels), default=-GAP) + 2 * GAP
    top = (FONT_SIZE + 2 * GAP) if column_labels else GAP
    canvas = Image.new("RGB", (left + columns * (cell + GAP), top + rows * (cell + GAP)), "white")
    draw = ImageDraw.Draw(canvas)
    for column, label in enumerate(column_labels):
        draw.text((left + column * (cell + GAP), GAP), _fit(label, font, cell), fill="black", font=font)
    for row, label in enumerate(row_labels):
        draw.text((GAP, top + row * (cell + GAP) + (cell - FONT_SIZE) // 2), label, fill="black", font=font)
    pixels = ((images.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 1, 3, 4, 2).cpu().numpy()
    for row in range(rows):
        for column in range(columns):
            image = Image.fromarray(pixels[row, column])
            scaling = Image.Resampling.NEAREST if max(image.size) < cell else Image.Resampling.LANCZOS
            canvas.paste(image.resize((cell, cell), scaling), (left + column * (cell + GAP), top + row * (cell + GAP)))
    return canvas


def _fit(label: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    if font.getlength(label) <= width:
        return label
    while label and font.getlength(label + "...") > width:
        label = label[:-1]
    return label + "..."
