"""Distances between sets of samples against closed forms, and modes against samples whose shares
are known.
"""

import math

import pytest
import torch

from fastdistill.data.closed_form import GaussianMixture
from fastdistill.evaluation.samples import directions, energy_distance, modes, sliced_wasserstein
from tests.toy import generator, mixture


def normal(count, dimensions, seed=0):
    return torch.randn(count, dimensions, generator=generator(seed), dtype=torch.float64)


@pytest.mark.parametrize("dimensions", [1, 2, 5])
def test_directions_are_unit_vectors_that_favour_none(dimensions):
    chosen = directions(4096, dimensions)
    torch.testing.assert_close(chosen.norm(dim=1), torch.ones(4096, dtype=torch.float64))
    # E[d d^T] of the uniform distribution on the sphere is I / D.
    torch.testing.assert_close(chosen.T @ chosen / 4096, torch.eye(dimensions).double() / dimensions, atol=0.02, rtol=0)
    assert torch.equal(chosen, directions(4096, dimensions))


def test_sliced_wasserstein_of_a_shift():
    """Along each direction the shift's own length there: |d| times the mean of |cos|, 2/pi in the
    plane, 1/2 in space.
    """
    plane, space = normal(1000, 2), normal(1000, 3)
    assert sliced_wasserstein(plane, plane + torch.tensor([3.0, 4.0])) == pytest.approx(5 * 2 / math.pi, rel=1e-3)
    assert sliced_wasserstein(space, space + torch.tensor([0.0, 3.0, 4.0]), projections=4096) == pytest.approx(
        5 / 2, rel=0.02
    )


def test_sliced_wasserstein_of_shifted_and_of_scaled_gaussians():
    """Distances of independent draws: W1(N(0, 1), N(d, 1)) = |d|, and W1(N(0, 1), N(0, s^2)) = (s -
    1) E|z|.
    """
    first, second = normal(40_000, 2), normal(40_000, 2, seed=1)
    assert sliced_wasserstein(first, second + torch.tensor([1.0, 0.0])) == pytest.approx(2 / math.pi, rel=0.02)
    assert sliced_wasserstein(first, 1.5 * second) == pytest.approx(0.5 * math.sqrt(2 / math.pi), rel=0.02)
    assert sliced_wasserstein(first, second) < 0.02


def test_sliced_wasserstein_sees_no_order_and_is_symmetric():
    first, second = normal(500, 2), 2 * normal(500, 2, seed=1)
    shuffled = second[torch.randperm(500, generator=generator())]
    assert sliced_wasserstein(first, shuffled) == sliced_wasserstein(first, second) == sliced_wasserstein(second, first)


def test_sliced_wasserstein_needs_equal_counts():
    with pytest.raises(ValueError, match="one shape"):
        sliced_wasserstein(normal(3, 2), normal(4, 2))


def test_energy_distance_of_point_masses():
    """2 |x - y|; and for masses at 0 and 1 in shares 1/2, 1/2 against all at 0, 2 (1/2) - E|X - X'|
    with 2 n^2 / 2n (2n - 1).
    """
    here, there = torch.zeros(50, 2), torch.tensor([[3.0, 4.0]]).expand(70, 2)
    assert energy_distance(here, there) == pytest.approx(10)
    halves = torch.cat([torch.zeros(20, 1), torch.ones(20, 1)])
    assert energy_distance(halves, torch.zeros(40, 1)) == pytest.approx(1 - 2 * 20**2 / (40 * 39))


def test_energy_distance_of_gaussians_on_the_line():
    """Closed form by the mean of the folded normal: for `N(m, 2)`, the difference of two draws,
    `2 exp(-m^2/4) / sqrt(pi) + m erf(m/2)`.
    """
    shift = 0.7
    ranks = (torch.arange(1500, dtype=torch.float64) + 0.5) / 1500
    quantiles = math.sqrt(2) * torch.erfinv(2 * ranks - 1)[:, None]
    folded = 2 * math.exp(-(shift**2) / 4) / math.sqrt(math.pi) + shift * math.erf(shift / 2)
    assert energy_distance(quantiles, quantiles + shift) == pytest.approx(2 * folded - 4 / math.sqrt(math.pi), abs=2e-3)


def test_energy_distance_is_unbiased():
    """The mean over many pairs of small sets of one distribution is zero within its error; the
    V-statistic's would be 2 E|X - X'| / n.
    """
    values = torch.tensor(
        [energy_distance(normal(10, 2, seed=2 * i), normal(10, 2, seed=2 * i + 1)) for i in range(400)]
    )
    assert float(values.min()) < 0
    assert abs(float(values.mean())) < 3 * float(values.std()) / 20
    assert 3 * float(values.std()) / 20 < 0.1 * 2 * math.sqrt(math.pi) / 10


def test_energy_distance_keeps_close_points_apart_and_needs_two():
    """Far from the origin, where |x|^2 + |y|^2 - 2 x y cancels; and in several chunks of rows."""
    offset = torch.full((1, 2), 1e8, dtype=torch.float64)
    first, second = 1e-2 * normal(1500, 2), 1e-2 * normal(1100, 2, seed=1) + 0.01
    assert energy_distance(first + offset, second + offset) == pytest.approx(energy_distance(first, second), rel=1e-3)
    with pytest.raises(ValueError, match="at least two"):
        energy_distance(first[:1], second)


def test_modes_of_the_mixtures_own_samples():
    data = mixture()
    found = modes(data.draw(100_000, generator())[0], data)
    # The most probable component is not always the one a sample came from, where two meet.
    assert found.total_variation < 0.02
    assert sum(found.weights) == pytest.approx(1)
    assert found.spread == pytest.approx(1, abs=0.03)
    assert found.outside == pytest.approx(math.exp(-8), abs=3e-4)


def test_modes_that_are_missing_too_narrow_or_left():
    """Two far modes with 0.7 and 0.3: all of 100 samples in the first but 20, on the line between
    them, in none.
    """
    weights, means = torch.tensor([0.7, 0.3]).double(), torch.tensor([[0.0, 0.0], [100.0, 0.0]]).double()
    data = GaussianMixture(weights, means, torch.stack([torch.eye(2), 4 * torch.eye(2)]).double())
    within = 0.5 * normal(40_000, 2).float()
    found = modes(torch.cat([within, torch.tensor([[20.0, 0.0]]).expand(10_000, 2)]), data)
    assert found.outside == pytest.approx(0.2)
    assert found.spread == pytest.approx(0.25, rel=0.02)
    # (20, 0) is 20 deviations from the first and 40 from the second.
    assert found.weights == (1.0, 0.0)
    assert found.total_variation == pytest.approx(0.3)
    assert math.isnan(modes(torch.full((3, 2), 50.0), data).spread)


def test_the_radius_says_what_is_in_a_mode():
    data = GaussianMixture.gaussian(torch.zeros(2).double(), torch.diag(torch.tensor([1.0, 9.0])).double())
    samples = torch.tensor([[0.0, 11.9], [0.0, 12.1], [3.9, 0.0], [4.1, 0.0]])
    assert modes(samples, data).outside == 0.5
    assert modes(samples, data, radius=3.0).outside == 1.0
