"""Few-step distillation: ``METHODS``, each called as ``METHODS[name](options, student=..., teacher=..., family=..., steps=...)``."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastdistill.distill.methods import METHODS as METHODS
    from fastdistill.distill.options import OPTIONS as OPTIONS

# `python -m fastdistill.distill --help` comes through here and must answer at once, so torch loads on first use.
_LAZY = {"METHODS": "fastdistill.distill.methods", "OPTIONS": "fastdistill.distill.options"}

__all__ = [*_LAZY]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_LAZY[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])
