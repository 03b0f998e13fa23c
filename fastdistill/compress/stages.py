"""Stages of a smaller model, and which of them is the result."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from fastdistill.compress.surgery import CutModel, cut
from fastdistill.models.blocks import block_ids
from fastdistill.run.files import atomic_write


@dataclass(frozen=True, kw_only=True)
class Stage:
    """The smaller model after a step of the run.

    Attributes:
        name: cut, repaired or recovered.
        distance: held-out distance to the full model's images (`fastdistill.compress.held_out`),
            which decides. Not finite: the model draws nothing.
        output_error: relative error of single predictions. It has no say: a model may come closer
            in every prediction and draw images that are farther off.
    """

    name: str
    distance: float
    output_error: float

    @property
    def sound(self) -> bool:
        """Whether the model draws anything."""
        return math.isfinite(self.distance)


def best(stages: Sequence[Stage]) -> Stage:
    """The stage whose images are closest to the full model's; of equal ones the first."""
    return min(stages, key=lambda stage: stage.distance if stage.sound else math.inf)


class Stages:
    """The way of one smaller model, from the cut on: every step begins with the best stage so far.

    Attributes:
        done: finished stages, in order.
    """

    def __init__(
        self,
        model: CutModel,
        folder: Path,
        save_dtype: torch.dtype,
        judge: Callable[[str, Any], Stage],
        console: Console,
    ) -> None:
        """Begin with the student of `model`, which has just been cut.

        Args:
            folder: for the weights of every stage but the cut, which can be made again.
            save_dtype: of the weights as they are going to be saved, and are judged.
            judge: measures a student after the step of that name.
            console: where a stage is told, and whether it made things worse.
        """
        self.model, self.folder, self.save_dtype, self.judge, self.console = model, folder, save_dtype, judge, console
        self.done: list[Stage] = []

    @property
    def best(self) -> Stage:
        return best(self.done)

    def take(self, name: str, words: str, step: Callable[[], None]) -> Stage:
        """Let `step` change the student, judge what comes of it, and keep it.

        What an interrupted run has kept is read. The student is left as it was judged.
        """
        student, path = self.model.student, self._file(name)
        if not path.exists():
            if self.done:
                self.restore(self.best)
            step()
            if self.done:
                with atomic_write(path) as partial:
                    save_file({key: value.contiguous() for key, value in student.state_dict().items()}, partial)
        else:
            self._load(name)
        student.to(self.save_dtype).to(self.model.teacher.dtype)  # type: ignore[arg-type]
        stage = self.judge(name, student)
        self.console.print(f"{words}: {told(stage)}", soft_wrap=True)
        if self.done and best([self.best, stage]) is not stage:
            self.console.print(
                f"that is worse than the {self.best.name} model ({percent(self.best.distance)}), which is kept instead",
                soft_wrap=True,
            )
        self.done.append(stage)
        return stage

    def restore(self, stage: Stage) -> None:
        """Give the student the weights of a finished stage, as they were before they were rounded
        for saving."""
        self._load(stage.name)

    def _load(self, name: str) -> None:
        model, path = self.model, self._file(name)
        if path.exists():
            state = load_file(path, device=str(model.teacher.device))
        else:
            kept = set(model.boundaries)
            gone = [block_id for block_id in block_ids(model.teacher, model.family) if block_id not in kept]
            state = cut(model.teacher, gone).state_dict()
        # The weights of a recovery have another dtype than the full model's.
        model.student.load_state_dict(state, assign=True)

    def _file(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"


def told(stage: Stage) -> str:
    """Measurements of a stage in a few words."""
    if not stage.sound:
        return "it draws no images, only values that are not finite"
    return (
        f"its images differ by {percent(stage.distance)} from the full model's, output error {stage.output_error:.3f}"
    )


def finite(value: float) -> float | None:
    """A number as JSON, which has none that is not finite."""
    return value if math.isfinite(value) else None


def percent(distance: float | None) -> str:
    """A distance for people, with two digits that count: `38 %`, `2.4 %`, `0.012 %`."""
    if distance is None or not math.isfinite(distance):
        return "no images"
    share = 100 * distance
    digits = 0 if share == 0 else max(0, 1 - math.floor(math.log10(share)))
    return f"{share:.{digits}f} %"


def verdict(stages: Sequence[Stage]) -> str:
    """One sentence on which stage is the result, and why."""
    chosen = best(stages)
    others = [f"{stage.name}: {percent(stage.distance)}" for stage in stages if stage is not chosen]
    if not others:
        return (
            f"Saved is the {chosen.name} model. Its images differ by {percent(chosen.distance)} from the full model's."
        )
    return (
        f"Saved is the {chosen.name} model, as its images are the closest to the full model's: they differ by "
        f"{percent(chosen.distance)} ({', '.join(others)})."
    )
