"""The table of supported families. A new family is one file and one line here."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from fastdistill.errors import UserError
from fastdistill.models.chroma import Chroma
from fastdistill.models.family import Anatomy, Family
from fastdistill.models.flux import Flux
from fastdistill.models.flux2 import Flux2
from fastdistill.models.flux3 import Flux3
from fastdistill.models.pixart import PixArt
from fastdistill.models.qwen_image import QwenImage
from fastdistill.models.sana import Sana
from fastdistill.models.sd3 import SD3
from fastdistill.models.z_image import ZImage

FAMILIES: dict[str, Callable[[], Anatomy]] = {
    "FluxTransformer2DModel": Flux,
    "Flux2Transformer2DModel": Flux2,
    "Flux3Transformer2DModel": Flux3,
    "ChromaTransformer2DModel": Chroma,
    "SD3Transformer2DModel": SD3,
    "QwenImageTransformer2DModel": QwenImage,
    "ZImageTransformer2DModel": ZImage,
    "SanaTransformer2DModel": Sana,
    "PixArtTransformer2DModel": PixArt,
}


def anatomy_of(transformer: nn.Module) -> Anatomy:
    """What cutting a diffusers transformer needs to know of it.

    Raises:
        UserError: the class is not supported.
    """
    return anatomy_named(type(transformer).__name__)


def anatomy_named(name: str) -> Anatomy:
    """The same by the name of the class.

    Raises:
        UserError: it is not supported.
    """
    if name not in FAMILIES:
        raise UserError(f"{name} is not a supported transformer; supported: {', '.join(FAMILIES)}")
    return FAMILIES[name]()


def family_of(transformer: nn.Module) -> Family:
    """The family of a diffusers transformer, if it can be sampled, scored and recovered.

    Raises:
        UserError: the class is not supported, or can only be cut.
    """
    anatomy = anatomy_of(transformer)
    if not isinstance(anatomy, Family):
        raise UserError(
            f"{type(transformer).__name__} can only be cut, from Python: fastdistill.compress.cut(transformer, drop=...). "
            "Calibration, scores and recovery know FluxTransformer2DModel"
        )
    return anatomy
