"""The labelled grid shows each image where its labels say."""

import pytest
import torch

from fastdistill.run.grid import grid


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


def test_long_labels_are_cut_and_missing_ones_refused():
    images = torch.zeros(1, 2, 3, 8, 8)
    assert grid(images, [], ["x" * 500, ""], cell=32).size == grid(images, [], ["x", ""], cell=32).size
    with pytest.raises(ValueError, match="1 x 2 images with 0 row and 1 column"):
        grid(images, [], ["one"])
