"""Training methods of few-step students. A new one is a file with its options, a line here, and a
case in the tests."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastdistill.lazy import Table

if TYPE_CHECKING:
    from fastdistill.distill.methods.distillation import Distillation

METHODS: Table[type[Distillation]] = Table(
    __name__,
    {
        "tdm": ("tdm:TDM", "the teacher's distribution at every step of the student's way"),
        "dmd2": ("dmd2:DMD2", "the teacher's distribution of data, with a critic and a GAN"),
        "dmd": ("dmd:DMD", "the same in one step, held to pairs of noise and image"),
        "progressive": ("progressive:ProgressiveDistillation", "half as many steps, again and again"),
        "consistency": ("consistency:ConsistencyDistillation", "jumps to the end of a trajectory, as LCM"),
        "reflow": ("reflow:Reflow", "straight paths between noise and the teacher's images"),
        "guidance": (
            "guidance:GuidanceDistillation",
            "not fewer steps but one call in each: guidance of any scale as an input",
        ),
        "output_kd": ("output_kd:OutputKD", "not fewer steps but one call in each: the guided teacher's output"),
    },
)
