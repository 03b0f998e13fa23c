"""Names of blocks as a user gives them: `double:1,2 single:0,5-7`, `{"double": [1, 2]}`, or
`BlockId`."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fastdistill.errors import UserError
from fastdistill.models.families.family import Anatomy, BlockId
from fastdistill.run.numbers import whole

BLOCKS = "blocks such as double:1,2 single:0,5-7"

Drop = Mapping[str, Sequence[int]] | Iterable[BlockId | str] | BlockId | str
"""Blocks to drop, in any of the ways that `spelled_out` reads."""


def spelled_out(drop: Drop, anatomy: Anatomy) -> set[BlockId]:
    """Blocks that `drop` names: words as the command takes them, one string or several; lists of
    blocks with the indices; or `BlockId`.

    Raises:
        UserError: none of these, a list or an index that is none, or a block twice.
    """
    blocks: list[BlockId] = []
    if isinstance(drop, Mapping):
        for name, indices in drop.items():
            blocks += _indexed(name, indices, anatomy)
    else:
        for entry in _entries(drop):
            if isinstance(entry, BlockId):
                blocks += _indexed(entry.stack, [entry.index], anatomy)
            elif isinstance(entry, str):
                blocks += read_words(entry.split(), anatomy)
            else:
                raise UserError(f'give the blocks to drop as "double:1,2" or {{"double": [1, 2]}}, not as {drop!r}')
    if twice := [block_id for block_id, count in Counter(blocks).items() if count > 1]:
        raise UserError(f"{twice[0].stack} {twice[0].index} is to be dropped twice; name every block once")
    return set(blocks)


def read_words(words: Sequence[str], anatomy: Anatomy) -> list[BlockId]:
    """Blocks of words such as `["double:1,2", "single:0,5-7"]`.

    Raises:
        UserError: anything else, with what is expected.
    """
    lists = _attributes(anatomy)
    blocks = []
    for word in words:
        name, colon, ranges = word.partition(":")
        if not colon or name not in lists or not re.fullmatch(r"\d+(-\d+)?(,\d+(-\d+)?)*", ranges):
            known = ", ".join(stack.short for stack in anatomy.stacks)
            raise UserError(f"cannot read {word!r}; give {BLOCKS}; this model has {known}")
        for part in ranges.split(","):
            first, _, last = part.partition("-")
            indices = range(int(first), int(last or first) + 1)
            if not indices:
                raise UserError(f"the range {part} of {word!r} is empty; write it from low to high")
            blocks += [BlockId(stack=lists[name], index=index) for index in indices]
    return blocks


def _entries(drop: Any) -> list[Any]:
    """Entries of `drop`, which may be a single one."""
    if (isinstance(drop, str) and drop.strip().isdecimal()) or isinstance(drop, int):
        raise UserError(
            f"{drop!r} is a number of blocks, and which ones has to be said: fastdistill.compress.select(transformer, "
            f"scores, drop_blocks={drop}) chooses them"
        )
    if isinstance(drop, str | BlockId) or not isinstance(drop, Iterable):
        return [drop]
    return list(drop)


def _indexed(name: str, indices: Any, anatomy: Anatomy) -> list[BlockId]:
    """Blocks of the list `name`, by its attribute or short name."""
    if isinstance(indices, str) or not isinstance(indices, Iterable):
        raise UserError(f'give the blocks to drop as {{"{name}": [1, 2]}}, not as {{"{name}": {indices!r}}}')
    lists = _attributes(anatomy)
    blocks = [BlockId(stack=lists.get(name, name), index=whole(f"index of {name!r}", index)) for index in indices]
    # Where a block is named, `check` says that it does not exist.
    if not blocks and name not in lists:
        known = ", ".join(stack.short for stack in anatomy.stacks)
        raise UserError(f"there is no list of blocks {name!r}; this model has {known}")
    return blocks


def _attributes(anatomy: Anatomy) -> dict[str, str]:
    """Attribute of each list of blocks, by its short name and by itself."""
    return {name: stack.attribute for stack in anatomy.stacks for name in (stack.short, stack.attribute)}
