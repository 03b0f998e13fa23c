"""Images of the students of one seed from the same noise, next to their teacher's."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from fastdistill.models.loading import load
from fastdistill.models.sampling import SamplingDefaults, sample
from fastdistill.run.grid import grid

PROMPTS = ("grinning face", "dog face", "rose", "french fries", "taco", "violin", "panda", "rocket")
SEED = 12


def figure(students: Mapping[str, Path], steps: int) -> Image.Image:
    """A row each for the teacher, the teacher in `steps` steps, and `students`, folders by label,
    which were trained for them."""
    teacher = load("emoji", "cpu")
    briefly = dataclasses.replace(teacher.sampling, num_inference_steps=steps)
    rows = {f"teacher, {teacher.sampling.num_inference_steps}": _row(teacher.pipeline, teacher.sampling)}
    rows[f"teacher, {steps}"] = _row(teacher.pipeline, briefly)
    for label, folder in students.items():
        loaded = load(str(folder), "cpu")
        rows[label] = _row(loaded.pipeline, loaded.sampling)
    return grid(torch.stack(list(rows.values())), list(rows), PROMPTS, cell=96)


def _row(pipeline: Any, sampling: SamplingDefaults) -> Tensor:
    return sample(pipeline, PROMPTS, sampling, seeds=[SEED + i for i in range(len(PROMPTS))], batch=len(PROMPTS))
