"""Qwen-Image: ``QwenImageTransformer2DModel``. Every block has its own modulation, so nothing follows a cut."""

from __future__ import annotations

from fastdistill.models.family import Anatomy, Stack, both_streams


class QwenImage(Anatomy):
    name = "qwen_image"
    stacks = (Stack(attribute="transformer_blocks", config_field="num_layers", short="block", pass_through=both_streams),)
