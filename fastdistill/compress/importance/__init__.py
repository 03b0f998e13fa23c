"""Pruning criteria. A new one is one file and one line in ``CRITERIA``."""

from __future__ import annotations

from fastdistill.compress.importance import block_influence, output_error
from fastdistill.compress.importance.criterion import Criterion

CRITERIA: dict[str, Criterion] = {"output": output_error.score, "bi": block_influence.score}
