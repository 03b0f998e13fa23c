"""Predicted and real error of a choice: forward passes without all of its blocks, and whether
errors add up."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from fastdistill.compress.choice.solve import Choice, Interval

FRONT_SETS = 4
MIN_SETS = 3
"""Least number of sets for which a share of a variance says anything."""


@dataclass(frozen=True, kw_only=True)
class Verified:
    """A set of dropped blocks with its `score` (what the choice minimises), and its output error:
    added up and measured."""

    dropped: tuple[int, ...]
    saved: int
    score: float
    predicted: float
    joint: float
    eligible: bool
    """Whether it meets the demand; the others are there to show whether errors add up."""


@dataclass(frozen=True, kw_only=True)
class Additivity:
    """Quality of the sum of single errors as a prediction of a set's joint error, over `sets` sets.

    Attributes:
        r2: `1 - sum (joint - predicted)^2 / sum (joint - mean joint)^2`, of the sums as they are; 1
            is perfect, below 0 the mean of the joint errors would have predicted better.
        r2_linear: share for the best straight line through the sums, `corr(predicted, joint)^2`:
            high where the sums rank the sets well but are off by a factor.
    """

    sets: int
    r2: float | None
    r2_linear: float | None


def intervals(count: int, longest: int) -> Iterator[Interval]:
    """Runs of 2 to `longest` neighbours among `count` blocks, all of them excepted."""
    for first in range(count):
        for last in range(first + 1, min(first + longest, count)):
            if last - first + 1 < count:
                yield first, last


def to_verify(candidates: Sequence[Choice], front: Sequence[Choice], best: int) -> list[Choice]:
    """The `best` first candidates, and sets spread over the Pareto front from half to one and a
    half of what the first one saves.

    Sets of nearly equal prediction cannot show whether the prediction is right; those of other
    sizes can. A single block is no test, as its error was measured.
    """
    chosen = list(candidates[:best])
    size = chosen[0].saved
    others = [
        choice
        for choice in front
        if len(choice.dropped) > 1 and size <= 2 * choice.saved <= 3 * size and choice not in chosen
    ]
    count = min(FRONT_SETS, len(others))
    return chosen + [others[(2 * i + 1) * len(others) // (2 * count)] for i in range(count)]


def verify(
    sets: Sequence[Choice],
    errors: Sequence[float],
    joint: Callable[[tuple[int, ...]], float],
    meets: Callable[[Choice], bool],
) -> list[Verified]:
    """Measure every set by `joint`; `errors` are the output errors of the single blocks, `meets`
    says which sets may be taken."""
    return [
        Verified(
            dropped=choice.dropped,
            saved=choice.saved,
            score=choice.error,
            predicted=sum(errors[position] for position in choice.dropped),
            joint=joint(choice.dropped),
            eligible=meets(choice),
        )
        for choice in sets
    ]


def best_of(verified: Sequence[Verified]) -> Verified:
    """The eligible set with the least measured error; of equal ones the first."""
    return min((found for found in verified if found.eligible), key=lambda found: found.joint)


def additivity(verified: Sequence[Verified]) -> Additivity:
    predicted, joint = [found.predicted for found in verified], [found.joint for found in verified]
    if len(verified) < MIN_SETS or len(set(joint)) == 1:
        return Additivity(sets=len(verified), r2=None, r2_linear=None)
    mean = statistics.fmean(joint)
    missed = sum((measured - expected) ** 2 for measured, expected in zip(joint, predicted, strict=True))
    linear = statistics.correlation(predicted, joint) ** 2 if len(set(predicted)) > 1 else None
    return Additivity(
        sets=len(verified), r2=1 - missed / sum((measured - mean) ** 2 for measured in joint), r2_linear=linear
    )
