"""Pruning criteria. A new one is one file, one line in ``CRITERIA`` and its name in ``compress/config.py``."""

from __future__ import annotations

from fastdistill.compress.importance import (
    block_influence,
    cka,
    greedy,
    learned,
    mse,
    output_error,
    probe,
    random_order,
    taylor,
    trajectory,
)
from fastdistill.compress.importance.criterion import Criterion

CRITERIA: dict[str, Criterion] = {
    "output": output_error.score,
    "trajectory": trajectory.score,
    "greedy": greedy.score,
    "taylor": taylor.score,
    "bi": block_influence.score,
    "mse": mse.score,
    "cka": cka.score,
    "probe": probe.score,
    "learned": learned.score,
    "random": random_order.score,
}
