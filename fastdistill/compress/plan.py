"""`--dry-run`: what a cut would give, from the model's config alone. No weights are read and
nothing is computed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import torch

from fastdistill.compress.choice.budget import Budget, show
from fastdistill.compress.choice.choose import limit_of, nothing_meets, requested, spell
from fastdistill.compress.choice.costs import Costs, flops, kinds, sizes, workload
from fastdistill.compress.config import CompressConfig, tell_of_few_points
from fastdistill.compress.repairs.enough import points_needed
from fastdistill.errors import UserError
from fastdistill.models.blocks import tied
from fastdistill.models.families import anatomy_of
from fastdistill.models.families.family import Anatomy, BlockId, Stack
from fastdistill.models.skeleton import read_config

COLUMNS = {"params": "parameters", "memory": "weights", "flops": "operations"}


def plan(config: CompressConfig) -> str:
    """A table of blocks, parameters, bytes and operations: of the cut that is asked for, or of all
    that would meet the demand.

    A count or a budget has no scores to choose by yet. But blocks of one kind cost the same, so
    that what a cut costs depends only on how many of each kind stay; all such combinations are
    listed, for a budget those to which no block can be added. A block of SD3 that its place makes
    smaller, the last one, costs what it would elsewhere, as whichever takes its place is smaller
    then.

    Raises:
        UserError: no such model, not a supported one, or a demand that cannot be met.
    """
    network, sampling, vae_scale_factor = read_config(config.run.model)
    sampling = sampling.replaced(config.sampling)
    anatomy = anatomy_of(network)
    costs = sizes(network, anatomy, getattr(torch, config.run.save_dtype).itemsize)
    load = workload(sampling, vae_scale_factor)
    costs["flops"] = flops(network, anatomy, load)
    # Families whose layers a repair knows make a token of 2 x 2 latents.
    tokens = {"image": load.height * load.width // 4, "text": load.text_tokens}
    tell_of_few_points(config, points_needed(network, anatomy, tokens))
    groups = kinds(network, anatomy)
    text = [
        f"{type(network).__name__}, weights in {config.run.save_dtype}, one forward pass at {sampling.width} x "
        f"{sampling.height} pixels and {sampling.max_sequence_length} text tokens.",
        *([anatomy.remark] if anatomy.remark else []),
        "",
        f"| {' + '.join(_names(groups, anatomy))} | " + " | ".join(COLUMNS.values()) + " |",
        "|---" * (len(COLUMNS) + 1) + "|",
        _row([len(group) for group in groups], [], costs),
    ]
    request = requested(config.drop_blocks, config.parsed_budget(), network, anatomy)
    if request.blocks:
        left = [sum(block_id not in request.blocks for block_id in group) for group in groups]
        return "\n".join([*text, _row(left, request.blocks, costs), "", f"Without {spell(request.blocks, anatomy)}."])
    shared = tied(network, anatomy)
    drops = [drop for drop in _drops(groups) if _equally(drop, groups, shared)]
    if request.budget:
        found = _within(request.budget, drops, costs)
        closing = (
            f"What meets {config.asked} and would not with one block more; "
            "whatever leaves less of each does too. Which blocks go is chosen by scores, "
            "for which the weights are needed."
        )
    else:
        found = [drop for drop in drops if len(drop.blocks) == request.count]
        closing = (
            f"Every way to drop {request.count}; which blocks go is chosen by scores, for which the weights are needed."
        )
    if not found:
        raise UserError(nothing_meets(request, shared))
    rows = [
        _row([len(group) - count for group, count in zip(groups, drop.counts, strict=True)], drop.blocks, costs)
        for drop in found
    ]
    return "\n".join([*text, *rows, "", closing])


def _names(groups: Sequence[Sequence[BlockId]], anatomy: Anatomy) -> list[str]:
    """`double`, `single`; a stack with more than one kind of block has them told apart by their
    indices."""
    short = {stack.attribute: stack.short for stack in anatomy.stacks}
    stacks = [group[0].stack for group in groups]
    return [short[group[0].stack] if stacks.count(group[0].stack) == 1 else spell(group, anatomy) for group in groups]


@dataclass(frozen=True, kw_only=True)
class Drop:
    """Number of blocks of each kind that go, and blocks that stand for them."""

    counts: tuple[int, ...]
    blocks: list[BlockId]

    def covers(self, other: Drop) -> bool:
        """Whether this drop takes as many of each kind as `other`, and more of some."""
        return self.counts != other.counts and all(
            mine >= its for mine, its in zip(self.counts, other.counts, strict=True)
        )


def _drops(groups: Sequence[Sequence[BlockId]]) -> Iterator[Drop]:
    """Every number of each kind, except all blocks."""
    for counts in product(*(range(len(group) + 1) for group in groups)):
        blocks = [block_id for group, count in zip(groups, counts, strict=True) for block_id in group[:count]]
        if len(blocks) < sum(map(len, groups)):
            yield Drop(counts=counts, blocks=blocks)


def _equally(drop: Drop, groups: Sequence[Sequence[BlockId]], shared: Mapping[str, Sequence[Stack]]) -> bool:
    """Whether stacks that share a count lose equally many."""
    lost: Counter[str] = Counter()
    for group, count in zip(groups, drop.counts, strict=True):
        lost[group[0].stack] += count
    return all(len({lost[stack.attribute] for stack in stacks}) == 1 for stacks in shared.values())


def _within(budget: Budget, drops: Sequence[Drop], costs: Costs) -> list[Drop]:
    """Drops that meet the budget and take no more than they must."""
    if budget.quantity not in costs:
        raise UserError(
            f"--budget {budget.quantity}: it is measured on the model itself, and --dry-run has only its config; "
            "plan by operations, such as --budget flops=0.7, or give the command without --dry-run"
        )
    cost = costs[budget.quantity]
    limit = limit_of(budget, cost)
    enough = [drop for drop in drops if cost.left(drop.blocks) <= limit]
    return [drop for drop in enough if not any(drop.covers(other) for other in enough)]


def _row(left: Sequence[int], dropped: Sequence[BlockId], costs: Costs) -> str:
    cells = []
    for quantity in COLUMNS:
        cost = costs[quantity]
        share = f" ({cost.left(dropped) / cost.total:.3f})" if dropped else ""
        cells.append(show(quantity, cost.left(dropped)) + share)
    return f"| {' + '.join(map(str, left))} | " + " | ".join(cells) + " |"
