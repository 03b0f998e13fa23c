"""Fused forms of diffusers' modules by class of block. A new family is a file and its lines here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from fastdistill.lazy import Table

if TYPE_CHECKING:
    from torch import nn

    from fastdistill.models.patches.contract import Patch

# For each class of block, the patch of its class and of each class of modules in it: whatever model
# of diffusers is made of these blocks runs fused.
PATCHES: Table[Mapping[str, Patch]] = Table(
    __name__,
    {
        "FluxTransformerBlock": "flux:PATCHES",
        "FluxSingleTransformerBlock": "flux:PATCHES",
        "Flux2TransformerBlock": "flux2:PATCHES",
        "Flux2SingleTransformerBlock": "flux2:PATCHES",
        "JointTransformerBlock": "sd3:PATCHES",
        "SD3SingleTransformerBlock": "sd3:PATCHES",
        "QwenImageTransformerBlock": "qwen_image:PATCHES",
        "ZImageTransformerBlock": "z_image:PATCHES",
        "ZImageControlTransformerBlock": "z_image:PATCHES",
    },
)


def fused_forms(network: nn.Module) -> Iterator[tuple[nn.Module, Patch | None]]:
    """Yield the modules of a network that have a fused form, each with its patch.

    None in place of the patch of a module whose class overrides what the patch stands for.
    """
    blocks = [(module, cls) for module in network.modules() if (cls := _diffusers_class(module, PATCHES))]
    if not blocks:
        return
    from fastdistill.models.patches import adaln

    # A block's family says what its parts are: three families have attention of one class.
    tables = [(block, PATCHES[cls.__name__]) for block, cls in blocks]
    seen: set[nn.Module] = set()
    for root, table in (*tables, (network, adaln.AROUND_BLOCKS)):
        for module in root.modules():
            if module in seen:
                continue
            cls = _diffusers_class(module, table)
            if cls is not None:
                seen.add(module)
                yield module, table[cls.__name__] if _behaves_as(module, cls) else None


def _diffusers_class(module: nn.Module, table: Mapping[str, object]) -> type | None:
    """Class of diffusers that `table` names and the module is of, or is derived from."""
    # torch has a GELU as well.
    known = (cls for cls in type(module).__mro__ if cls.__module__.startswith("diffusers.") and cls.__name__ in table)
    return next(known, None)


def _behaves_as(module: nn.Module, cls: type) -> bool:
    """Whether no derived class, such as those that sharding makes, overrides a method of `cls`."""
    return all(
        getattr(type(module), name) is value
        for name, value in vars(cls).items()
        if callable(value) and not name.startswith("__")
    )
