"""Few-step distillation: training methods, and `python -m fastdistill.distill` from end to end.

A method of `METHODS` is called as `METHODS[name](options, student=..., teacher=..., family=...,
steps=...)`. `FewStepStudent(config_for("tdm")(steps=4)).run()` is what the command runs.
"""

from typing import TYPE_CHECKING

from fastdistill.distill.methods import METHODS as METHODS
from fastdistill.lazy import lazily

if TYPE_CHECKING:
    from fastdistill.distill.config import DistillConfig as DistillConfig
    from fastdistill.distill.config import config_for as config_for
    from fastdistill.distill.job import FewStepStudent as FewStepStudent

_LAZY = {
    "DistillConfig": "fastdistill.distill.config",
    "FewStepStudent": "fastdistill.distill.job",
    "config_for": "fastdistill.distill.config",
}

__all__ = ["METHODS", *_LAZY]
__getattr__, __dir__ = lazily(__name__, _LAZY)
