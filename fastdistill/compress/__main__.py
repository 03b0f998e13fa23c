"""``python -m fastdistill.compress``: a FLUX pipeline in, a smaller stock diffusers pipeline and a report out."""

from __future__ import annotations

import dataclasses
import shlex
import sys
from pathlib import Path
from typing import Any

from fastdistill.cli import run
from fastdistill.compress.config import CompressConfig

PROGRAM = "python -m fastdistill.compress"
GRID_COLUMNS = 10
SUMMARY = (("caption_accuracy", "caption accuracy", "{:.1%}"), ("frechet_distance", "Frechet distance", "{:.1f}"))


def main(config: CompressConfig) -> None:
    # Only now: `--help` and a mistyped option should not wait for torch.
    from rich.console import Console

    from fastdistill.compress.job import compress, validate
    from fastdistill.compress.plan import plan
    from fastdistill.compress.report import manifest, report
    from fastdistill.compress.workspace import RESULT, Workspace, write_json
    from fastdistill.data.images import read_folder
    from fastdistill.evaluation.table import rows
    from fastdistill.models.loading import load, read_prompts

    if config.dry_run:
        print(plan(config))
        return
    console = Console(stderr=True, highlight=False)
    asked = "-".join(config.drop_blocks) or config.budget or ""
    output = config.output or Path("runs") / f"compress-{Path(config.model).name}-{asked.translate(str.maketrans('', '', ':='))}"
    prompts = read_prompts(config.prompts) if config.prompts else None
    images = read_folder(config.images, config.calibration_pictures) if config.images else []
    console.print(f"loading {config.model}")
    loaded = load(config.model, config.device)
    prompts = prompts or loaded.prompts
    validate(config, loaded.pipeline, output)
    settings = {name: value for name, value in dataclasses.asdict(config).items() if name != "output"}
    workspace = Workspace(output, settings)
    if workspace.resumed:
        console.print(f"continuing the interrupted run in {output}")
    sampling = loaded.sampling.replaced(config.sampling)
    evaluate = Evaluator(config, prompts, sampling, workspace.work, console)
    outcome = compress(config, loaded.pipeline, prompts, images, sampling, workspace, evaluate, console)
    evaluate.grid().save(output / "grid.png")
    record = manifest(config, outcome, sampling, prompts=len(prompts), images=len(images), command=f"{PROGRAM} {shlex.join(sys.argv[1:])}")
    measured = rows(list(outcome.evaluation.values()))
    (output / "report.md").write_text(report(record, measured), encoding="utf-8")
    # Beside the weights, too, as they travel alone; diffusers ignores it there.
    write_json(output / "model" / RESULT, record)
    write_json(output / RESULT, record)
    workspace.finish()
    _summarise(record, output, console)


class Evaluator:
    """Measures a pipeline and keeps its pictures in the workspace, for the reference and the grid."""

    def __init__(self, config: CompressConfig, prompts: list[str], sampling: Any, work: Path, console: Any) -> None:
        from math import ceil

        count = max(config.evaluate_pictures, GRID_COLUMNS)
        self.prompts = [prompts[i * len(prompts) // min(count, len(prompts))] for i in range(min(count, len(prompts)))]
        rounds = ceil(count / len(self.prompts)) if config.evaluate_pictures else 1
        self.seeds = [config.seed + k for k in range(rounds)]
        self.names = config.stages()
        self.measure = config.evaluate_pictures > 0
        self.batch, self.sampling, self.work, self.console = config.batch, sampling, work, console

    def __call__(self, pipeline: Any, name: str) -> dict[str, Any]:
        from safetensors.torch import load_file, save_file

        from fastdistill.evaluation.suite import evaluate
        from fastdistill.models.patch import patched
        from fastdistill.progress import bar

        reference = None if name == "full" else load_file(self.work / "pictures-full.safetensors")["pictures"].float()
        pictures = len(self.prompts) * len(self.seeds)
        with patched(pipeline.transformer), bar(self.console, f"evaluate {name}", pictures) as tick:
            result = evaluate(pipeline, self.prompts, self.sampling, seeds=self.seeds, batch=self.batch, reference=reference, tick=tick)
        save_file({"pictures": result.pictures.half()}, self.work / f"pictures-{name}.safetensors")
        return result.metrics if self.measure else {}

    def grid(self) -> Any:
        import torch
        from safetensors.torch import load_file

        from fastdistill.grid import grid

        columns = [i * len(self.prompts) // GRID_COLUMNS for i in range(min(GRID_COLUMNS, len(self.prompts)))]
        pictures = torch.stack([load_file(self.work / f"pictures-{name}.safetensors")["pictures"][columns].float() for name in self.names])
        return grid(pictures, self.names, [self.prompts[i] for i in columns])


def _summarise(record: dict[str, Any], output: Path, console: Any) -> None:
    sizes = record["parameters"]
    console.print(f"{sizes['full'] / 1e6:.2f} M -> {sizes['compressed'] / 1e6:.2f} M parameters")
    for key, label, form in SUMMARY:
        values = {name: metrics.get(key) for name, metrics in record["evaluation"].items()}
        if all(value is not None for value in values.values()):
            console.print(f"{label}: " + ", ".join(f"{name} {form.format(value)}" for name, value in values.items()))
    console.print(f"model:    {output / 'model'}\npictures: {output / 'grid.png'}\nreport:   {output / 'report.md'}")


if __name__ == "__main__":
    run(CompressConfig, main, prog=PROGRAM)
