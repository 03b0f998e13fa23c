"""Sana: ``SanaTransformer2DModel``. Blocks share a time embedding and add tables of their own, so nothing follows a cut."""

from __future__ import annotations

from fastdistill.models.family import Anatomy, Stack, one_stream


class Sana(Anatomy):
    name = "sana"
    stacks = (Stack(attribute="transformer_blocks", config_field="num_layers", short="block", pass_through=one_stream),)
