"""Number of noised images that a repair by least squares should be fitted to."""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil
from typing import Any

from torch import nn

from fastdistill.models.blocks import blocks_of
from fastdistill.models.families.family import HasStacks

TOKENS_OF_AN_INPUT = 30
"""With fewer tokens for each input of a layer the fit follows the noise of its tokens."""


def points_needed(network: nn.Module, anatomy: HasStacks, tokens: Mapping[str, int]) -> int:
    """Noised images that give every layer that a repair may refit thirty tokens for each input.

    Layers that write to the text alone do not count: its tokens are few, and no image is made of
    them.

    Args:
        network: may be without weights.
        tokens: number of tokens of an image, by stream.
    """
    needed = [
        TOKENS_OF_AN_INPUT
        * _inputs(block.get_submodule(closing.linear))
        / sum(tokens[name] for name in closing.streams)
        for stack in anatomy.stacks
        for closing in stack.closings
        if closing.streams != ("text",)
        for block in blocks_of(network, stack)[:1]
    ]
    return ceil(max(needed, default=0))


def _inputs(linear: Any) -> int:
    return int(linear.in_features)
