"""Few-step distillation: ``METHODS``, each called as ``METHODS[name](options, student=..., teacher=..., family=..., steps=...)``."""

from typing import TYPE_CHECKING

from fastdistill.lazy import lazily

if TYPE_CHECKING:
    from fastdistill.distill.methods import METHODS as METHODS
    from fastdistill.distill.options import OPTIONS as OPTIONS

_LAZY = {"METHODS": "fastdistill.distill.methods", "OPTIONS": "fastdistill.distill.options"}

__all__ = [*_LAZY]
__getattr__, __dir__ = lazily(__name__, _LAZY)
