"""Pruning criteria. A new one is a file and a line here."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastdistill.lazy import Table

if TYPE_CHECKING:
    from fastdistill.compress.importance.criterion import Criterion

CRITERIA: Table[Criterion] = Table(
    __name__,
    {
        "output": ("output_error:score", "error of the output without the block"),
        "trajectory": ("trajectory:score", "error of the end of a short sampling run without the block"),
        "greedy": ("greedy:score", "error of the output without the block, measured again after each drop"),
        "taylor": ("taylor:score", "error of the output without the block, to first order"),
        "bi": ("block_influence:score", "how much the block turns the image stream"),
        "mse": ("mse:score", "how much the block adds to the streams"),
        "cka": ("cka:score", "how unlike the image stream becomes in the block"),
        "probe": ("probe:score", "how badly a linear map stands for the block"),
        "learned": (
            "learned:score",
            "masks learned together with a small update of the weights, for how well the rest can recover; "
            "--verify 1 cuts just these",
        ),
        "random": ("random_order:score", "chance"),
    },
)

DEPEND_ON_DROPS = ("greedy", "learned")
"""Criteria whose scores depend on how many blocks are going to be dropped; scores of the others
serve every number."""
