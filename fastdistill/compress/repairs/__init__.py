"""Repairs of a cut model in closed form. A new one is a file and a line here."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastdistill.lazy import Table

if TYPE_CHECKING:
    from fastdistill.compress.repairs.damage import Repair

REPAIRS: Table[Repair] = Table(
    __name__,
    {
        "ridge": ("ridge:repair", "the last layer before each gap is fitted to the full model"),
        "scale": ("scale:repair", "the channels of that layer are scaled and shifted"),
        "average": ("average:repair", "kept and dropped blocks are averaged"),
    },
)
