"""Chance: what every other criterion has to beat."""

from __future__ import annotations

import torch
from torch import nn

from fastdistill.compress.importance.criterion import Material
from fastdistill.compress.importance.ledger import Ledger
from fastdistill.models.blocks import block_ids
from fastdistill.models.families.family import BlockId, Family


def score(network: nn.Module, family: Family, material: Material, ledger: Ledger) -> dict[BlockId, float]:
    """Uniform in [0, 1), by the seed alone. Costs nothing."""
    blocks = block_ids(network, family)
    numbers = torch.rand(len(blocks), generator=torch.Generator().manual_seed(material.seed), dtype=torch.float64)
    return dict(zip(blocks, numbers.tolist(), strict=True))
