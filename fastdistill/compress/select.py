"""From the user's words and the scores to the blocks that go."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from fastdistill.compress.budget import Budget, show
from fastdistill.compress.costs import Cost, Costs
from fastdistill.compress.solve import Choice, Interval, pareto, solve, within
from fastdistill.compress.verify import Additivity, Verified, additivity, best_of, to_verify, verify
from fastdistill.errors import UserError
from fastdistill.models.family import BlockId, Family

HELP = "a count such as 4, or blocks such as double:1,2 single:0,5-7"


@dataclass(frozen=True, kw_only=True)
class Request:
    """What ``--drop-blocks`` or ``--budget`` asks for: that many blocks, or these, or as many as a budget needs."""

    count: int | None = None
    blocks: tuple[BlockId, ...] = ()
    budget: Budget | None = None


@dataclass(frozen=True, kw_only=True)
class Selection:
    """The blocks that go, and what they were chosen from.

    Attributes:
        dropped: in the order of the forward pass.
        quantity: what was to be saved, ``blocks`` for a count or a list.
        full: what the full model costs of it.
        limit: what the smaller one may cost.
        front: the Pareto front of the predictions over all sets, by what they save.
        verified: sets whose joint error was measured; ``dropped`` is one of them.
        additivity: of the output errors, over ``verified``.
    """

    dropped: list[BlockId]
    quantity: str
    full: int
    limit: int
    front: list[Choice]
    verified: list[Verified]
    additivity: Additivity


def parse(words: Sequence[str], family: Family) -> Request:
    """Read ``["4"]`` or ``["double:1,2", "single:0,5-7"]``.

    Raises:
        UserError: anything else, with what is expected.
    """
    if len(words) == 1 and re.fullmatch(r"\d+", words[0]):
        if (count := int(words[0])) == 0:
            raise UserError(f"--drop-blocks 0 drops nothing; give {HELP}")
        return Request(count=count)
    stacks = {stack.short: stack.attribute for stack in family.stacks} | {stack.attribute: stack.attribute for stack in family.stacks}
    blocks: list[BlockId] = []
    for word in words:
        name, colon, ranges = word.partition(":")
        if not colon or name not in stacks or not re.fullmatch(r"\d+(-\d+)?(,\d+(-\d+)?)*", ranges):
            raise UserError(f"cannot read --drop-blocks {word!r}; give {HELP}")
        for part in ranges.split(","):
            first, _, last = part.partition("-")
            indices = range(int(first), int(last or first) + 1)
            if not indices:
                raise UserError(f"--drop-blocks {word!r}: the range {part} is empty; write it from low to high")
            blocks += [BlockId(stack=stacks[name], index=index) for index in indices]
    if len(set(blocks)) < len(blocks):
        raise UserError(f"--drop-blocks {' '.join(words)} names a block twice")
    return Request(blocks=tuple(blocks))


def limit_of(budget: Budget, cost: Cost) -> int:
    """What the smaller model may cost.

    Raises:
        UserError: no cut that leaves a block is small enough, or the full model is already.
    """
    limit, least = budget.limit(cost.total), cost.outside + min(cost.blocks.values())
    full = f"the full model has {show(budget.quantity, cost.total)}"
    if limit >= cost.total:
        raise UserError(f"--budget {budget.quantity}: {show(budget.quantity, limit)} drops nothing, {full}; ask for less")
    if limit < least:
        raise UserError(
            f"--budget {budget.quantity}: {show(budget.quantity, limit)} cannot be met by dropping blocks: {full}, and one block with what "
            f"is outside the blocks takes {show(budget.quantity, least)} ({least / cost.total:.3f}); ask for no less than that"
        )
    return limit


def select(
    request: Request,
    costs: Costs,
    scores: Mapping[BlockId, float],
    output_errors: Mapping[BlockId, float],
    joint: Callable[[tuple[int, ...]], float],
    *,
    intervals: Mapping[Interval, float] | None,
    best: int,
) -> Selection:
    """The blocks that go: those named, or of the ``best`` sets by the sum of their scores the one whose joint error is least.

    Args:
        costs: those of the quantity that the request is in, at least.
        scores: of the single blocks by the criterion, in the order of the forward pass, and of ``intervals`` of them where there are any.
        output_errors: the output error of each block alone, by which the joint ones are predicted.
        joint: measures the output error without the blocks at these positions.

    Raises:
        UserError: :func:`limit_of` does.
    """
    blocks = list(scores)
    quantity = request.budget.quantity if request.budget else "blocks"
    cost = costs[quantity]
    errors = [output_errors[block_id] for block_id in blocks]

    def meets(choice: Choice) -> bool:
        # Asked for a number, a larger one is not the answer.
        return choice.saved >= cost.total - limit if request.budget else choice.saved == cost.total - limit

    if request.blocks:
        positions = tuple(sorted(map(blocks.index, request.blocks)))
        named = Choice(dropped=positions, saved=len(positions), error=sum(scores[blocks[position]] for position in positions))
        limit, front, sets = cost.total - named.saved, [], [named]
    else:
        limit = limit_of(request.budget, cost) if request.budget else cost.total - (request.count or 0)
        saves = [cost.blocks[block_id] for block_id in blocks]
        choices = solve(list(scores.values()), saves, intervals, best=best, exact_cost=request.budget is None)
        front = pareto(choices)
        sets = to_verify([choice for choice in within(choices, cost.total - limit) if meets(choice)], front, best)
    verified = verify(sets, errors, joint, meets)
    return Selection(
        dropped=[blocks[position] for position in best_of(verified).dropped],
        quantity=quantity,
        full=cost.total,
        limit=limit,
        front=front,
        verified=verified,
        additivity=additivity(verified),
    )


def spell(blocks: Sequence[BlockId], family: Family) -> str:
    """The blocks as the user would type them: ``double:1,2 single:0``."""
    indices = {stack: sorted(block_id.index for block_id in blocks if block_id.stack == stack.attribute) for stack in family.stacks}
    return " ".join(f"{stack.short}:{','.join(map(str, found))}" for stack, found in indices.items() if found)
