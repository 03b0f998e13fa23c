"""The labelled grid shows each image where its labels say."""

import numpy as np
import pytest
import torch
from PIL import ImageFont

from fastdistill.run.grid import grid, lines


def test_images_are_where_their_labels_are():
    levels = torch.linspace(-1, 1, 6).view(2, 3)
    canvas = grid(levels[:, :, None, None, None].expand(2, 3, 3, 8, 8), ["a", "bb"], ["1", "2", "3"], cell=16)
    # From the lower right corner, so that the width of the labels does not matter.
    for row in range(2):
        for column in range(3):
            pixel = canvas.getpixel((canvas.width - (3 - column) * 20 + 8, canvas.height - (2 - row) * 20 + 8))
            assert pixel == (round((float(levels[row, column]) + 1) * 127.5),) * 3


def test_small_images_are_enlarged_without_smoothing_and_large_ones_fit():
    checkers = (torch.arange(8)[:, None] + torch.arange(8)) % 2 * 2.0 - 1
    small = grid(checkers.expand(1, 1, 3, 8, 8), [], [], cell=64)
    assert {pixel for _, pixel in small.getcolors()} == {(0, 0, 0), (255, 255, 255)}
    assert grid(torch.zeros(1, 1, 3, 256, 256), [], [], cell=64).size == small.size


@pytest.mark.parametrize(("height", "width"), [(8, 24), (24, 8), (300, 100), (100, 130)])
def test_images_keep_their_aspect_ratio(height: int, width: int) -> None:
    """A white square in a corner stays a square, in each cell and between labels."""
    image = torch.full((3, height, width), -1.0)
    image[:, : height // 4, : height // 4] = 1
    rows, columns = ["word " * 99, "b"], ["1", "word " * 99, "3"]
    canvas = np.asarray(grid(image.expand(2, 3, 3, height, width), rows, columns, cell=96)).astype(int)
    across, down = (round(side * 96 / min(height, width)) for side in (width, height))
    side = round(down / 4)
    for row in range(2):
        for column in range(3):
            right = canvas.shape[1] - (2 - column) * (across + 4) - 4
            bottom = canvas.shape[0] - (1 - row) * (down + 4) - 4
            cell = canvas[bottom - down : bottom, right - across : right]
            assert (cell[: side - 4, : side - 4] > 250).all()
            assert (cell[side + 4 :] < 5).all()
            assert (cell[:, side + 4 :] < 5).all()
            assert (canvas[bottom, right - across : right] == 255).all(), "the gap"


@pytest.mark.parametrize("label", ["word " * 1000, "x" * 3000, "\U0001f98a" * 2000])
def test_a_label_of_any_length_leaves_the_size_of_the_grid_alone(label: str) -> None:
    images = torch.zeros(3, 2, 3, 8, 8)
    rows, columns = [label, "full", ""], [label, "a"]
    canvas = grid(images, rows, columns)
    assert canvas.width < 3 * 128 + 2 * 128
    assert canvas.height < 4 * 128
    assert grid(images, ["x"] * 3, ["a", "b"]).height < canvas.height


def test_labels_go_on_in_further_lines() -> None:
    font = ImageFont.load_default(13)
    label = "three green apples and two oranges on a wooden table"
    whole = lines(label, font, 128, 6)
    assert len(whole) > 2
    assert " ".join(whole) == label
    assert all(font.getlength(line) <= 128 for line in whole)
    cut = lines(label, font, 128, 2)
    assert cut[0] == whole[0]
    assert cut[1].endswith("...")
    assert font.getlength(cut[1]) <= 128
    assert "".join(lines("x" * 60, font, 128, 9)) == "x" * 60
    assert lines("", font, 128, 2) == [""]


def test_missing_labels_are_refused() -> None:
    images = torch.zeros(1, 2, 3, 8, 8)
    with pytest.raises(ValueError, match="1 x 2 images with 0 row and 1 column"):
        grid(images, [], ["one"])
