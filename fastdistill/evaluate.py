"""``python -m fastdistill.evaluate``: measure a FLUX pipeline against the known truth, or against another pipeline."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from fastdistill.cli import run
from fastdistill.errors import UserError


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Measure a FLUX pipeline and write JSON.

    On the emoji testbed: caption accuracy with its confidence interval and spread over seeds, coverage of the background colours,
    Frechet distance in latent space, PSNR of the autoencoder. With --reference, on any model: PSNR to it from the same noise.
    """

    model: str = "emoji"
    """A folder or hub id of a FLUX pipeline; "emoji" is the one that ships with this package."""
    reference: str | None = None
    """Another pipeline to compare with, picture by picture."""
    prompts: Path | None = None
    """Text file with one prompt a line; default: the model's own."""
    per_prompt: int = 4
    """Pictures of each prompt and seed."""
    seeds: tuple[int, ...] = (0, 1, 2)
    steps: int | None = None
    """Sampling steps; default: the model's own."""
    batch: int = 64
    """Pictures at once."""
    output: Path | None = None
    """JSON file to write as well as the table."""
    overwrite: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Replace the file if it exists."""
    device: str | None = None
    """Default: cuda if there is one, else cpu."""

    def __post_init__(self) -> None:
        for name in ("per_prompt", "batch"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(self, name)}")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise UserError("--seeds needs at least one seed and none twice")


def main(config: EvaluateConfig) -> None:
    if config.output and config.output.exists() and not config.overwrite:
        raise UserError(f"{config.output} exists; choose another --output, or give --overwrite")

    import dataclasses

    from rich.console import Console

    from fastdistill.evaluation.suite import autoencoder_psnr, evaluate
    from fastdistill.models.loading import load, read_prompts
    from fastdistill.models.patch import patched
    from fastdistill.progress import bar

    console = Console(stderr=True, highlight=False)
    loaded = load(config.model, config.device)
    distinct = read_prompts(config.prompts) if config.prompts else loaded.prompts
    prompts = distinct * config.per_prompt
    sampling = dataclasses.replace(loaded.sampling, steps=config.steps) if config.steps else loaded.sampling

    def measured(name: str, pipeline: Any, reference: Any = None) -> Any:
        with patched(pipeline.transformer), bar(console, name, len(prompts) * len(config.seeds)) as tick:
            return evaluate(pipeline, prompts, sampling, seeds=config.seeds, batch=config.batch, reference=reference, tick=tick)

    reference = None
    if config.reference:
        reference = measured("reference", load(config.reference, config.device).pipeline).pictures
    metrics = measured("evaluate", loaded.pipeline, reference).metrics
    if "caption_accuracy" in metrics:
        metrics["autoencoder_psnr"] = autoencoder_psnr(loaded.pipeline.vae)
    metrics = {"model": config.model, "reference": config.reference, **metrics}
    text = json.dumps(metrics, indent=1)
    print(text)
    if config.output:
        config.output.write_text(text + "\n")


if __name__ == "__main__":
    run(EvaluateConfig, main, prog="python -m fastdistill.evaluate")
