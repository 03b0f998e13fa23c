"""Fused blocks of model families by class of transformer. A new one is a file and a line here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from fastdistill.lazy import Table

if TYPE_CHECKING:
    from fastdistill.models.patches.contract import Patch

# For each class of transformer, the patch of each class of its modules.
PATCHES: Table[Mapping[str, Patch]] = Table(
    __name__,
    {
        "FluxTransformer2DModel": "flux:PATCHES",
        "Flux2Transformer2DModel": "flux2:PATCHES",
        "SD3Transformer2DModel": "sd3:PATCHES",
        "QwenImageTransformer2DModel": "qwen_image:PATCHES",
        "ZImageTransformer2DModel": "z_image:PATCHES",
    },
)
