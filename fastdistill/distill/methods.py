"""The methods. A new one is one file, one line here, and its options in ``distill/options.py``."""

from __future__ import annotations

from fastdistill.distill.consistency import ConsistencyDistillation
from fastdistill.distill.distillation import Distillation
from fastdistill.distill.dmd import DMD
from fastdistill.distill.dmd2 import DMD2
from fastdistill.distill.guidance import GuidanceDistillation
from fastdistill.distill.output_kd import OutputKD
from fastdistill.distill.progressive import ProgressiveDistillation
from fastdistill.distill.reflow import Reflow
from fastdistill.distill.tdm import TDM

METHODS: dict[str, type[Distillation]] = {
    "output_kd": OutputKD,
    "guidance": GuidanceDistillation,
    "dmd2": DMD2,
    "tdm": TDM,
    "consistency": ConsistencyDistillation,
    "progressive": ProgressiveDistillation,
    "reflow": Reflow,
    "dmd": DMD,
}
