"""Images of a run's models from the same prompts and noise: measured, kept, shown side by side."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from math import ceil
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastdistill.evaluation.suite import SEED_STRIDE, ImageSet, evaluate
from fastdistill.models.digest import digest_of
from fastdistill.models.patch import is_patched, patched
from fastdistill.models.sampling import SamplingDefaults, sample
from fastdistill.run.files import atomic_write, digest, read_json, write_json
from fastdistill.run.grid import grid
from fastdistill.run.progress import bar

GRID_COLUMNS = 10
FIRST = 4
"""Images that are drawn at once until there is a first grid."""


class Gallery:
    """Images of several models, each in a file of `folder`; all are compared with one reference.

    Args:
        reference: name of the model that the others are compared with.
        count: number of images of each model, spread over the prompts and then over seeds. With 0
            only a grid is drawn, and nothing is measured.
        shared: folder for the images and measurements of the reference, in any number of steps.
            Galleries that measure the same share it. By default it is `folder`.
    """

    def __init__(
        self,
        folder: Path,
        prompts: Sequence[str],
        sampling: SamplingDefaults,
        *,
        reference: str,
        count: int,
        seed: int,
        batch: int,
        console: Console,
        shared: Path | None = None,
    ) -> None:
        shown = max(count, GRID_COLUMNS)
        self.prompts = [prompts[i * len(prompts) // min(shown, len(prompts))] for i in range(min(shown, len(prompts)))]
        self.seeds = [seed + k for k in range(ceil(shown / len(self.prompts)) if count else 1)]
        self.measure = count > 0
        self.folder, self.sampling, self.batch, self.console = folder, sampling, batch, console
        self.reference, self.shared = reference, folder if shared is None else shared

    def __len__(self) -> int:
        """Number of images of each model."""
        return len(self.prompts) * len(self.seeds)

    def evaluate(
        self, pipeline: Any, name: str, sampling: SamplingDefaults | None = None, *, continues: bool = False
    ) -> dict[str, Any]:
        """Measure `pipeline`; return a JSON object.

        It is sampled by the gallery's defaults, unless `sampling` is given.

        Args:
            continues: keep every batch of images, so that a measurement that is stopped continues
                with the same weights.
        """
        measured = self._file(name).with_suffix(".json")
        if self._is_reference(name) and measured.exists():
            return dict(read_json(measured))
        reference = self._images(self.reference) if self.measure and name != self.reference else None
        image_set = ImageSet(
            prompts=self.prompts, seeds=self.seeds, sampling=sampling or self.sampling, batch=self.batch
        )
        transformer = pipeline.transformer
        kept = self._drawn(name, pipeline, image_set) if continues else None
        # A transformer in training may be patched already.
        patching = nullcontext() if is_patched(transformer) else patched(transformer)
        with patching, bar(self.console, f"evaluate {name}", len(image_set)) as tick:
            if self._is_reference(name) and not self.measure and self._first(name).exists():
                images, metrics = load_file(self._first(name))["images"], {}
            elif self.measure:
                result = evaluate(pipeline, image_set, reference=reference, tick=tick, kept=kept)
                images, metrics = result.images, result.metrics
            else:
                images, metrics = image_set.draw_timed(pipeline, tick, kept)[0], {}
        self._file(name).parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(self._file(name)) as partial:
            save_file({"images": images.half()}, partial)
        for done in self.folder.glob(f"{self._file(name).stem}.drawn-*"):
            shutil.rmtree(done)
        if self._is_reference(name):
            write_json(measured, metrics)
        return metrics

    def draw_first(self, pipeline: Any, name: str, shown: Callable[[], None]) -> None:
        """Draw the images of the grid of the reference `name`, a few at once, before it is
        measured.

        Args:
            shown: called after each few, when `grid` has them.
        """
        path, part = self._first(name), min(FIRST, self.batch)
        path.parent.mkdir(parents=True, exist_ok=True)
        drawn = load_file(path)["images"] if path.exists() else torch.empty(0)
        transformer = pipeline.transformer
        patching = nullcontext() if is_patched(transformer) else patched(transformer)
        with patching, bar(self.console, f"draw {name}", len(self.columns)) as tick:
            tick(len(drawn))
            for start in range(len(drawn), len(self.columns), part):
                columns = self.columns[start : start + part]
                images = sample(
                    pipeline,
                    [self.prompts[i] for i in columns],
                    self.sampling,
                    seeds=[self.seeds[0] * SEED_STRIDE + i for i in columns],
                    batch=part,
                    tick=tick,
                )
                drawn = torch.cat([drawn.to(images), images]) if len(drawn) else images
                with atomic_write(path) as partial:
                    save_file({"images": drawn.half()}, partial)
                shown()
        shown()

    @property
    def columns(self) -> list[int]:
        """Prompts of the grid, by their place in `prompts`."""
        count = min(GRID_COLUMNS, len(self.prompts))
        return [i * len(self.prompts) // count for i in range(count)]

    @property
    def shown(self) -> list[str]:
        """Prompts of the grid."""
        return [self.prompts[i] for i in self.columns]

    def grid(self, names: Sequence[str]) -> Image.Image:
        """Draw a row of images for each of `names`, which have been evaluated, or of the first ones
        of `draw_first`."""
        rows = [
            self._images(name)[self.columns] if self._file(name).exists() else load_file(self._first(name))["images"]
            for name in names
        ]
        count = min(map(len, rows))
        return grid(torch.stack([row[:count].float() for row in rows]), names, self.shown[:count])

    def _images(self, name: str) -> Tensor:
        return load_file(self._file(name))["images"].float()

    def _file(self, name: str) -> Path:
        folder = self.shared if self._is_reference(name) else self.folder
        return folder / f"images-{name.replace(', ', '-').replace(' ', '-')}.safetensors"

    def _first(self, name: str) -> Path:
        path = self._file(name)
        return path.with_name(f"first-{path.name}")

    def _drawn(self, name: str, pipeline: Any, image_set: ImageSet) -> Path:
        """Folder for the batches of a measurement that is not done yet; never the shared one, where
        another process may be done sooner."""
        known = {
            "parts": [digest_of(part) for part in (pipeline.transformer, pipeline.scheduler)],
            "images": asdict(image_set),
        }
        return self.folder / f"{self._file(name).stem}.drawn-{digest(known)}"

    def _is_reference(self, name: str) -> bool:
        """Whether `name` is the reference, or the reference in other steps ("teacher, 4 steps")."""
        return name.split(",")[0] == self.reference
