"""The table of supported families. A new family is one file and one line here."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from fastdistill.errors import UserError
from fastdistill.models.family import Family
from fastdistill.models.flux import Flux

FAMILIES: dict[str, Callable[[], Family]] = {"FluxTransformer2DModel": Flux}


def family_of(transformer: nn.Module) -> Family:
    """The family of a diffusers transformer.

    Raises:
        UserError: the class is not supported.
    """
    name = type(transformer).__name__
    if name not in FAMILIES:
        raise UserError(f"{name} is not a supported transformer; supported: {', '.join(FAMILIES)}")
    return FAMILIES[name]()
