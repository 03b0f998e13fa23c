"""The students' samples beside the data, as one small image."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from PIL import Image
from torch import Tensor

POINTS = 1500
"""Samples of each label."""


def figure(path: Path, data: Tensor, columns: Mapping[str, Mapping[int, Tensor]], labels: Tensor) -> None:
    """A row for each number of steps, a column for each of `columns`, of points (N, 2) with their
    `labels` (N,); the data first."""
    steps = sorted({count for by_steps in columns.values() for count in by_steps})
    size = (1.2 * (len(columns) + 1), 1.2 * len(steps) + 0.3)
    figure, axes = plt.subplots(len(steps), len(columns) + 1, figsize=size, squeeze=False, dpi=100)
    for axis in axes.flat:
        axis.axis("off")
    for column, (name, by_steps) in enumerate({"data": {steps[0]: data}, **columns}.items()):
        axes[0, column].set_title("\n".join(textwrap.wrap(name, 15)), fontsize=7)
        for count, samples in by_steps.items():
            axis = axes[steps.index(count), column]
            for label, colour in enumerate(("tab:blue", "tab:orange")):
                x, y = samples[labels == label][:POINTS].T
                axis.scatter(x, y, s=0.6, color=colour, linewidths=0)
            axis.set(xlim=(-2.1, 2.1), ylim=(-2.1, 2.1), aspect="equal")
            if name != "data":
                axis.text(-2.1, 1.8, f"{count} step{'s' if count > 1 else ''}", fontsize=6)
    figure.tight_layout(pad=0.1)
    figure.savefig(path)
    plt.close(figure)
    # Few colours: a third of the size.
    Image.open(path).convert("RGB").quantize(32).save(path, optimize=True)
