"""Pruning criteria. A new one is a file and a line here."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastdistill.lazy import Table

if TYPE_CHECKING:
    from fastdistill.compress.importance.criterion import Criterion

CRITERIA: Table[Criterion] = Table(
    __name__,
    {
        "output": "output_error:score",
        "trajectory": "trajectory:score",
        "greedy": "greedy:score",
        "taylor": "taylor:score",
        "bi": "block_influence:score",
        "mse": "mse:score",
        "cka": "cka:score",
        "probe": "probe:score",
        "learned": "learned:score",
        "random": "random_order:score",
    },
)
