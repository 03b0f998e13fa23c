"""How the blocks of each family run on fused operators: `PATCHES` says which module of which transformer gets which forward."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from fastdistill.models.patches import flux, flux2, qwen_image, sd3, z_image
from fastdistill.models.patches.fusions import Forward, Fusions

# By the names of classes, so that diffusers imports only the families that are used.
PATCHES: dict[str, Mapping[str, Callable[[Any, Fusions], Forward]]] = {
    "FluxTransformer2DModel": flux.PATCHES,
    "Flux2Transformer2DModel": flux2.PATCHES,
    "SD3Transformer2DModel": sd3.PATCHES,
    "QwenImageTransformer2DModel": qwen_image.PATCHES,
    "ZImageTransformer2DModel": z_image.PATCHES,
}
