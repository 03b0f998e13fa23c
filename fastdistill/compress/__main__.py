"""``python -m fastdistill.compress``: a FLUX pipeline in, a smaller stock diffusers pipeline and a report out."""

from __future__ import annotations

import dataclasses
import shlex
import sys
from pathlib import Path

from fastdistill.compress.config import CompressConfig
from fastdistill.run.cli import run

PROGRAM = "python -m fastdistill.compress"
RESULT = "compress.json"


def main(config: CompressConfig) -> None:
    # Only now: `--help` and a mistyped option should not wait for torch.
    from rich.console import Console

    from fastdistill.compress.job import compress, validate
    from fastdistill.compress.plan import plan
    from fastdistill.compress.report import manifest, report
    from fastdistill.data.images import read_folder
    from fastdistill.evaluation.gallery import Gallery
    from fastdistill.evaluation.table import rows, summarise
    from fastdistill.models.loading import load, read_prompts
    from fastdistill.run.files import write_json
    from fastdistill.run.workspace import Workspace

    if config.dry_run:
        print(plan(config))
        return
    console = Console(stderr=True, highlight=False)
    asked = "-".join(config.drop_blocks) or config.budget or ""
    output = config.output or Path("runs") / f"compress-{Path(config.model).name}-{asked.translate(str.maketrans('', '', ':='))}"
    prompts = read_prompts(config.prompts) if config.prompts else None
    images = read_folder(config.images, config.calibration_images) if config.images else []
    console.print(f"loading {config.model}")
    loaded = load(config.model, config.device)
    prompts = prompts or loaded.prompts
    validate(config, loaded.pipeline, output)
    settings = {name: value for name, value in dataclasses.asdict(config).items() if name != "output"}
    workspace = Workspace(output, settings, RESULT)
    if workspace.resumed:
        console.print(f"continuing the interrupted run in {output}")
    sampling = loaded.sampling.replaced(config.sampling)
    gallery = Gallery(
        workspace.work,
        prompts,
        sampling,
        reference="full",
        count=config.evaluate_images,
        seed=config.seed,
        batch=config.batch,
        console=console,
    )
    outcome = compress(config, loaded.pipeline, prompts, images, sampling, workspace, gallery.evaluate, console)
    gallery.grid(config.stages()).save(output / "grid.png")
    record = manifest(config, outcome, sampling, prompts=len(prompts), images=len(images), command=f"{PROGRAM} {shlex.join(sys.argv[1:])}")
    measured = rows(list(outcome.evaluation.values()))
    (output / "report.md").write_text(report(record, measured), encoding="utf-8")
    # Beside the weights, too, as they travel alone; diffusers ignores it there.
    write_json(output / "model" / RESULT, record)
    write_json(output / RESULT, record)
    workspace.finish()
    sizes = record["parameters"]
    console.print(f"{sizes['full'] / 1e6:.2f} M -> {sizes['compressed'] / 1e6:.2f} M parameters")
    summarise(record["evaluation"], output, console)


if __name__ == "__main__":
    run(CompressConfig, main, prog=PROGRAM)
