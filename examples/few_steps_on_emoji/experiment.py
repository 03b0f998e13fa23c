"""Which method makes the best few-step student of the emoji FLUX? Two to three hours on two cores.

    python examples/few_steps_on_emoji/experiment.py --output runs/few-steps

Every cell is one run of `python -m fastdistill.distill`, whose command its distill.json repeats:
each method in 4 steps with three seeds, in 1 and 2 with one; a student that was cut by a third and
recovered first; and a guidance-distilled sibling in the teacher's 28 steps. All get an equal
budget, counted in passes of the transformer over a batch of 64 images, a backward pass as two; how
many training steps that is depends on the method. OUTPUT/results.json and OUTPUT/tables.md hold
what is finished; an interrupted experiment goes on from there.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from figure import figure
from rich.console import Console
from tables import tables

from fastdistill.errors import UserError
from fastdistill.run.files import write_json
from fastdistill.run.versions import versions

CUT_BLOCKS = 4
METHODS = ("tdm", "dmd2", "dmd", "progressive", "consistency", "reflow", "output_kd")


@dataclass(frozen=True, kw_only=True)
class Config:
    output: Path
    """Folder for the runs and the results; an interrupted experiment in it is continued."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of everything. All of them in 4 steps, the first in 1 and 2."""
    budget: int = 1000
    """Passes of the transformer over a batch, for each student."""
    images: int = 1024
    """That the teacher draws for each seed; all methods train on the same."""
    evaluate_images: int = 200
    workers: int = 2
    """Runs at a time, each on one thread."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    method: str
    steps: int
    seed: int
    cut: bool = False
    """The student has lost a third of its blocks before."""

    @property
    def label(self) -> str:
        return f"{'cut by a third, ' if self.cut else ''}{self.method}"

    @property
    def name(self) -> str:
        return f"{'cut-' if self.cut else ''}{self.method}-{self.steps}-seed{self.seed}"


def cells(config: Config) -> Iterator[Cell]:
    """In the order of what they tell."""
    first, *others = config.seeds
    yield from _students(4, first)
    for seed in others:
        yield from _students(4, seed)
    for seed in config.seeds:
        yield Cell(method="tdm", steps=4, seed=seed, cut=True)
    yield from _students(1, first)
    yield from _students(2, first)
    yield Cell(method="guidance", steps=28, seed=first)


def _students(steps: int, seed: int) -> Iterator[Cell]:
    for method in METHODS:
        # DMD is for one step; in one, TDM is DMD2 without a GAN.
        if (method != "dmd" or steps == 1) and (method != "tdm" or steps > 1):
            yield Cell(method=method, steps=steps, seed=seed)


def passes(cell: Cell) -> float:
    """Passes over a batch that a training step takes on average, with the command's defaults and a
    teacher that is guided by two calls.

    A forward pass that leads to a gradient counts three: its backward pass is two more.
    """
    guided = 2
    # Its own sampling brings the student to one of its steps, each with equal odds.
    sampled = (cell.steps - 1) / 2
    match cell.method:
        case "tdm":
            # The critic on new samples, and the student's turn, which is every second.
            return (sampled + 1) + 3 + (sampled + 3 + guided + 1) / 2
        case "dmd2":
            # The same, with heads that read half of the critic, of samples and of data.
            return (sampled + 1) + 3 + 2 * 1.5 + 2 * 0.5 + (sampled + 3 + guided + 1 + 1) / 2
        case "dmd":
            # The student generates, is judged, and is held to a pair; for the critic it generates,
            # and that denoises.
            return (3 + guided + 1 + 3) + (1 + 3)
        case "progressive":
            # Two steps of the teacher, which is guided in the first phase only.
            return 3 + 2 * (1 + (guided - 1) / ((32 // cell.steps).bit_length() - 1))
        case "consistency":
            return 3 + guided + 1
        case "reflow":
            return 3
    return 3 + guided


def command(config: Config, cell: Cell) -> list[str]:
    """The command of a cell; its folder is the last word."""
    training_steps = round(config.budget / passes(cell))
    options = [
        *("--method", cell.method, "--steps", cell.steps, "--seed", cell.seed, "--training-steps", training_steps),
        # Eight measurements on the way, whatever the method.
        *("--watch-every", max(1, training_steps // 8), "--evaluate-images", config.evaluate_images),
        *("--num-images", config.images, "--teacher-cache", config.output / f"{drawn_for(cell)}-seed{cell.seed}"),
        *(("--student", cut_model(config, cell.seed)) if cell.cut else ()),
        *("--output", config.output / cell.name),
    ]
    return [sys.executable, "-m", "fastdistill.distill", *map(str, options)]


def drawn_for(cell: Cell) -> str:
    """Which of the teacher's images: for guidance distillation each has a guidance scale of its
    own."""
    return "images-of-every-guidance" if cell.method == "guidance" else "images"


def cut_model(config: Config, seed: int) -> Path:
    return config.output / f"compressed-seed{seed}" / "model"


def run(config: Config, arguments: Sequence[str], result: str, console: Console) -> None:
    """Run a command unless its folder has its `result`; its output is kept beside the folder."""
    folder = Path(arguments[-1])
    if (folder / result).exists():
        return
    console.print(f"{folder.name} ...")
    log = folder.with_suffix(".log")
    with log.open("a") as file:
        # One thread for each worker: two that share the cores' threads wait for each other.
        environment = {**os.environ, "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // config.workers))}
        ended = subprocess.run(arguments, stdout=file, stderr=subprocess.STDOUT, env=environment)
    if ended.returncode:
        raise SystemExit(f"{folder.name} failed; {log} says why. What is finished is kept: repeat the command to go on")


class Results:
    """OUTPUT/results.json and OUTPUT/tables.md, which hold every cell that is finished; its folder
    may be gone."""

    def __init__(self, config: Config) -> None:
        self.config, self.path, self.lock = config, config.output / "results.json", threading.Lock()
        self.facts = {
            "budget": config.budget,
            "batch": 64,
            "images": config.images,
            "evaluated": config.evaluate_images,
        }
        earlier = json.loads(self.path.read_text()) if self.path.exists() else {"runs": {}, **self.facts}
        changed = [f"{name} {earlier[name]}" for name, value in self.facts.items() if earlier[name] != value]
        if changed:
            raise UserError(
                f"{self.path} holds results with {', '.join(changed)}; repeat that, or choose another --output"
            )
        self.runs: dict[str, dict[str, Any]] = earlier["runs"]

    def add(self, cell: Cell) -> None:
        record = json.loads((self.config.output / cell.name / "distill.json").read_text())
        with self.lock:
            self.runs[cell.name] = {
                **{
                    "method": cell.label,
                    "seed": cell.seed,
                    "steps": cell.steps,
                    "training_steps": record["config"]["training_steps"],
                },
                **{key: record[key] for key in ("calls", "parameters", "evaluation", "chosen", "seconds")},
            }
            # In the order of the plan, whichever finished first.
            self.runs = {cell.name: self.runs[cell.name] for cell in cells(self.config) if cell.name in self.runs}
            write_json(self.path, {**self.facts, "versions": versions(), "runs": self.runs})
            (self.config.output / "tables.md").write_text(tables(self.facts, list(self.runs.values())))


def main(config: Config) -> None:
    console = Console(stderr=True, highlight=False)
    config.output.mkdir(parents=True, exist_ok=True)
    results = Results(config)
    planned = list(cells(config))
    left = [cell for cell in planned if cell.name not in results.runs]

    def cut(seed: int) -> None:
        compress = [
            sys.executable,
            "-m",
            "fastdistill.compress",
            "--drop-blocks",
            str(CUT_BLOCKS),
            "--evaluate-images",
            "0",
        ]
        run(
            config,
            [*compress, "--seed", str(seed), "--output", str(cut_model(config, seed).parent)],
            "compress.json",
            console,
        )

    def distil(cell: Cell) -> None:
        run(config, command(config, cell), "distill.json", console)
        results.add(cell)

    with ThreadPoolExecutor(config.workers) as pool:
        list(pool.map(cut, sorted({cell.seed for cell in left if cell.cut})))
        # The first run of each seed has the teacher draw, for all others to take.
        list(pool.map(distil, {cell.seed: cell for cell in reversed(left)}.values()))
        list(pool.map(distil, [cell for cell in left if cell.name not in results.runs]))
    for steps in (1, 4):
        students = [cell for cell in planned if (cell.steps, cell.seed) == (steps, config.seeds[0])]
        found = {cell.label: folder for cell in students if (folder := config.output / cell.name / "model").exists()}
        figure(found, steps).save(config.output / f"steps{steps}.png")
    console.print(f"wrote {config.output / 'tables.md'}")


if __name__ == "__main__":
    main(tyro.cli(Config))
