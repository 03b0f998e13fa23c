"""Measurements of `suite.evaluate` for people: as rows of a table, and in a few lines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from fastdistill.evaluation.metrics import METRICS
from fastdistill.evaluation.metrics.metric import Value

SIZE = Value("transformer_parameters", "parameters of the transformer", "{:,}")
TIME = Value("seconds_per_image", "seconds an image", "{:.3f}")


def labelled_values() -> list[Value]:
    """Values with a label, in the order of the table."""
    measured = (value for metric in METRICS.values() for value in metric.values)
    return [value for value in (SIZE, *measured, TIME) if value.label]


def rows(evaluations: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[str]]]:
    """Label and one text for each evaluation, of every value that at least one evaluation has."""
    table = []
    for key, label, form, _ in labelled_values():
        values = [evaluation.get(key) for evaluation in evaluations]
        if any(value is not None for value in values):
            table.append((label, ["" if value is None else form.format(value) for value in values]))
    return table


def summarise(evaluation: Mapping[str, Mapping[str, Any]], output: Path, console: Console) -> None:
    """Print the headline measurements that all models have, and where the results are."""
    for key, label, form, headline in labelled_values():
        values = {name: metrics.get(key) for name, metrics in evaluation.items()}
        if headline and all(value is not None for value in values.values()):
            line = f"{label}: " + "; ".join(f"{name} {form.format(value)}" for name, value in values.items())
            console.print(line, soft_wrap=True)
    console.print(
        f"model:    {output / 'model'}\nimages:   {output / 'grid.png'}\nreport:   {output / 'report.md'}",
        soft_wrap=True,
    )
