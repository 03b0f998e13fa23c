"""Observers and evaluations of a run, called every so many steps.

The student has its averaged weights meanwhile, and modules are in evaluation mode. The trainer
knows neither images nor metrics. A job gives it observers, and an evaluation by which the best
weights are kept and the run may be ended: the quality of a few-step student peaks and then decays,
while its losses look no worse.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from fastdistill.errors import UserError
from fastdistill.run.grid import grid
from fastdistill.train.log import Log


class Observer(Protocol):
    """Callable that the trainer calls after every `every` steps and after the last.

    Under torchrun all processes call the observer, and the log of the first one writes.
    """

    @property
    def every(self) -> int:
        """Number of steps between two calls."""
        ...

    def __call__(self, step: int, log: Log) -> None: ...


@dataclass(frozen=True, kw_only=True)
class SampleGrid:
    """Observer that keeps rows of images as `run/samples/<step>.png`.

    Rows may be `student`, `x0_real` and `x0_critic`.
    """

    every: int
    draw: Callable[[], Mapping[str, Tensor]]
    """Rows by name, each (N, 3, H, W) in [-1, 1]. The same noise each time shows what training
    changes."""

    def __call__(self, step: int, log: Log) -> None:
        rows = self.draw()
        log.image("samples", step, grid(torch.stack(list(rows.values())), list(rows), []))


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Evaluation of the student, whose best averaged weights are kept in `run/best`."""

    evaluate: Callable[[], Mapping[str, float]]
    """Measurements of the student by name."""
    every: int
    """Steps."""
    monitor: str
    """Name of the measurement that decides."""
    direction: Literal["lower", "higher"] = "lower"
    """Direction of better measurements."""
    patience: int | None = None
    """Number of evaluations in a row without a better one after which the run ends; None: the run
    does not end early."""

    def __post_init__(self) -> None:
        if self.every < 1 or (self.patience is not None and self.patience < 1):
            raise ValueError("every and patience must be at least 1")


class Best:
    """Best evaluation of a run so far."""

    def __init__(self, evaluation: Evaluation) -> None:
        self.evaluation = evaluation
        self.value: float | None = None
        self.step = 0
        self.failures = 0
        """Number of evaluations since the best."""

    def judge(self, step: int, measured: Mapping[str, float]) -> bool:
        """Whether `measured` is the best so far. A value that is not a number never is.

        Raises:
            UserError: no measurement has the name in `monitor`.
        """
        monitor = self.evaluation.monitor
        if monitor not in measured:
            raise UserError(
                f"the evaluation measures {', '.join(measured)}, and not {monitor!r}: choose one of these as monitor"
            )
        value, sign = measured[monitor], 1 if self.evaluation.direction == "lower" else -1
        if not math.isnan(value) and (self.value is None or sign * value < sign * self.value):
            self.value, self.step, self.failures = value, step, 0
            return True
        self.failures += 1
        return False

    @property
    def exhausted(self) -> bool:
        """Whether `patience` is at its end."""
        return self.evaluation.patience is not None and self.failures >= self.evaluation.patience

    def record(self) -> dict[str, Any]:
        """Return the state as JSON."""
        return {"monitor": self.evaluation.monitor, "value": self.value, "step": self.step, "failures": self.failures}

    def continue_from(self, record: Mapping[str, Any]) -> None:
        """Continue from what `record` returned.

        Raises:
            UserError: the record was made with another `monitor`.
        """
        if record["monitor"] != self.evaluation.monitor:
            raise UserError(
                f"this run was monitored by {record['monitor']!r}: keep it, or choose another folder for a new run"
            )
        self.value, self.step, self.failures = record["value"], record["step"], record["failures"]
