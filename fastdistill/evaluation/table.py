"""The measurements of :func:`fastdistill.evaluation.suite.evaluate` for people: as rows of a table, and in a few lines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console


class Row(NamedTuple):
    """A measurement by its key, as people read it; ``headline`` if a command names it when it ends."""

    key: str
    label: str
    form: str
    headline: bool = False


METRICS = (
    Row("transformer_parameters", "parameters of the transformer", "{:,}"),
    Row("caption_accuracy", "caption accuracy", "{:.1%}", headline=True),
    Row("caption_accuracy_interval", "  95 % interval", "{0[0]:.1%} to {0[1]:.1%}"),
    Row("caption_accuracy_spread", "  standard deviation over seeds", "{:.2%}"),
    Row("background_total_variation", "background total variation from uniform", "{:.3f}", headline=True),
    Row("background_total_variation_spread", "  standard deviation over seeds", "{:.3f}"),
    Row("background_total_variation_of_truth", "  of a perfect sampler", "{:.3f}"),
    Row("background_purity", "background purity", "{:.1%}", headline=True),
    Row("background_purity_spread", "  standard deviation over seeds", "{:.2%}"),
    Row("background_purity_of_truth", "  of a perfect sampler", "{:.1%}"),
    Row("frechet_distance", "Frechet distance in latent space", "{:.2f}", headline=True),
    Row("frechet_distance_spread", "  standard deviation over seeds", "{:.2f}"),
    Row("frechet_distance_of_truth", "  of a perfect sampler", "{:.2f}"),
    Row("frechet_distance_to_reference", "Frechet distance to the reference", "{:.2f}"),
    Row("psnr_to_reference", "PSNR to the reference at the same noise, dB", "{:.1f}"),
    Row("psnr_to_reference_spread", "  standard deviation over seeds", "{:.2f}"),
    Row("autoencoder_psnr", "PSNR of the autoencoder, dB", "{:.1f}"),
    Row("seconds_per_image", "seconds an image", "{:.3f}"),
)


def rows(evaluations: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[str]]]:
    """A label and one text for each evaluation, of every metric that at least one of them has."""
    table = []
    for key, label, form, _ in METRICS:
        values = [evaluation.get(key) for evaluation in evaluations]
        if any(value is not None for value in values):
            table.append((label, ["" if value is None else form.format(value) for value in values]))
    return table


def summarise(evaluation: Mapping[str, Mapping[str, Any]], output: Path, console: Console) -> None:
    """Print the headline measurements that all models have, and where the results are."""
    for key, label, form, headline in METRICS:
        values = {name: metrics.get(key) for name, metrics in evaluation.items()}
        if headline and all(value is not None for value in values.values()):
            line = f"{label}: " + "; ".join(f"{name} {form.format(value)}" for name, value in values.items())
            console.print(line, soft_wrap=True)
    console.print(f"model:    {output / 'model'}\nimages:   {output / 'grid.png'}\nreport:   {output / 'report.md'}", soft_wrap=True)
