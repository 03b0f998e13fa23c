"""Qwen-Image: `QwenImageTransformer2DModel`.

Every block has its own modulation, so nothing follows a cut.
"""

from __future__ import annotations

from typing import Any

import torch

from fastdistill.models.families.family import Anatomy, Stack, Workload, both_streams, noise

PATCH = 2


class QwenImage(Anatomy):
    name = "qwen_image"
    stacks = (
        Stack(attribute="transformer_blocks", config_field="num_layers", short="block", pass_through=both_streams),
    )

    def example(self, network: Any, workload: Workload) -> dict[str, Any]:
        rows, columns, batch = workload.height // PATCH, workload.width // PATCH, workload.batch
        condition = (
            torch.zeros(batch, dtype=torch.long, device=network.device)
            if network.config.use_additional_t_cond
            else None
        )
        return {
            "hidden_states": noise(network, batch, rows * columns, network.config.in_channels),
            "encoder_hidden_states": noise(network, batch, workload.text_tokens, network.config.joint_attention_dim),
            "timestep": noise(network, batch),
            "img_shapes": [[(1, rows, columns)]] * batch,
            "additional_t_cond": condition,
        }
