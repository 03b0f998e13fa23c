"""Each metric against a case whose value is known."""

import math

import pytest
import torch

from fastdistill.data.emoji import BACKGROUNDS, Emoji
from fastdistill.evaluation.backgrounds import backgrounds
from fastdistill.evaluation.classifier import Classifier, predict
from fastdistill.evaluation.frechet import frechet_distance
from fastdistill.evaluation.metrics.background_coverage import expected_total_variation, total_variation
from fastdistill.evaluation.metrics.background_purity import purity
from fastdistill.evaluation.psnr import psnr
from fastdistill.evaluation.statistics import over_seeds, spread, wilson_interval


def test_frechet_distance_of_gaussians_in_closed_form():
    generator = torch.Generator().manual_seed(0)
    first = (
        torch.randn(200_000, 3, generator=generator, dtype=torch.float64)
        @ torch.tensor([[2.0, 0, 0], [0, 1, 0], [0, 0, 0.5]]).double()
    )
    second = torch.randn(200_000, 3, generator=generator, dtype=torch.float64) + torch.tensor([1.0, 0, 2])
    # Diagonal covariances commute: sum of (s_1 - s_2)^2, plus the squared distance of the means.
    expected = (2 - 1) ** 2 + 0 + (0.5 - 1) ** 2 + 1 + 4
    assert frechet_distance(first, second) == pytest.approx(expected, rel=0.01)
    assert frechet_distance(first, first) == pytest.approx(0, abs=1e-6)


def test_frechet_distance_with_correlated_features_matches_the_general_square_root():
    generator = torch.Generator().manual_seed(1)
    mix = torch.randn(4, 4, generator=generator, dtype=torch.float64)
    first = torch.randn(500, 4, generator=generator, dtype=torch.float64) @ mix
    second = torch.randn(400, 4, generator=generator, dtype=torch.float64)
    cov_1, cov_2 = torch.cov(first.T), torch.cov(second.T)
    root_trace = torch.linalg.eigvals(cov_1 @ cov_2).real.sqrt().sum()
    means = (first.mean(0) - second.mean(0)).square().sum()
    expected = means + cov_1.trace() + cov_2.trace() - 2 * root_trace
    assert frechet_distance(first, second) == pytest.approx(float(expected), rel=1e-9)


def test_frechet_distance_needs_two_samples():
    with pytest.raises(ValueError, match="at least two"):
        frechet_distance(torch.randn(1, 3), torch.randn(5, 3))


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"), [(0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (81, 263, 0.2553, 0.3662)]
)
def test_wilson_interval(successes, trials, low, high):
    """The last is Newcombe 1998, table I."""
    assert wilson_interval(successes, trials) == pytest.approx((low, high), abs=1e-4)
    assert (
        0 <= wilson_interval(successes, trials)[0] <= successes / trials <= wilson_interval(successes, trials)[1] <= 1
    )


def test_spread_is_the_sample_standard_deviation():
    assert spread([1.0, 2.0, 4.0]) == pytest.approx(math.sqrt(7 / 3))


def test_psnr():
    reference = torch.zeros(2, 3, 4, 4)
    images = torch.stack([torch.full((3, 4, 4), 0.2), torch.zeros(3, 4, 4)])
    values = psnr(images, reference)
    assert float(values[0]) == pytest.approx(20.0)
    assert values[1] == math.inf


def test_backgrounds_are_read_off_real_draws():
    data = Emoji()
    draws = data.random(400, torch.Generator().manual_seed(0))
    assert (backgrounds(draws.pixels) == draws.backgrounds).float().mean() == 1
    noisy = draws.pixels + 0.1 * torch.randn(draws.pixels.shape, generator=torch.Generator().manual_seed(1))
    assert (backgrounds(noisy) == draws.backgrounds).float().mean() > 0.995


def test_purity_is_one_for_draws_and_falls_where_images_have_two_backgrounds():
    pixels = Emoji().random(400, torch.Generator().manual_seed(0)).pixels
    assert purity(pixels) == 1
    mixed = pixels.clone()
    mixed[..., :16, :] = pixels.roll(1, dims=0)[..., :16, :]
    # Two rows of 64 and fourteen of the columns' four pixels, of 496 in all; one neighbour in eight
    # has the same colour.
    assert purity(mixed) == pytest.approx(1 - (2 * 64 + 14 * 4) / 496 * 7 / 8, abs=0.01)


def test_total_variation():
    classes = len(BACKGROUNDS)
    assert total_variation(torch.arange(classes)) == pytest.approx(0)
    assert total_variation(torch.zeros(10, dtype=torch.long)) == pytest.approx(1 - 1 / classes)
    generator = torch.Generator().manual_seed(0)
    drawn = [total_variation(torch.randint(classes, (800,), generator=generator)) for _ in range(400)]
    assert expected_total_variation(800) == pytest.approx(sum(drawn) / len(drawn), rel=0.05)


def test_classifier_is_right_on_fresh_draws():
    data = Emoji()
    draws = data.draw(torch.arange(len(data)).repeat(10), torch.Generator().manual_seed(123))
    right = predict(Classifier.load(len(data)), draws.pixels) == draws.captions
    assert right.float().mean() >= 0.99


def test_a_value_over_seeds_is_shown_with_its_deviation():
    assert over_seeds([1.0, 2.0, 3.0], "{:.1f}") == "2.0 ± 1.0"
    assert over_seeds([0.25], "{:.1%}") == "25.0%"
