"""What a command says at its end."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

METRICS = (
    ("caption_accuracy", "caption accuracy", "{:.1%}"),
    ("frechet_distance", "Frechet distance", "{:.1f}"),
    ("background_total_variation", "background total variation", "{:.3f}"),
    ("background_purity", "background purity", "{:.1%}"),
)


def summarise(evaluation: Mapping[str, Mapping[str, Any]], output: Path, console: Console) -> None:
    """The measurements of every model that all of them have, and where the results are."""
    for key, label, form in METRICS:
        values = {name: metrics.get(key) for name, metrics in evaluation.items()}
        if all(value is not None for value in values.values()):
            line = f"{label}: " + "; ".join(f"{name} {form.format(value)}" for name, value in values.items())
            console.print(line, soft_wrap=True)
    console.print(f"model:    {output / 'model'}\npictures: {output / 'grid.png'}\nreport:   {output / 'report.md'}", soft_wrap=True)
