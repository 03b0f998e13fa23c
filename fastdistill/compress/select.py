"""From the user's words and the scores to the blocks that go."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fastdistill.errors import UserError
from fastdistill.models.family import BlockId, Family

HELP = "a count such as 4, or blocks such as double:1,2 single:0,5-7"


@dataclass(frozen=True, kw_only=True)
class Request:
    """What ``--drop-blocks`` asks for: that many blocks, or these."""

    count: int | None = None
    blocks: tuple[BlockId, ...] = ()


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


def choose(request: Request, scores: Mapping[BlockId, float]) -> list[BlockId]:
    """The requested blocks, or the requested number of those whose loss hurts least; ties go to the later block."""
    if request.count is None:
        return sorted(request.blocks)
    order = list(scores)
    return sorted(sorted(scores, key=lambda block_id: (scores[block_id], -order.index(block_id)))[: request.count])


def spell(blocks: Sequence[BlockId], family: Family) -> str:
    """The blocks as the user would type them: ``double:1,2 single:0``."""
    indices = {stack: sorted(block_id.index for block_id in blocks if block_id.stack == stack.attribute) for stack in family.stacks}
    return " ".join(f"{stack.short}:{','.join(map(str, found))}" for stack, found in indices.items() if found)
