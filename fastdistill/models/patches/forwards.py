"""Forward of a patched module, and what ties it to its module.

A patched module has two attributes of its own: `forward`, a method bound to the module, and a
`Link` to the report of its patch. The forward is fused as long as the link is there. A hook that
was put around the forward keeps calling it after undo, and then reaches the class's forward.
"""

from __future__ import annotations

import copy
import functools
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fastdistill.models.patches.contract import NOTHING_TO_GAIN, Patch

if TYPE_CHECKING:
    from fastdistill.models.patch import Patches

LINK = "_fastdistill_link"

# A function's mark is the function itself: wrappers that copy its attributes do not pass for it.
_MARK = "_fastdistill_forward"


class Link:
    """Tie of a patched module to the report of its patch.

    A deep copy of the module has a link of its own, to a report of its own. A pickle holds the
    plain model: it loads where fastdistill is not installed.
    """

    def __init__(self, module: nn.Module, patches: Patches) -> None:
        self.module = module
        self.patches = patches
        patches.take(module)

    def __deepcopy__(self, memo: dict[int, Any]) -> Link:
        return Link(copy.deepcopy(self.module, memo), copy.deepcopy(self.patches, memo))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()


def link_of(module: nn.Module) -> Link | None:
    """Link of a module that is patched now, else None."""
    link: Link | None = module.__dict__.get(LINK) if "forward" in module.__dict__ else None
    return link


def put(module: nn.Module, patch: Patch, patches: Patches) -> None:
    """Patch a module that is not patched now."""
    # A hook may hold the forward of an earlier patch, which the link puts to work again.
    if not _reaches_patch(module):
        cls: Any = type(module)
        module.forward = MethodType(_forward(cls, patch), module)
    setattr(module, LINK, Link(module, patches))


def take_off(module: nn.Module) -> None:
    """Undo the patch of a module, if there is one; a hook around it stays."""
    module.__dict__.pop(LINK, None)
    if _is_patch(module.__dict__.get("forward")):
        del module.forward


def keeps_own_forward(module: nn.Module) -> bool:
    """Whether a hook, or its owner, gave this module a forward that no patch can replace."""
    return wrapped(module) and not _reaches_patch(module)


def wrapped(module: nn.Module) -> bool:
    """Whether this module's forward is neither its class's nor a patch."""
    forward = module.__dict__.get("forward")
    # Hooks of diffusers and accelerate leave the class's forward behind, as an attribute.
    return (
        forward is not None
        and not _is_patch(forward)
        and getattr(forward, "__func__", None) is not type(module).forward
    )


def _is_patch(forward: Any) -> bool:
    function = getattr(forward, "__func__", None)
    return function is not None and getattr(function, _MARK, None) is function


def _reaches_patch(module: nn.Module) -> bool:
    """Whether the module's forward is a patch's, or is a hook around one.

    `functools.update_wrapper`, which hooks use, names the function within.
    """
    forward = module.__dict__.get("forward")
    while forward is not None and not _is_patch(forward):
        forward = getattr(forward, "__wrapped__", None)
    return forward is not None


@functools.cache
def _forward(cls: Any, patch: Patch) -> Any:
    """Fused forward of a class of modules, one for the whole process."""
    stock, why_not, fused = cls.forward, patch.why_not, patch.forward

    def forward(module: nn.Module, /, *arguments: Any, **keywords: Any) -> Any:
        link: Link | None = getattr(module, LINK, None)
        if link is not None:
            reason = why_not(module, *arguments, **keywords)
            if reason is None:
                return fused(module, link.patches.fusions, *arguments, **keywords)
            if reason != NOTHING_TO_GAIN and not torch.compiler.is_compiling():
                link.patches.record(module, reason)
        return stock(module, *arguments, **keywords)

    # torch.compile counts recompilations by code object: each class has its own, as in diffusers.
    forward.__code__ = forward.__code__.replace(co_name=f"fused_{cls.__name__}")
    functools.update_wrapper(forward, stock)
    setattr(forward, _MARK, forward)
    return forward
