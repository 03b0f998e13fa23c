"""Command `python -m fastdistill.sample`: images of any FLUX pipeline, as one labelled grid."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from fastdistill.errors import UserError
from fastdistill.run.cli import run
from fastdistill.run.options import Sampling, SamplingOptions, at_least, check_output, check_seeds

EMOJI_PROMPTS = ("cat face", "rocket", "strawberry", "panda", "alarm clock", "penguin", "birthday cake", "robot")


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """Draw images of a FLUX pipeline with its own scheduler and write them as one labelled grid.

    Sampling options that are left out take the values of the model's fastdistill.json, else those
    of FLUX.1-dev.
    """

    model: str = "emoji"
    """Folder or hub id of a FLUX pipeline; "emoji" is the pipeline that ships with this package."""
    prompts: tuple[str, ...] = ()
    """Prompts to draw; default: a few of the model's own."""
    per_prompt: int = 4
    """Images of each prompt, from seeds SEED, SEED + 1 ..."""
    output: Path = Path("grid.png")
    """PNG file to write."""
    overwrite: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Replace the file if it exists."""
    seed: int = 0
    batch: int = 64
    """Images at once."""
    device: str | None = None
    """Default: cuda if there is one, else cpu."""
    sampling: Sampling = field(default_factory=SamplingOptions)

    def __post_init__(self) -> None:
        at_least(self, 1, "per_prompt", "batch")
        check_seeds(self, "seed")
        if self.output.suffix.lower() != ".png":
            raise UserError(f"--output names a PNG file, such as grid.png, got {self.output}")


def main(config: SampleConfig) -> None:
    check_output(config.output, config.overwrite)

    from rich.console import Console

    from fastdistill.models.checks import check_call, tell_of_long_prompts
    from fastdistill.models.loading import load
    from fastdistill.models.patch import patched
    from fastdistill.models.sampling import sample
    from fastdistill.run.files import write_image
    from fastdistill.run.grid import grid
    from fastdistill.run.progress import bar

    loaded = load(config.model, config.device)
    sampling = loaded.sampling.replaced(config.sampling)
    known = [prompt for prompt in EMOJI_PROMPTS if prompt in loaded.prompts]
    prompts = config.prompts or tuple(known) or tuple(loaded.prompts[:4])
    everything = [prompt for prompt in prompts for _ in range(config.per_prompt)]
    seeds = [config.seed + i for _ in prompts for i in range(config.per_prompt)]
    check_call(loaded.pipeline, sampling)
    tell_of_long_prompts(loaded.pipeline, prompts, sampling.max_sequence_length)
    console = Console(stderr=True, highlight=False)
    with patched(loaded.pipeline.transformer), bar(console, "sample", len(everything)) as tick:
        images = sample(loaded.pipeline, everything, sampling, seeds=seeds, batch=config.batch, tick=tick)
    rows = images.view(len(prompts), config.per_prompt, *images.shape[1:])
    write_image(config.output, grid(rows, prompts, [f"seed {config.seed + i}" for i in range(config.per_prompt)]))
    console.print(f"wrote {config.output}")


if __name__ == "__main__":
    run(SampleConfig, main, prog="python -m fastdistill.sample")
