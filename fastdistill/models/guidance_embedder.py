"""Embedded guidance: the scale of guidance as an input of the network.

Guidance-distilled models have it (Meng et al. 2023; FLUX.1-dev).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn

from fastdistill.errors import UserError


def embeds_guidance(network: nn.Module) -> bool:
    """Whether `network` takes a guidance scale, by the config field of diffusers' transformers."""
    return bool(getattr(getattr(network, "config", None), "guidance_embeds", False))


def with_scale(conditioning: Any, network: nn.Module, scale: Tensor) -> Any:
    """Conditioning for `network`, with `scale` (B,) as `guidance` if the network embeds guidance."""
    if embeds_guidance(network):
        return dataclasses.replace(conditioning, guidance=scale)
    if getattr(conditioning, "guidance", None) is not None:
        return dataclasses.replace(conditioning, guidance=None)
    return conditioning


def with_guidance_embedder(transformer: Any) -> Any:
    """Copy `transformer` into a stock class with `guidance_embeds=True` and equal outputs.

    The last layer of the new embedder is zero, so that no scale changes anything until the layer is
    trained: the linear layer initialised to zero of Meng et al. (2023, section 3.1). The first
    layer is a copy of the time embedder's, which reads the same sinusoidal features.

    Raises:
        UserError: the transformer embeds guidance already, or its class cannot.
    """
    if embeds_guidance(transformer):
        raise UserError("this transformer embeds guidance already; train it as it is")
    if "guidance_embeds" not in transformer.config or not hasattr(transformer, "time_text_embed"):
        raise UserError(
            f"{type(transformer).__name__} has no variant that embeds guidance; give a FluxTransformer2DModel"
        )
    # Built without memory, and filled below: at FLUX.1's size random weights of a second model
    # would be 24 GB for nothing.
    with init_empty_weights():
        sibling = type(transformer).from_config({**transformer.config, "guidance_embeds": True})
    state = dict(transformer.state_dict())
    for name in ("linear_1.weight", "linear_1.bias", "linear_2.weight", "linear_2.bias"):
        time = state[f"time_text_embed.timestep_embedder.{name}"]
        state[f"time_text_embed.guidance_embedder.{name}"] = (
            time if name.startswith("linear_1") else torch.zeros_like(time)
        )
    # Cloned, as the owner of the source may go on to train it.
    sibling.load_state_dict({name: tensor.clone() for name, tensor in state.items()}, assign=True)
    return sibling.train(transformer.training)
