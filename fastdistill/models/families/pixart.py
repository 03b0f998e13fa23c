"""PixArt-alpha and -sigma: `PixArtTransformer2DModel`.

`adaln_single` is shared, tables are per block: nothing follows a cut.
"""

from __future__ import annotations

from typing import Any

from fastdistill.models.families.family import Anatomy, Stack, Workload, noise, one_stream


class PixArt(Anatomy):
    name = "pixart"
    stacks = (Stack(attribute="transformer_blocks", config_field="num_layers", short="block", pass_through=one_stream),)

    def example(self, network: Any, workload: Workload) -> dict[str, Any]:
        patch, batch = network.config.patch_size, workload.batch
        height, width = (patch * (side // patch) for side in (workload.height, workload.width))
        return {
            "hidden_states": noise(network, batch, network.config.in_channels, height, width),
            "encoder_hidden_states": noise(network, batch, workload.text_tokens, network.config.caption_channels),
            "timestep": noise(network, batch),
            # Read by the models for 1024 pixels only.
            "added_cond_kwargs": {"resolution": noise(network, batch, 2), "aspect_ratio": noise(network, batch, 1)},
        }
