"""PixArt-alpha and -sigma: ``PixArtTransformer2DModel``. ``adaln_single`` is shared, tables are per block: nothing follows a cut."""

from __future__ import annotations

from fastdistill.models.family import Anatomy, Stack, one_stream


class PixArt(Anatomy):
    name = "pixart"
    stacks = (Stack(attribute="transformer_blocks", config_field="num_layers", short="block", pass_through=one_stream),)
