"""Model families by the class of their transformer. A new one is a file and a line here."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastdistill.errors import UserError
from fastdistill.lazy import Table

if TYPE_CHECKING:
    from torch import nn

    from fastdistill.models.families.family import Anatomy, Family

FAMILIES: Table[type[Anatomy]] = Table(
    __name__,
    {
        "FluxTransformer2DModel": "flux:Flux",
        "Flux2Transformer2DModel": "flux2:Flux2",
        "Flux3Transformer2DModel": "flux3:Flux3",
        "ChromaTransformer2DModel": "chroma:Chroma",
        "SD3Transformer2DModel": "sd3:SD3",
        "QwenImageTransformer2DModel": "qwen_image:QwenImage",
        "ZImageTransformer2DModel": "z_image:ZImage",
        "SanaTransformer2DModel": "sana:Sana",
        "PixArtTransformer2DModel": "pixart:PixArt",
    },
)


def anatomy_of(transformer: nn.Module) -> Anatomy:
    """Anatomy of a diffusers transformer, which cutting needs.

    Raises:
        UserError: the class is not supported, or wraps one that is.
    """
    names = [class_.__name__ for class_ in type(transformer).__mro__]
    supported = next((name for name in names if name in FAMILIES), None)
    if supported is None:
        for place, inside in transformer.named_modules():
            if type(inside).__name__ in FAMILIES:
                raise UserError(
                    f"this {names[0]} is a wrapper; give the {type(inside).__name__} inside it, its attribute {place}"
                )
    return anatomy_named(supported or names[0])


def anatomy_named(name: str) -> Anatomy:
    """Anatomy of the transformers of class `name`.

    Raises:
        UserError: the class is not supported.
    """
    if name not in FAMILIES:
        raise UserError(f"{name} is not a supported transformer; supported: {', '.join(FAMILIES)}")
    return FAMILIES[name]()


def family_of(transformer: nn.Module) -> Family:
    """Family of a diffusers transformer that can be sampled, scored and recovered.

    Raises:
        UserError: the class is not supported, or can only be cut.
    """
    from fastdistill.models.families.family import Family

    anatomy = anatomy_of(transformer)
    if not isinstance(anatomy, Family):
        raise UserError(
            f"{type(transformer).__name__} can only be cut, from Python: "
            "fastdistill.compress.cut(transformer, drop=...). Calibration, "
            "scores and recovery know FluxTransformer2DModel"
        )
    return anatomy
