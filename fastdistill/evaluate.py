"""Command `python -m fastdistill.evaluate`: measurements of a FLUX pipeline."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from fastdistill.errors import UserError, notice
from fastdistill.run.cli import run
from fastdistill.run.options import Sampling, SamplingOptions, at_least, check_output, check_seeds


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Measure a FLUX pipeline.

    On the emoji testbed: caption accuracy with its confidence interval and spread over seeds,
    coverage of the background colours, Frechet distance in latent space, PSNR of the autoencoder.
    With --reference, on any model: PSNR to the reference from the same noise, and Frechet distance
    to the reference.
    """

    model: str = "emoji"
    """Folder or hub id of a FLUX pipeline; "emoji" is the pipeline that ships with this package."""
    reference: str | None = None
    """Folder or hub id of a pipeline to compare with, image by image."""
    prompts: Path | None = None
    """Text file with one prompt a line; default: the model's own."""
    per_prompt: int = 4
    """Images of each prompt and seed."""
    seeds: tuple[int, ...] = (0, 1, 2)
    batch: int = 64
    """Images at once."""
    output: Path | None = None
    """JSON file to write, with the values of every seed."""
    overwrite: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Replace the file if it exists."""
    device: str | None = None
    """Default: cuda if there is one, else cpu."""
    sampling: Sampling = field(default_factory=SamplingOptions)

    def __post_init__(self) -> None:
        at_least(self, 1, "per_prompt", "batch")
        check_seeds(self, "seeds")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise UserError("--seeds needs at least one seed and none twice")


def main(config: EvaluateConfig) -> None:
    if config.output:
        check_output(config.output, config.overwrite)

    from rich.console import Console
    from rich.table import Table

    from fastdistill.evaluation.suite import ImageSet, evaluate
    from fastdistill.evaluation.table import rows
    from fastdistill.models.checks import check_call, tell_of_long_prompts
    from fastdistill.models.loading import load, read_prompts
    from fastdistill.models.patch import patched
    from fastdistill.run.files import write_json
    from fastdistill.run.progress import bar

    console = Console(stderr=True, highlight=False)
    loaded = load(config.model, config.device)
    distinct = read_prompts(config.prompts) if config.prompts else loaded.prompts
    sampling = loaded.sampling.replaced(config.sampling)
    check_call(loaded.pipeline, sampling)
    tell_of_long_prompts(loaded.pipeline, distinct, sampling.max_sequence_length)
    image_set = ImageSet(
        prompts=distinct * config.per_prompt, seeds=config.seeds, sampling=sampling, batch=config.batch
    )

    if not config.reference and image_set.truth(loaded.pipeline) is None:
        notice(
            "quality is measured against --reference MODEL, or if the emoji FLUX draws captions of emoji alone; here "
            "only size and time are"
        )
    reference = None
    if config.reference:
        compared = load(config.reference, config.device).pipeline
        with patched(compared.transformer), bar(console, "reference", len(image_set)) as tick:
            reference = image_set.draw(compared, tick)
    with patched(loaded.pipeline.transformer), bar(console, "evaluate", len(image_set)) as tick:
        metrics = evaluate(loaded.pipeline, image_set, reference=reference, tick=tick, other_parts=True).metrics
    images, seeds = metrics["images"], ", ".join(map(str, config.seeds))
    table = Table(
        title=f"{config.model}: {images} images, seeds {seeds}, {metrics['steps']} steps", title_justify="left"
    )
    table.add_column("metric")
    table.add_column("value", justify="right")
    for label, (value,) in rows([metrics]):
        table.add_row(label, value)
    Console(highlight=False).print(table)
    if config.output:
        write_json(config.output, {"model": config.model, "reference": config.reference, **metrics})


if __name__ == "__main__":
    run(EvaluateConfig, main, prog="python -m fastdistill.evaluate")
