"""``python -m fastdistill.distill``: a FLUX pipeline in, its few-step student as a stock diffusers pipeline and a report out."""

from __future__ import annotations

import shlex
import sys
from dataclasses import asdict
from pathlib import Path

from fastdistill.distill.config import DistillConfig, config_of
from fastdistill.run.cli import run

PROGRAM = "python -m fastdistill.distill"
RESULT = "distill.json"
WATCH_SEEDS = 1000
"""Added to the seed of the run for images that choose the weights: those of the report have no part in the choice."""


def main(config: DistillConfig) -> None:
    # Only now: `--help` and a mistyped option should not wait for torch.
    from rich.console import Console

    from fastdistill.data.images import read_folder
    from fastdistill.distill.build import plan
    from fastdistill.distill.job import distill, validate
    from fastdistill.distill.report import manifest, report
    from fastdistill.evaluation.gallery import Gallery
    from fastdistill.evaluation.table import rows, summarise
    from fastdistill.models.loading import load, read_prompts
    from fastdistill.models.sampling import SamplingDefaults
    from fastdistill.run.curves import draw_curves
    from fastdistill.run.files import digest, write_json
    from fastdistill.run.workspace import Workspace

    if config.dry_run:
        print(plan(config))
        return
    console = Console(stderr=True, highlight=False)
    output = config.output or Path("runs") / f"distill-{Path(config.model).name}-{config.method}-{config.steps}"
    prompts = read_prompts(config.prompts) if config.prompts else None
    images = read_folder(config.images, config.num_images) if config.images else []
    console.print(f"loading {config.model}")
    loaded = load(config.model, config.device)
    student = load(config.student, config.device).pipeline.transformer if config.student else None
    prompts = prompts or loaded.prompts
    sampling = loaded.sampling.replaced(config.sampling)
    validate(config, loaded.pipeline, student, sampling, output)
    workspace = Workspace(output, config.settings(), RESULT)
    if workspace.resumed:
        console.print(f"continuing the interrupted run in {output}")

    def gallery_in(folder: Path, count: int, seed: int) -> Gallery:
        measured = {"model": config.model, "prompts": prompts, "sampling": asdict(sampling), "images": count, "seed": seed}
        shared = config.teacher_cache and config.teacher_cache / f"measured-{digest(measured)}"
        return Gallery(
            folder, prompts, sampling, reference="teacher", count=count, seed=seed, batch=config.batch, console=console, shared=shared
        )

    gallery = gallery_in(workspace.work, config.evaluate_images, config.seed)
    watched = gallery_in(workspace.folder("watch"), config.watch_images, config.seed + WATCH_SEEDS)
    outcome = distill(config, loaded.pipeline, student, prompts, images, sampling, workspace, gallery.evaluate, watched.evaluate, console)
    gallery.grid(list(outcome.evaluation)).save(output / "grid.png")
    draw_curves(output / "metrics.jsonl", output / "curves.png", outcome.watched)
    command = f"{PROGRAM} {shlex.join(sys.argv[1:])}"
    drawn = SamplingDefaults.load(output / "model")
    record = manifest(config, outcome, sampling, drawn, prompts=prompts, images=len(images), command=command)
    measured = rows(list(outcome.evaluation.values()))
    text = report(record, measured, example=prompts[0], output=output, training_data=config.options.training_data)
    (output / "report.md").write_text(text, encoding="utf-8")
    # Beside the weights, too, as they travel alone; diffusers ignores it there.
    write_json(output / "model" / RESULT, record)
    write_json(output / RESULT, record)
    workspace.finish()
    console.print(f"{record['calls']['teacher']} -> {record['calls']['student']} calls of the network for an image")
    summarise(record["evaluation"], output, console)


if __name__ == "__main__":
    run(config_of(sys.argv[1:]), main, prog=PROGRAM)
