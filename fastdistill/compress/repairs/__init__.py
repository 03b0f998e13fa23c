"""Repairs of a cut model in closed form. A new one is a file, a line here, and a case in the tests."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastdistill.lazy import Table

if TYPE_CHECKING:
    from fastdistill.compress.repairs.damage import Repair

_REPAIRS = {
    "ridge": ("ridge:repair", "the last layer before each gap is fitted to the full model"),
    "scale": ("scale:repair", "the channels of that layer are scaled and shifted"),
    "average": ("average:repair", "kept and dropped blocks are averaged"),
}
REPAIRS: Table[Repair] = Table(__name__, {name: place for name, (place, _) in _REPAIRS.items()})
MEANINGS = {name: meaning for name, (_, meaning) in _REPAIRS.items()}
"""Meaning of each repair, in words."""
