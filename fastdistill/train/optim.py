"""Optimizers: AdamW, fused, with moments in float32 or in 8 bits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from fastdistill.errors import UserError
from fastdistill.train import parallel
from fastdistill.train.config import RoleConfig


def build(parameters: Sequence[nn.Parameter], config: RoleConfig) -> torch.optim.Optimizer:
    """Build the optimizer of a role; the trainer sets its learning rate in every step.

    Raises:
        UserError: `adamw8bit` without bitsandbytes, or under torchrun.
    """
    if config.optimizer == "adamw":
        return torch.optim.AdamW(
            parameters, lr=config.learning_rate, betas=config.betas, weight_decay=config.weight_decay, fused=True
        )
    if parallel.world_size() > 1:
        # Its blocks of 256 numbers with a common scale would be cut where a process's share ends,
        # and differently by other layouts.
        raise UserError(
            "optimizer adamw8bit runs in a single process; under torchrun the moments of adamw are shared out instead"
        )
    try:
        from bitsandbytes.optim.adamw import AdamW8bit
    except ImportError as error:
        raise UserError(f"optimizer adamw8bit needs bitsandbytes ({error}): pip install bitsandbytes") from error
    eight_bit: torch.optim.Optimizer = AdamW8bit(
        parameters, lr=config.learning_rate, betas=config.betas, weight_decay=config.weight_decay
    )
    return eight_bit
