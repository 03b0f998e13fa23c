"""Repairs of a cut model without training. A new one is one file, one line in ``REPAIRS`` and its name in ``compress/config.py``."""

from __future__ import annotations

from fastdistill.compress.repairs import average, ridge, scale
from fastdistill.compress.repairs.damage import Repair

REPAIRS: dict[str, Repair] = {
    "ridge": ridge.repair,
    "scale": scale.repair,
    "average": average.repair,
}
