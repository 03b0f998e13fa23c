"""The pictures of a run's models, all from the same prompts and noise: measured, kept, and shown side by side."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from math import ceil
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastdistill.evaluation.suite import evaluate
from fastdistill.grid import grid
from fastdistill.models.patch import is_patched, patched
from fastdistill.models.sampling import SamplingDefaults
from fastdistill.progress import bar

GRID_COLUMNS = 10


class Gallery:
    """Of each model a file in ``folder``; the one that is called ``reference`` is what the others are compared with."""

    def __init__(
        self,
        folder: Path,
        prompts: Sequence[str],
        sampling: SamplingDefaults,
        *,
        reference: str,
        pictures: int,
        seed: int,
        batch: int,
        console: Console,
    ) -> None:
        """``pictures`` of each model, spread over the prompts and then over seeds; with 0 only a grid is drawn and nothing is measured."""
        count = max(pictures, GRID_COLUMNS)
        self.prompts = [prompts[i * len(prompts) // min(count, len(prompts))] for i in range(min(count, len(prompts)))]
        self.seeds = [seed + k for k in range(ceil(count / len(self.prompts)) if pictures else 1)]
        self.measure = pictures > 0
        self.folder, self.sampling, self.batch, self.console = folder, sampling, batch, console
        self.reference = reference

    def evaluate(self, pipeline: Any, name: str, sampling: SamplingDefaults | None = None) -> dict[str, Any]:
        """The measurements of ``pipeline``, a JSON object; sampled as the gallery says, unless ``sampling`` says otherwise."""
        reference = None if name == self.reference else self._pictures(self.reference)
        pictures = len(self.prompts) * len(self.seeds)
        transformer = pipeline.transformer
        # One that is in training may be patched already.
        with nullcontext() if is_patched(transformer) else patched(transformer), bar(self.console, f"evaluate {name}", pictures) as tick:
            result = evaluate(
                pipeline, self.prompts, sampling or self.sampling, seeds=self.seeds, batch=self.batch, reference=reference, tick=tick
            )
        save_file({"pictures": result.pictures.half()}, self._file(name))
        return result.metrics if self.measure else {}

    def grid(self, names: Sequence[str]) -> Image.Image:
        """A row of pictures for each of ``names``, which have been evaluated."""
        columns = [i * len(self.prompts) // GRID_COLUMNS for i in range(min(GRID_COLUMNS, len(self.prompts)))]
        pictures = torch.stack([self._pictures(name)[columns] for name in names])
        return grid(pictures, names, [self.prompts[i] for i in columns])

    def _pictures(self, name: str) -> Tensor:
        return load_file(self._file(name))["pictures"].float()

    def _file(self, name: str) -> Path:
        return self.folder / f"pictures-{name.replace(', ', '-').replace(' ', '-')}.safetensors"
