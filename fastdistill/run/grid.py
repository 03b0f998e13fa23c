"""Labelled grid of images."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

GAP = 4
FONT_SIZE = 13
LINE = FONT_SIZE + 3
COLUMN_LINES = 6
"""Lines of a column's label at most. A row's label may be as high as its images."""
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def grid(images: Tensor, row_labels: Sequence[str], column_labels: Sequence[str], *, cell: int = 128) -> Image.Image:
    """Draw `images` (R, C, 3, H, W) in [-1, 1] as an RGB image.

    Labels may be empty. Long labels go on in further lines, those of rows in the width of two
    cells; what does not fit is cut. The shorter side of an image becomes `cell` pixels, and the
    aspect ratio stays. Small images are enlarged without smoothing: every pixel that the model drew
    can be seen.
    """
    rows, columns = images.shape[:2]
    width, height = (round(side * cell / min(images.shape[-2:])) for side in (images.shape[-1], images.shape[-2]))
    if len(row_labels) not in (0, rows) or len(column_labels) not in (0, columns):
        raise ValueError(f"{rows} x {columns} images with {len(row_labels)} row and {len(column_labels)} column labels")
    font = ImageFont.load_default(FONT_SIZE)
    beside = [lines(label, font, 2 * cell, height // LINE) for label in row_labels]
    above = [lines(label, font, width, COLUMN_LINES) for label in column_labels]
    left = max((int(font.getlength(line)) for label in beside for line in label), default=-GAP) + 2 * GAP
    top = GAP + (LINE * max(map(len, above)) + GAP if above else 0)
    canvas = Image.new("RGB", (left + columns * (width + GAP), top + rows * (height + GAP)), "white")
    draw = ImageDraw.Draw(canvas)
    for column, label in enumerate(above):
        for number, line in enumerate(label):
            draw.text((left + column * (width + GAP), GAP + LINE * number), line, fill="black", font=font)
    for row, label in enumerate(beside):
        first = top + row * (height + GAP) + (height - LINE * len(label)) // 2
        for number, line in enumerate(label):
            draw.text((GAP, first + LINE * number), line, fill="black", font=font)
    pixels = ((images.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 1, 3, 4, 2).cpu().numpy()
    for row in range(rows):
        for column in range(columns):
            image = Image.fromarray(pixels[row, column])
            scaling = Image.Resampling.NEAREST if min(image.size) < cell else Image.Resampling.LANCZOS
            place = left + column * (width + GAP), top + row * (height + GAP)
            canvas.paste(image.resize((width, height), scaling), place)
    return canvas


def lines(label: str, font: Font, width: int, at_most: int) -> list[str]:
    """Lines of `label` that are at most `width` pixels wide; the last one is cut if there are more
    than `at_most`."""
    result: list[str] = []
    words = label.split()
    while words:
        line = words.pop(0)
        while words and font.getlength(f"{line} {words[0]}") <= width:
            line += f" {words.pop(0)}"
        if len(result) + 1 >= at_most:
            return [*result, _cut(" ".join([line, *words]), font, width)]
        fitting = max(1, _fitting(line, font, width))
        if fitting < len(line):
            words.insert(0, line[fitting:])
        result.append(line[:fitting])
    return result or [""]


def _cut(label: str, font: Font, width: int) -> str:
    if font.getlength(label) <= width:
        return label
    return label[: _fitting(label, font, width - font.getlength("..."))] + "..."


def _fitting(label: str, font: Font, width: float) -> int:
    """Number of letters of `label` that fit in `width` pixels."""
    return bisect_right(range(1, len(label) + 1), width, key=lambda letters: font.getlength(label[:letters]))
