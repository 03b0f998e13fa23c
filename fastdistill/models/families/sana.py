"""Sana: `SanaTransformer2DModel`.

Blocks share a time embedding and add tables of their own, so nothing follows a cut.
"""

from __future__ import annotations

from typing import Any

from fastdistill.models.families.family import Anatomy, Stack, Workload, noise, one_stream


class Sana(Anatomy):
    name = "sana"
    stacks = (Stack(attribute="transformer_blocks", config_field="num_layers", short="block", pass_through=one_stream),)
    vae_scale_factor = 32

    def example(self, network: Any, workload: Workload) -> dict[str, Any]:
        patch, batch = network.config.patch_size, workload.batch
        height, width = (patch * (side // patch) for side in (workload.height, workload.width))
        return {
            "hidden_states": noise(network, batch, network.config.in_channels, height, width),
            "encoder_hidden_states": noise(network, batch, workload.text_tokens, network.config.caption_channels),
            "timestep": noise(network, batch),
            "guidance": noise(network, batch) if network.config.guidance_embeds else None,
        }
