"""The emoji testbed draws what it says."""

import pytest
import torch

from fastdistill.data.emoji import BACKGROUNDS, CHARACTERS, MAX_SHIFT_PIXELS, SIZE, Emoji


@pytest.fixture(scope="module")
def data():
    return Emoji()


def test_captions_are_distinct(data):
    assert len(data) == len(CHARACTERS) == len(set(CHARACTERS)) == len(set(data.captions)) == 200


def test_the_same_generator_draws_the_same(data):
    first, second = (data.random(8, torch.Generator().manual_seed(7)) for _ in range(2))
    assert torch.equal(first.pixels, second.pixels)
    assert torch.equal(first.captions, second.captions)


def test_draws_are_in_range_and_framed_by_their_background(data):
    draws = data.random(256, torch.Generator().manual_seed(0))
    assert draws.pixels.shape == (256, 3, SIZE, SIZE)
    assert draws.pixels.min() >= -1 - 1e-6
    assert draws.pixels.max() <= 1 + 1e-6
    colours = torch.tensor(list(BACKGROUNDS.values()))[draws.backgrounds] / 127.5 - 1
    # No draw leaves the frame: its outermost pixels are background.
    for edge in (draws.pixels[:, :, 0], draws.pixels[:, :, -1], draws.pixels[:, :, :, 0], draws.pixels[:, :, :, -1]):
        torch.testing.assert_close(edge, colours[:, :, None].expand_as(edge), rtol=0, atol=1e-5)


def test_backgrounds_have_equal_odds_for_each_caption(data):
    draws = data.draw(torch.zeros(4000, dtype=torch.long), torch.Generator().manual_seed(0))
    counts = torch.bincount(draws.backgrounds, minlength=len(BACKGROUNDS)).float()
    chi_squared = float(((counts - 500) ** 2 / 500).sum())
    assert chi_squared < 24.3  # the 99.9 % point with 7 degrees of freedom


def test_the_image_moves_by_at_most_the_stated_shift(data):
    """The centre of mass of one image over many draws stays within the shift (and what scaling adds
    to it).
    """
    index = torch.full((300,), 50)
    coverage = data.rgba_premultiplied[index[0], 3]
    rows = torch.arange(SIZE).float()

    def centre(alpha):
        return (alpha.sum(dim=-1) * rows).sum(dim=-1) / alpha.sum(dim=(-1, -2))

    draws = data.draw(index, torch.Generator().manual_seed(0))
    colours = torch.tensor(list(BACKGROUNDS.values()))[draws.backgrounds] / 127.5 - 1
    alpha = ((draws.pixels - colours[:, :, None, None]).abs().sum(dim=1) > 0.3).float()
    offset = centre(alpha) - centre((coverage > 0.1).float())
    assert offset.abs().max() < MAX_SHIFT_PIXELS + 3
    assert offset.std() > 0.5


def test_a_missing_sheet_says_how_to_make_it(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"python -m fastdistill.data.emoji"):
        Emoji(tmp_path)
