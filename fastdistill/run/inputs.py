"""Inputs of a run by their content, to see whether a run that continues has the same."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

NAMED = 3
"""Changed items that a message names."""


@dataclass(frozen=True, kw_only=True)
class Input:
    """One input of a run."""

    called: str
    """Words for people, such as `the prompts in p.txt`."""
    items: Mapping[str, str]
    """Digest of every item by its name, such as `line 1`."""


def difference(earlier: Mapping[str, str], current: Mapping[str, str]) -> str | None:
    """Items that changed, are gone, or are new; None if all are equal."""
    if earlier == current:
        return None
    kinds = {
        "changed": [item for item in current if item in earlier and current[item] != earlier[item]],
        "gone": [item for item in earlier if item not in current],
        "new": [item for item in current if item not in earlier],
    }
    return "; ".join(f"{kind}: {_some(items)}" for kind, items in kinds.items() if items)


def _some(items: list[str]) -> str:
    more = len(items) - NAMED
    return ", ".join(items[:NAMED]) + (f" and {more} more" if more > 0 else "")
