"""Stable Diffusion 3 and 3.5: `SD3Transformer2DModel`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastdistill.models.families.family import Anatomy, BlockId, Stack, Workload, both_streams, noise

BLOCKS = "transformer_blocks"


class SD3(Anatomy):
    """Stable Diffusion 3, where a block depends in two ways on its place.

    The config lists the blocks with a second attention. diffusers builds the last block without the
    parts that update the text (`context_pre_only`). A block that becomes the last loses these
    parts, whose result nothing reads, and keeps the two of six text modulations that come before
    its attention. Both changes are exact.
    """

    name = "sd3"
    stacks = (Stack(attribute=BLOCKS, config_field="num_layers", short="block", pass_through=both_streams),)

    def adapt_to_cut(
        self, source: nn.Module, kept: Mapping[str, Sequence[int]], config: dict[str, Any], state: dict[str, Tensor]
    ) -> None:
        indices = kept[BLOCKS]
        dual = set(config["dual_attention_layers"])
        config["dual_attention_layers"] = tuple(new for new, old in enumerate(indices) if old in dual)
        if indices[-1] != len(source.get_submodule(BLOCKS)) - 1:  # type: ignore[arg-type]
            _read_text_only(state, f"{BLOCKS}.{len(indices) - 1}.")

    def full_size_twins(self, network: nn.Module) -> Mapping[BlockId, BlockId]:
        blocks: Any = network.get_submodule(BLOCKS)
        last = len(blocks) - 1
        for index in range(last):
            if blocks[index].use_dual_attention == blocks[last].use_dual_attention:
                return {BlockId(stack=BLOCKS, index=last): BlockId(stack=BLOCKS, index=index)}
        return {}

    def example(self, network: Any, workload: Workload) -> dict[str, Any]:
        patch, batch = network.config.patch_size, workload.batch
        height, width = (patch * (side // patch) for side in (workload.height, workload.width))
        return {
            "hidden_states": noise(network, batch, network.config.in_channels, height, width),
            "encoder_hidden_states": noise(network, batch, workload.text_tokens, network.config.joint_attention_dim),
            "pooled_projections": noise(network, batch, network.config.pooled_projection_dim),
            "timestep": noise(network, batch),
        }


def _read_text_only(state: dict[str, Tensor], prefix: str) -> None:
    for name in [name for name in state if name.startswith((f"{prefix}attn.to_add_out.", f"{prefix}ff_context."))]:
        del state[name]
    for part in ("weight", "bias"):
        name = f"{prefix}norm1_context.linear.{part}"
        # AdaLayerNormZero: shift and scale, a gate, and the same for the feed-forward;
        # AdaLayerNormContinuous: scale and shift.
        shift, scale, *_ = state[name].chunk(6)
        state[name] = torch.cat([scale, shift])
