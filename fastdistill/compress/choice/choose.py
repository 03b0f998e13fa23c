"""The way from the user's words and the scores to the blocks that go."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn

from fastdistill.compress.choice.budget import Budget, show
from fastdistill.compress.choice.costs import Cost, Costs
from fastdistill.compress.choice.solve import Choice, Interval, Problem, pareto, solve, within
from fastdistill.compress.choice.verify import Additivity, Verified, additivity, best_of, to_verify, verify
from fastdistill.compress.naming import BLOCKS, read_words
from fastdistill.compress.surgery import check, check_count
from fastdistill.errors import UserError
from fastdistill.models.blocks import block_ids
from fastdistill.models.families.family import Anatomy, BlockId, Stack

HELP = f"a count such as 4, or {BLOCKS}"


@dataclass(frozen=True, kw_only=True)
class Request:
    """Request of `--drop-blocks` or `--budget`: a number of blocks, certain blocks, or as many as a
    budget needs."""

    count: int | None = None
    blocks: tuple[BlockId, ...] = ()
    budget: Budget | None = None

    @property
    def drops(self) -> int | None:
        """Number of blocks that go; None where a budget decides."""
        return None if self.budget else self.count or len(self.blocks)


@dataclass(frozen=True, kw_only=True)
class Selection:
    """The blocks that go, and what they were chosen from.

    Attributes:
        dropped: in the order of the forward pass.
        quantity: what was to be saved, `blocks` for a count or a list.
        full: what the full model costs of it.
        limit: what the smaller one may cost.
        front: the Pareto front of the predictions over all sets, by what they save.
        verified: sets whose joint error was measured; `dropped` is one of them.
        additivity: of the output errors, over `verified`.
    """

    dropped: list[BlockId]
    quantity: str
    full: int
    limit: int
    front: list[Choice]
    verified: list[Verified]
    additivity: Additivity


def parse(words: Sequence[str], anatomy: Anatomy) -> Request:
    """Read `["4"]` or `["double:1,2", "single:0,5-7"]`.

    Raises:
        UserError: anything else, with what is expected.
    """
    if len(words) == 1 and re.fullmatch(r"\d+", words[0]):
        if (count := int(words[0])) == 0:
            raise UserError(f"--drop-blocks 0 drops nothing; give {HELP}")
        return Request(count=count)
    try:
        blocks = read_words(words, anatomy)
    except UserError as error:
        raise UserError(f"--drop-blocks: {error}") from error
    if len(set(blocks)) < len(blocks):
        raise UserError(f"--drop-blocks {' '.join(words)} names a block twice")
    return Request(blocks=tuple(blocks))


def requested(words: Sequence[str], budget: Budget | None, network: nn.Module, anatomy: Anatomy) -> Request:
    """Request of `--drop-blocks` (`words`) or `--budget` to a network.

    Raises:
        UserError: the words cannot be read, name a block that does not exist, or leave no block.
    """
    if budget:
        return Request(budget=budget)
    request = parse(words, anatomy)
    if request.count is None:
        check(network, anatomy, request.blocks)
    else:
        check_count(request.count, len(block_ids(network, anatomy)))
    return request


def limit_of(budget: Budget, cost: Cost) -> int:
    """Largest cost that the smaller model may have.

    Raises:
        UserError: no cut that leaves a block is small enough, or the full model is already.
    """
    limit, least = budget.limit(cost.total), cost.outside + min(cost.blocks.values())
    full = f"the full model has {show(budget.quantity, cost.total)}"
    if limit >= cost.total:
        raise UserError(
            f"--budget {budget.quantity}: {show(budget.quantity, limit)} drops nothing, {full}; ask for less"
        )
    if limit < least:
        raise UserError(
            f"--budget {budget.quantity}: {show(budget.quantity, limit)} cannot be met by dropping blocks: "
            f"{full}, and one block with what is outside the blocks takes {show(budget.quantity, least)} "
            f"({least / cost.total:.3f}); ask for no less than that"
        )
    return limit


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """Facts about the blocks before sets of blocks are tried.

    Attributes:
        scores: of the single blocks by the criterion, in the order of the forward pass.
        intervals: scores of runs of blocks, by the first and the last position.
        output_errors: output error of each block alone, by which joint errors are predicted; by
            default the scores.
        tied: stacks that have to lose equally many blocks, by their config field
            (`fastdistill.models.blocks.tied`).
    """

    scores: Mapping[BlockId, float]
    intervals: Mapping[Interval, float] | None = None
    output_errors: Mapping[BlockId, float] | None = None
    tied: Mapping[str, Sequence[Stack]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Trial:
    """Measurement of the best sets before one is taken.

    Attributes:
        joint: measures the output error without the blocks at these positions.
        sets: how many sets that meet the request are measured.
    """

    joint: Callable[[tuple[int, ...]], float]
    sets: int


def choose(request: Request, costs: Costs, evidence: Evidence, trial: Trial | None = None) -> Selection:
    """The blocks that go: the set with the least sum of scores; with a trial, the set whose joint
    error is least. Of blocks that the request names nothing is measured.

    Args:
        costs: of the quantity that the request is in, at least.

    Raises:
        UserError: the request cannot be met, by its limit (`limit_of`) or because of tied stacks.
    """
    if request.blocks:
        return _named(request.blocks, costs["blocks"])
    scores, tied = evidence.scores, evidence.tied
    best = trial.sets if trial else 1
    blocks = list(scores)
    quantity = request.budget.quantity if request.budget else "blocks"
    cost = costs[quantity]
    errors = [(evidence.output_errors or scores)[block_id] for block_id in blocks]

    def meets(choice: Choice) -> bool:
        # Asked for a number, a larger one is not the answer.
        return choice.saved >= cost.total - limit if request.budget else choice.saved == cost.total - limit

    limit = limit_of(request.budget, cost) if request.budget else cost.total - (request.count or 0)
    saves = [cost.blocks[block_id] for block_id in blocks]
    ranges = [[_range(blocks, stack) for stack in stacks] for stacks in tied.values()]
    problem = Problem(errors=list(scores.values()), costs=saves, intervals=evidence.intervals, tied=ranges)
    choices = solve(problem, best=best, exact_cost=request.budget is None)
    front = pareto(choices)
    sets = [choice for choice in within(choices, cost.total - limit) if meets(choice)]
    if not sets:
        raise UserError(nothing_meets(request, tied))
    sets = to_verify(sets, front, best) if trial else sets[:1]
    verified = verify(sets, errors, trial.joint, meets) if trial else []
    return Selection(
        dropped=[blocks[position] for position in (best_of(verified) if verified else sets[0]).dropped],
        quantity=quantity,
        full=cost.total,
        limit=limit,
        front=front,
        verified=verified,
        additivity=additivity(verified),
    )


def _named(dropped: Sequence[BlockId], cost: Cost) -> Selection:
    return Selection(
        dropped=[block_id for block_id in cost.blocks if block_id in set(dropped)],
        quantity="blocks",
        full=cost.total,
        limit=cost.total - len(dropped),
        front=[],
        verified=[],
        additivity=additivity([]),
    )


def _range(blocks: Sequence[BlockId], stack: Stack) -> range:
    positions = [position for position, block_id in enumerate(blocks) if block_id.stack == stack.attribute]
    return range(positions[0], positions[-1] + 1)


def nothing_meets(request: Request, tied: Mapping[str, Sequence[Stack]]) -> str:
    """Message for a request that no set of blocks meets: why, and what to do."""
    demand = "the budget cannot be met" if request.budget else f"no {request.count} blocks can go together"
    shared = "; ".join(
        f"{' and '.join(stack.short for stack in stacks)} must lose equally many" for stacks in tied.values()
    )
    reason = shared or "too many blocks have an infinite score, which keeps them"
    return f"{demand}: {reason}; ask for another number, or for less"


def spell(blocks: Sequence[BlockId], anatomy: Anatomy) -> str:
    """The blocks as the user would type them: `double:1,2 single:0`."""
    indices = {
        stack: sorted(block_id.index for block_id in blocks if block_id.stack == stack.attribute)
        for stack in anatomy.stacks
    }
    return " ".join(f"{stack.short}:{','.join(map(str, found))}" for stack, found in indices.items() if found)
