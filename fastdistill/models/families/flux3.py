"""FLUX.3: `Flux3Transformer2DModel`, with lists of blocks before the joint blocks.

Text, image and reference tokens have a list each. One `num_layers` counts the three lists: a cut
takes equally many blocks from each. The blocks need not have the same indices, as no block of one
list knows of the other lists. Modulations are shared by all blocks of a list and stay as they are.
"""

from __future__ import annotations

from typing import Any

from fastdistill.models.families.family import Anatomy, Stack, Workload, both_streams, noise, one_stream
from fastdistill.models.families.flux2 import PATCH, image_ids, text_ids


class Flux3(Anatomy):
    name = "flux3"
    stacks = (
        Stack(attribute="txt_mode_blocks", config_field="num_layers", short="text", pass_through=one_stream),
        Stack(attribute="mode_blocks.image", config_field="num_layers", short="image", pass_through=one_stream),
        Stack(
            attribute="mode_blocks.image_cond", config_field="num_layers", short="reference", pass_through=one_stream
        ),
        Stack(
            attribute="single_transformer_blocks",
            config_field="num_single_layers",
            short="single",
            pass_through=both_streams,
        ),
    )

    def example(self, network: Any, workload: Workload) -> dict[str, Any]:
        """Arguments without reference images, whose blocks then have nothing to do."""
        rows, columns, batch = workload.height // PATCH, workload.width // PATCH, workload.batch
        return {
            "hidden_states": noise(network, batch, rows * columns, network.config.in_channels),
            "encoder_hidden_states": noise(network, batch, workload.text_tokens, network.config.joint_attention_dim),
            "timestep": noise(network, batch),
            "img_ids": image_ids(rows, columns, network.device),
            "txt_ids": text_ids(workload.text_tokens, network.device),
            "target_timestep": noise(network, batch) if network.config.flow_map else None,
        }
