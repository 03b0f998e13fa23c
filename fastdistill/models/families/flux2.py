"""FLUX.2, dev and klein: `Flux2Transformer2DModel`.

Its modulations are shared by all blocks of a kind and stay as they are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastdistill.models.families.family import Anatomy, Stack, Workload, both_streams, noise


def joint_stream(
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None = None,
    temb_mod: Any = None,
    image_rotary_emb: Any = None,
    joint_attention_kwargs: Any = None,
    split_hidden_states: bool = False,
    text_seq_len: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Pass through `Flux2SingleTransformerBlock`.

    The block concatenates a text that it is given, and splits the streams on request.
    """
    if encoder_hidden_states is not None:
        text_seq_len = encoder_hidden_states.shape[1]
        hidden_states = torch.cat([encoder_hidden_states, hidden_states], dim=1)
    return (hidden_states[:, :text_seq_len], hidden_states[:, text_seq_len:]) if split_hidden_states else hidden_states


PATCH = 2


def image_ids(rows: int, columns: int, device: torch.device) -> Tensor:
    """Position ids (rows * columns, 4) of the image tokens: 0, row, column, 0."""
    return torch.cartesian_prod(*map(torch.arange, (1, rows, columns, 1))).to(device)


def text_ids(tokens: int, device: torch.device) -> Tensor:
    """Position ids (tokens, 4) of the text tokens: 0, 0, 0, place."""
    return torch.cartesian_prod(*map(torch.arange, (1, 1, 1, tokens))).to(device)


class Flux2(Anatomy):
    name = "flux2"
    stacks = (
        Stack(attribute="transformer_blocks", config_field="num_layers", short="double", pass_through=both_streams),
        Stack(
            attribute="single_transformer_blocks",
            config_field="num_single_layers",
            short="single",
            pass_through=joint_stream,
        ),
    )

    def example(self, network: Any, workload: Workload) -> dict[str, Any]:
        rows, columns, batch = workload.height // PATCH, workload.width // PATCH, workload.batch
        return {
            "hidden_states": noise(network, batch, rows * columns, network.config.in_channels),
            "encoder_hidden_states": noise(network, batch, workload.text_tokens, network.config.joint_attention_dim),
            "timestep": noise(network, batch),
            "img_ids": image_ids(rows, columns, network.device),
            "txt_ids": text_ids(workload.text_tokens, network.device),
            "guidance": noise(network, batch) if network.config.guidance_embeds else None,
        }
