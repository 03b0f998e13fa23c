"""One after the other: the block whose loss hurts least goes, and the others are measured again
without it.

Errors of single blocks do not add up (EvoPress, Sieberling et al. 2025): of two blocks that do the
same, each alone is of no use, and both together are vital. Measuring again sees that.
"""

from __future__ import annotations

import math

from torch import nn

from fastdistill.compress.importance.criterion import Material
from fastdistill.compress.importance.ledger import Ledger
from fastdistill.compress.importance.output_error import OutputError
from fastdistill.models.blocks import block_ids
from fastdistill.models.families.family import BlockId, Family
from fastdistill.models.hooks import skipped


def score(network: nn.Module, family: Family, material: Material, ledger: Ledger) -> dict[BlockId, float]:
    """The joint relative output error at the moment a block goes; of those that stay to the end,
    that of going next.

    Raised where it would not be above that of the block before, so that the order of the scores is
    that of the drops. Looks as far as `material.drops`, or to the last but one. k drops of n blocks
    cost about k passes of `output`.
    """
    blocks = block_ids(network, family)
    rounds = min(material.drops or len(blocks), len(blocks) - 1)
    chunks = -(-len(material.points) // material.batch)
    ledger.expect(chunks * sum(len(blocks) - done for done in range(rounds)))
    error = OutputError(network, family, material.points, material.batch)
    scores: dict[BlockId, float] = {}
    floor = -math.inf
    for number in range(rounds):
        left = [block_id for block_id in blocks if block_id not in scores]
        with skipped(network, family, scores):
            errors = error.without_each(left, ledger, prefix=f"{number} ")
        order = sorted(left, key=lambda block_id: (errors[block_id], -blocks.index(block_id)))
        # In the last round nothing is measured again: the others follow in the order they have now.
        for block_id in order if number == rounds - 1 else order[:1]:
            floor = max(errors[block_id], math.nextafter(floor, math.inf))
            scores[block_id] = floor
    return {block_id: scores[block_id] for block_id in blocks}
