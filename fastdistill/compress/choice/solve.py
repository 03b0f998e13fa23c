"""Which blocks to drop for the least error: exact, for every budget at once.

Choosing blocks `D` to drop such that `sum of cost(D) >= needed` and `sum of error(D)` is least is a
0/1 knapsack problem. Where contiguous intervals were scored too it becomes a shortest path over
runs of dropped blocks (Puzzle, arXiv 2411.19146, solves the same with a general integer program).

Solved by dynamic programming over the blocks in order. A partial choice is kept unless `best`
others save at least as much at no more error. That loses nothing: what both can be completed with
is the same, and floating-point addition is monotone, so that the order of two errors outlives any
equal addition, rounding included. With a few distinct costs, as in FLUX, the partial choices number
a few hundred; in general the instance decides, and nothing is ever cut off by a tolerance.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

Interval = tuple[int, int]
"""First and last position, both included."""

Partial = tuple[int, float, int]
"""A choice for the blocks up to some position: minus what it saves, its error, minus the bits of
the dropped positions.

Tuples in this order sort by what is better: saves more, errs less, and of equals drops the later
blocks.
"""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Dropping the blocks at positions `dropped` saves `saved` and is predicted to cost `error`."""

    dropped: tuple[int, ...]
    saved: int
    error: float


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Error and saving of dropping each block.

    Attributes:
        errors: of dropping each block alone, in the order of the forward pass; infinite for a block
            that must stay.
        costs: what dropping each block saves, whole numbers.
        intervals: errors of dropping contiguous blocks together. A run of dropped blocks that was
            scored counts as scored, even where its blocks alone promise less. A longer run counts
            as the cheapest way to put it together from pieces of which no two neighbours were
            scored as one.
        tied: groups of ranges of positions; only choices are made that drop equally many in all
            ranges of a group.
    """

    errors: Sequence[float]
    costs: Sequence[int]
    intervals: Mapping[Interval, float] | None = None
    tied: Sequence[Sequence[range]] = ()

    def __post_init__(self) -> None:
        if len(self.errors) != len(self.costs):
            raise ValueError(f"one cost per block: {len(self.errors)} errors, {len(self.costs)} costs")


def solve(problem: Problem, *, best: int = 1, exact_cost: bool = False) -> list[Choice]:
    """Choices by falling `saved`, then rising `error`; no budget needs another.

    For every `needed`, the first `best` entries of `within` are the `best` of all subsets that
    leave at least one block. Of equal choices the one that drops later blocks goes first.

    Args:
        best: how many choices a budget may be asked for.
        exact_cost: compare only choices that save equally much: for a demand to save exactly so
            much.
    """
    count, intervals, tied = len(problem.errors), problem.intervals, problem.tied
    price = _prices(problem.errors, intervals)
    saves = [0, *accumulate(problem.costs)]
    fronts: list[list[Partial]] = [[] for _ in range(count + 1)]
    fronts[0].append((0, 0.0, 0))
    for start in range(count):
        partials = fronts[start] = _undominated(fronts[start], best, exact_cost, _open(tied, start))
        for end, following in _runs(start, count, joined=intervals is not None):
            error, saved, bits = price[start, end], saves[end + 1] - saves[start], (1 << (end + 1)) - (1 << start)
            if error < math.inf:
                fronts[following] += [
                    (minus_saved - saved, so_far + error, mask - bits) for minus_saved, so_far, mask in partials
                ]
        fronts[start + 1] += partials
    return [
        Choice(
            dropped=tuple(position for position in range(count) if -minus_mask >> position & 1),
            saved=-minus_saved,
            error=error,
        )
        for minus_saved, error, minus_mask in _undominated(fronts[count], best, exact_cost, _open(tied, count))
    ]


def within(choices: Sequence[Choice], needed: int) -> list[Choice]:
    """Choices that save at least `needed`, by rising error; of equal errors the one that saves more
    goes first."""
    return sorted(
        (choice for choice in choices if choice.saved >= needed), key=lambda choice: (choice.error, -choice.saved)
    )


def pareto(choices: Sequence[Choice]) -> list[Choice]:
    """Choices of `solve` that nothing surpasses, by rising `saved`: each saves more for more error."""
    front: list[Choice] = []
    for choice in choices:
        if not front or choice.error < front[-1].error:
            front.append(choice)
    return front[::-1]


def _undominated(
    partials: list[Partial], best: int, exact_cost: bool, account: Callable[[int], Hashable]
) -> list[Partial]:
    """Partial choices that fewer than `best` others with the same account equal or surpass, in
    order.

    A partial choice whose account is `None` is left out.
    """
    kept: list[Partial] = []
    leasts: dict[Hashable, list[float]] = {}
    for partial in sorted(partials):
        key = account(-partial[2])
        if key is None:
            continue
        least = leasts.setdefault((key, partial[0] if exact_cost else None), [])
        if len(least) < best or partial[1] < least[-1]:
            kept.append(partial)
            bisect.insort(least, partial[1])
            del least[best:]
    return kept


def _open(tied: Sequence[Sequence[range]], position: int) -> Callable[[int], Hashable]:
    """Account of a choice for the blocks up to `position`, as a function of its bits.

    Choices with the same account can be completed in the same ways; the account is `None` if there
    is no way. In a group of tied ranges it is how many blocks each range has lost, and nothing once
    all have lost equally many and are passed.
    """
    groups = [[(1 << span.stop) - (1 << span.start) for span in spans] for spans in tied]
    passed = [all(span.stop <= position for span in spans) for spans in tied]

    def account(bits: int) -> Hashable:
        lost = [tuple((bits & mask).bit_count() for mask in masks) for masks in groups]
        if any(done and len(set(counts)) > 1 for done, counts in zip(passed, lost, strict=True)):
            return None
        return tuple(counts for done, counts in zip(passed, lost, strict=True) if not done)

    return account


def _runs(start: int, count: int, *, joined: bool) -> Iterator[tuple[int, int]]:
    """The runs of dropped blocks from `start`: the last position of each and the position at which
    the choice goes on.

    A run that counts as one (`joined`) ends with a kept block. So does a run from the first block
    on in any case, and it may not be the whole model: whatever goes after it, something has been
    kept.
    """
    if joined or start == 0:
        for end in range(start, count if start else count - 1):
            yield end, min(end + 2, count)
    else:
        yield start, start + 1


def _prices(errors: Sequence[float], intervals: Mapping[Interval, float] | None) -> dict[Interval, float]:
    """The error of dropping each run of blocks."""
    count = len(errors)
    if intervals is None:
        return {
            (first, last): total
            for first in range(count)
            for last, total in enumerate(accumulate(errors[first:]), first)
        }
    scored = {(position, position): error for position, error in enumerate(errors)} | dict(intervals)
    price: dict[Interval, float] = {}
    for start in range(count):
        # The least error of the blocks from `start` on by the last piece that they are put together
        # from.
        by_last: dict[Interval, float] = {}
        for end in range(start, count):
            for first in range(start, end + 1):
                if (first, end) not in scored:
                    continue
                before = [
                    by_last[earlier, first - 1]
                    for earlier in range(start, first)
                    if (earlier, first - 1) in by_last and (earlier, end) not in scored
                ]
                if first == start or before:
                    by_last[first, end] = min(before, default=0.0) + scored[first, end]
            price[start, end] = min(by_last[first, end] for first in range(start, end + 1) if (first, end) in by_last)
            price[start, end] = scored.get((start, end), price[start, end])
    return price
