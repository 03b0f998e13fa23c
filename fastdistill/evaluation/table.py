"""The measurements of :func:`fastdistill.evaluation.suite.evaluate` as rows for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

METRICS = (
    ("transformer_parameters", "parameters of the transformer", "{:,}"),
    ("caption_accuracy", "caption accuracy", "{:.1%}"),
    ("caption_accuracy_interval", "  95 % interval", "{0[0]:.1%} to {0[1]:.1%}"),
    ("caption_accuracy_spread", "  standard deviation over seeds", "{:.2%}"),
    ("background_total_variation", "background total variation from uniform", "{:.3f}"),
    ("background_total_variation_spread", "  standard deviation over seeds", "{:.3f}"),
    ("background_total_variation_of_truth", "  of a perfect sampler", "{:.3f}"),
    ("background_purity", "background purity", "{:.1%}"),
    ("background_purity_spread", "  standard deviation over seeds", "{:.2%}"),
    ("background_purity_of_truth", "  of a perfect sampler", "{:.1%}"),
    ("frechet_distance", "Frechet distance in latent space", "{:.2f}"),
    ("frechet_distance_spread", "  standard deviation over seeds", "{:.2f}"),
    ("frechet_distance_of_truth", "  of a perfect sampler", "{:.2f}"),
    ("frechet_distance_to_reference", "Frechet distance to the reference", "{:.2f}"),
    ("psnr_to_reference", "PSNR to the reference at the same noise, dB", "{:.1f}"),
    ("psnr_to_reference_spread", "  standard deviation over seeds", "{:.2f}"),
    ("autoencoder_psnr", "PSNR of the autoencoder, dB", "{:.1f}"),
    ("seconds_per_picture", "seconds a picture", "{:.3f}"),
)


def rows(evaluations: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[str]]]:
    """A label and one text for each evaluation, of every metric that at least one of them has."""
    table = []
    for key, label, form in METRICS:
        values = [evaluation.get(key) for evaluation in evaluations]
        if any(value is not None for value in values):
            table.append((label, ["" if value is None else form.format(value) for value in values]))
    return table
