"""Training methods of few-step students. A new one is a file with its options, a line here, and a case in the tests."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastdistill.lazy import Table

if TYPE_CHECKING:
    from fastdistill.distill.methods.distillation import Distillation

METHODS: Table[type[Distillation]] = Table(
    __name__,
    {
        "output_kd": "output_kd:OutputKD",
        "guidance": "guidance:GuidanceDistillation",
        "dmd2": "dmd2:DMD2",
        "tdm": "tdm:TDM",
        "consistency": "consistency:ConsistencyDistillation",
        "progressive": "progressive:ProgressiveDistillation",
        "reflow": "reflow:Reflow",
        "dmd": "dmd:DMD",
    },
)
