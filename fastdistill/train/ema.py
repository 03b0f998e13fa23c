"""Exponential moving average of a network's parameters."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class EMA:
    """Moving average `shadow <- decay * shadow + (1 - decay) * parameter`, kept in float32.

    The decay is warmed up as `min(decay, (1 + n) / (10 + n))` after `n` updates, so that a short
    run is not dominated by its initial weights (Tensorflow's `ExponentialMovingAverage`,
    `num_updates`). Every process averages its part of a sharded network.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"ema decay must be in [0, 1), got {decay}")
        self.decay = decay
        self.updates = 0
        self.shadow: dict[str, Tensor] = {
            name: parameter.detach().float().clone()
            for name, parameter in network.named_parameters()
            if parameter.requires_grad
        }

    @torch.no_grad()
    def update(self, network: nn.Module) -> None:
        """Average the parameters of `network` in."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        parameters = dict(network.named_parameters())
        shadow = list(self.shadow.values())
        torch._foreach_lerp_(shadow, [parameters[name].detach().float() for name in self.shadow], 1 - decay)

    @torch.no_grad()
    def copy_to(self, network: nn.Module) -> None:
        """Give `network` the averaged weights."""
        parameters = dict(network.named_parameters())
        for name, value in self.shadow.items():
            parameters[name].copy_(value)

    @contextmanager
    def applied(self, network: nn.Module) -> Iterator[None]:
        """Give `network` the averaged weights inside the block, and the trained weights after it."""
        trained = {
            name: parameter.detach().clone() for name, parameter in network.named_parameters() if name in self.shadow
        }
        self.copy_to(network)
        try:
            yield
        finally:
            with torch.no_grad():
                for name, parameter in network.named_parameters():
                    if name in trained:
                        parameter.copy_(trained[name])
