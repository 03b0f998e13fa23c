"""The exact choice against trying every subset."""

import itertools
import math
import random

import pytest

from fastdistill.compress.choice.solve import Problem, pareto, within
from fastdistill.compress.choice.solve import solve as solve_problem


def solve(errors, costs, intervals=None, *, tied=(), **how):
    return solve_problem(Problem(errors=errors, costs=costs, intervals=intervals, tied=tied), **how)


def cover(first, last, errors, intervals):
    """The least error of putting the run first..last together from what was scored, unless it was
    scored as a whole."""
    if (first, last) in intervals:
        return intervals[first, last]
    if first == last:
        return errors[first]
    parts = []
    for size in range(1, last - first + 1):
        for cuts in itertools.combinations(range(first + 1, last + 1), size):
            bounds = [first, *cuts, last + 1]
            pieces = [(a, b - 1) for a, b in itertools.pairwise(bounds)]
            merged = [(left[0], right[1]) for left, right in itertools.pairwise(pieces)]
            if all(a == b or (a, b) in intervals for a, b in pieces) and not any(run in intervals for run in merged):
                parts.append(sum(intervals.get(piece, errors[piece[0]]) for piece in pieces))
    return min(parts)


def price(subset, errors, intervals):
    if intervals is None:
        return sum(errors[position] for position in subset)
    runs = []
    for position in subset:
        if runs and runs[-1][1] == position - 1:
            runs[-1][1] = position
        else:
            runs.append([position, position])
    return sum(cover(first, last, errors, intervals) for first, last in runs)


def brute_force(errors, costs, intervals):
    """(saved, error, subset) of every subset that leaves a block."""
    count = len(errors)
    subsets = itertools.chain.from_iterable(itertools.combinations(range(count), size) for size in range(count))
    return [
        (sum(costs[position] for position in subset), price(subset, errors, intervals), subset) for subset in subsets
    ]


def problem(seed, kind, count=8):
    rng = random.Random(seed)
    errors = {
        "floats": [rng.random() for _ in range(count)],
        "ties": [float(rng.randint(0, 2)) for _ in range(count)],
        "zeros": [0.0] * count,
        "signs": [rng.uniform(-0.1, 1) for _ in range(count)],
    }[kind]
    costs = [rng.choice([[12, 5], [7, 7]][seed % 2]) if seed % 3 else rng.randint(1, 1000) for _ in range(count)]
    runs = [(first, last) for first in range(count) for last in range(first + 1, min(first + 3, count))]
    # Far from the sums, in both directions.
    intervals = {run: sum(errors[run[0] : run[1] + 1]) * rng.uniform(0.2, 2) for run in runs if rng.random() < 0.7}
    return errors, costs, intervals


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("kind", ["floats", "ties", "zeros", "signs"])
@pytest.mark.parametrize("joined", [False, True], ids=["singles", "intervals"])
@pytest.mark.parametrize("best", [1, 4])
def test_every_budget_is_solved_exactly(seed, kind, joined, best):
    errors, costs, intervals = problem(seed, kind)
    intervals = intervals if joined else None
    everything = brute_force(errors, costs, intervals)
    choices = solve(errors, costs, intervals, best=best)
    for needed in {saved for saved, _, _ in everything} | {1, sum(costs) + 1}:
        found = within(choices, needed)[:best]
        expected = sorted(error for saved, error, _ in everything if saved >= needed)[:best]
        assert [choice.error for choice in found] == pytest.approx(expected, rel=1e-12, abs=1e-12)
        assert len({choice.dropped for choice in found}) == len(found)
        for choice in found:
            assert choice.saved == sum(costs[position] for position in choice.dropped) >= needed
            assert choice.error == pytest.approx(price(choice.dropped, errors, intervals), rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("joined", [False, True], ids=["singles", "intervals"])
def test_the_front_is_what_no_subset_surpasses(seed, joined):
    # Quarters add up without rounding, so that equal sums are equal.
    rng = random.Random(seed)
    errors, costs = [rng.randint(1, 20) / 4 for _ in range(8)], [rng.choice([12, 5]) for _ in range(8)]
    intervals = {(first, first + 1): rng.randint(1, 40) / 4 for first in range(7)} if joined else None
    everything = brute_force(errors, costs, intervals)
    least = {saved: min(error for other, error, _ in everything if other >= saved) for saved, _, _ in everything}
    expected = [
        (saved, error)
        for saved, error in sorted(least.items())
        if all(error < least[other] for other in least if other > saved)
    ]
    assert [(choice.saved, choice.error) for choice in pareto(solve(errors, costs, intervals, best=3))] == expected


@pytest.mark.parametrize("kind", ["ties", "zeros", "signs"])
def test_an_exact_count_is_not_traded_for_a_larger_one(kind):
    errors, _, _ = problem(1, kind)
    choices = solve(errors, [1] * 8, best=3, exact_cost=True)
    for count in range(1, 8):
        found = [choice for choice in choices if choice.saved == count]
        expected = sorted(
            sum(errors[position] for position in subset) for subset in itertools.combinations(range(8), count)
        )
        assert [choice.error for choice in found] == pytest.approx(expected[:3], abs=1e-12)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("joined", [False, True], ids=["singles", "intervals"])
@pytest.mark.parametrize(
    "tied",
    [
        [[range(0, 2), range(2, 4)]],
        [[range(0, 2), range(3, 5), range(6, 8)]],
        [[range(0, 2), range(4, 6)], [range(2, 4), range(6, 8)]],
    ],
)
@pytest.mark.parametrize("exact", [False, True], ids=["at least", "exactly"])
def test_tied_ranges_lose_equally_many(seed, joined, tied, exact):
    errors, costs, intervals = problem(seed, "floats")
    intervals = intervals if joined else None
    costs = [1] * 8 if exact else costs

    def balanced(subset):
        return all(len({sum(position in span for position in subset) for span in spans}) == 1 for spans in tied)

    everything = [found for found in brute_force(errors, costs, intervals) if balanced(found[2])]
    choices = solve(errors, costs, intervals, best=3, exact_cost=exact, tied=tied)
    assert all(balanced(choice.dropped) for choice in choices)
    for needed in {saved for saved, _, _ in everything}:
        if exact:
            found = sorted(choice.error for choice in choices if choice.saved == needed)
            expected = sorted(error for saved, error, _ in everything if saved == needed)
        else:
            found = [choice.error for choice in within(choices, needed)]
            expected = sorted(error for saved, error, _ in everything if saved >= needed)
        assert found[:3] == pytest.approx(expected[:3], rel=1e-12)


def test_of_equal_choices_the_later_blocks_go():
    assert within(solve([1.0] * 5, [1] * 5), 2)[0].dropped == (3, 4)
    assert within(solve([3.0, 1.0, 2.0, 1.0, 9.0], [1] * 5), 1)[0].dropped == (3,)


def test_a_block_that_must_stay_stays():
    choices = solve([1.0, math.inf, 1.0], [1, 100, 1])
    assert max(choice.saved for choice in choices) == 2
    assert within(choices, 3) == []


def test_a_model_of_flux_size_is_solved_in_seconds():
    rng = random.Random(0)
    errors = [rng.random() ** 3 for _ in range(57)]
    choices = solve(errors, [340] * 19 + [142] * 38, best=6)
    assert 100 < len(pareto(choices)) < 20 * 39
    distinct = solve(errors, [rng.randint(10**6, 2 * 10**6) for _ in range(57)])
    assert len(distinct) > 300


def test_a_cost_for_every_block_is_asked_for():
    with pytest.raises(ValueError, match="2 errors, 1 costs"):
        solve([1.0, 2.0], [1])
