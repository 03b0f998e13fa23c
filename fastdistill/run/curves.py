"""Curves of a training run, from its `metrics.jsonl`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no window: there may be no screen
from matplotlib import pyplot
from matplotlib.axes import Axes

from fastdistill.run.files import atomic_write, read_lines

PREFIX = "evaluation/"
NO_LOSSES = ("seconds", "learning_rate", "gradient_norm", "student_steps")
"""Endings of the names of other logs."""


def draw_curves(metrics: Path, image: Path, others: Mapping[str, Mapping[str, Any]]) -> None:
    """Draw the student's measurements and the losses over the training steps.

    Args:
        others: measurements of other models by name, such as the teacher; drawn as dashed lines.
    """
    records = [json.loads(line) for line in read_lines(metrics)]
    series: dict[str, list[tuple[int, float]]] = {}
    for record in records:
        for name, value in record.items():
            if name != "step":
                series.setdefault(name, []).append((record["step"], value))
    measured = [name for name in series if name.startswith(PREFIX)]
    losses = [name for name in series if name not in measured and not name.endswith(NO_LOSSES)]
    figure, panels = pyplot.subplots(
        len(measured) + 1, 1, figsize=(7, 2.6 * (len(measured) + 1)), layout="constrained", squeeze=False
    )
    axes: list[Axes] = list(panels[:, 0])
    for axis, name in zip(axes, measured, strict=False):
        label = name.removeprefix(PREFIX)
        axis.plot(*zip(*series[name], strict=True), marker="o", markersize=3, label="student")
        for number, (model, values) in enumerate(others.items()):
            if label in values:
                axis.axhline(values[label], linestyle="--", linewidth=1, color=f"C{number + 1}", label=model)
        axis.set_title(label.replace("_", " "), loc="left", fontsize=10)
        axis.legend(fontsize=8)
    for name in losses:
        axes[-1].plot(*zip(*series[name], strict=True), linewidth=1, label=name)
    axes[-1].set_title("losses", loc="left", fontsize=10)
    # Losses of several roles differ by orders of magnitude, and some are negative.
    axes[-1].set_yscale("symlog", linthresh=1e-3)
    axes[-1].legend(fontsize=8)
    axes[-1].set_xlabel("training steps")
    with atomic_write(image) as partial:
        figure.savefig(partial, dpi=110)
    pyplot.close(figure)
