"""Which criterion chooses the blocks whose loss can be made good? An experiment on the emoji FLUX;
about two hours on two cores.

    python examples/compare_criteria/experiment.py --output runs/criteria

Every criterion chooses blocks to drop, 1/3 of them with three seeds, 1/4 and 1/2 with one. Every
set that is chosen is cut, repaired in closed form, and recovered for an equal budget, from the
plain cut and from the repaired one. Besides, ten random sets show what each repair is worth. An
interrupted run continues; a finished one is only tabulated again: OUTPUT/results.json and
OUTPUT/report.md.
"""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
import tyro
from rich.console import Console
from tables import tables
from torch import Tensor

from fastdistill.compress.choice.choose import spell
from fastdistill.compress.importance import CRITERIA
from fastdistill.compress.importance.calibrate import Amount, Calibration, calibrated
from fastdistill.compress.recovery import Recovery, RecoveryWeights
from fastdistill.compress.repairs import REPAIRS
from fastdistill.compress.repairs.damage import Damage, mend
from fastdistill.compress.surgery import CutModel, cut, cut_model
from fastdistill.data.trajectories import Source
from fastdistill.evaluation.suite import ImageSet, evaluate
from fastdistill.models.blocks import block_ids
from fastdistill.models.families import family_of
from fastdistill.models.families.family import BlockId
from fastdistill.models.loading import load
from fastdistill.models.patch import patched
from fastdistill.models.saving import swapped
from fastdistill.run.files import write_json
from fastdistill.train.config import TrainConfig
from fastdistill.train.trainer import Trainer

VERIFIED, REPAIRED = "output, verified", "output, repaired"
"""The set of least joint error among the best by the sum of scores: as cut, which is the command's
way, and after a repair."""
MEASURED = ("caption_accuracy", "frechet_distance", "psnr_to_reference")


@dataclass(frozen=True, kw_only=True)
class Config:
    output: Path
    """Folder for the results; an interrupted run in it is continued."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of calibration, scores, recovery and images: all at 1/3, the first at 1/4 and 1/2."""
    images: int = 100
    """Images of each model that is measured."""
    sampling_steps: int = 14
    recovery_steps: int = 100
    """A quarter of the command's default: where everything is made good, nothing can be compared."""
    short_recoveries: tuple[int, ...] = (10, 30)
    """Steps, for what the command would drop: what is a repair worth where there is no time to
    train?"""
    batch: int = 64
    calibration_images: int = 512
    """The points of the first half score; those of the second measure output errors."""
    repair_points: int = 1024
    random_sets: int = 10
    """Sets of 1/3 to compare the repairs on."""


class Experiment:
    """One seed: the teacher, its calibration, and what was measured so far."""

    def __init__(self, config: Config, seed: int, console: Console) -> None:
        self.config, self.seed, self.console = config, seed, console
        self.folder = config.output / f"seed{seed}"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.loaded = load("emoji", "cpu")
        self.pipeline = self.loaded.pipeline
        self.teacher = self.pipeline.transformer.requires_grad_(False)
        self.family = family_of(self.teacher)
        self.blocks = block_ids(self.teacher, self.family)
        self.sampling = self.loaded.sampling
        self.prompts = self.loaded.prompts

    def kept(self, name: str, make: Callable[[], Any]) -> Any:
        """The JSON value `name`: from the folder if it is there."""
        path = self.folder / f"{name}.json"
        if not path.exists():
            self.console.print(f"seed {self.seed}: {name}")
            write_json(path, make())
        return json.loads(path.read_text())

    @cached_property
    def calibration(self) -> Calibration:
        """The points of its first half score; those of the second measure output errors."""
        images = self.config.calibration_images
        source = Source(pipeline=self.pipeline, prompts=self.prompts, sampling=self.sampling)
        amount = Amount(images=images, points=images, steps=14, batch=self.config.batch, seed=self.seed)
        return calibrated(source, amount, cache=self.folder / "calibration.safetensors", console=self.console)

    @cached_property
    def halves(self) -> list[Calibration]:
        whole = self.calibration
        parts = whole.points.chunks(self.config.calibration_images // 2)
        return [
            dataclasses.replace(whole, points=part, runs=whole.runs[: len(part)], console=Console(quiet=True))
            for part in parts
        ]

    def scores(self, criterion: str, drops: int) -> dict[BlockId, float]:
        """Scores on the first half. Only a search and a training depend on how many blocks are
        going to be dropped."""
        suffix = f"-drop{drops}" if criterion in ("greedy", "learned") else ""

        def make() -> list[float]:
            return list(self.halves[0].score(criterion, drops=drops).values())

        return dict(zip(self.blocks, self.kept(f"scores-{criterion}{suffix}", make), strict=True))

    def joint(self, dropped: Sequence[BlockId]) -> float:
        """Joint error on the half that scored: a choice must not see the other."""
        return self.halves[0].joint_error(dropped)

    def joint_repaired(self, dropped: Sequence[BlockId]) -> float:
        """Output error on that half after a repair by a quarter of the points, which ranks sets as
        all of them do."""
        return self.halves[0].output_error(self.repaired(dropped, "ridge", share=4).student)

    def choices(self, drops: int) -> dict[str, list[BlockId]]:
        """Set of least summed score by criterion, and the one of the six best by `output` that a
        trial prefers."""
        found = {name: self._least(self.scores(name, drops), drops) for name in CRITERIA}

        def best(trial: Callable[[Sequence[BlockId]], float]) -> list[int]:
            scores = self.scores("output", drops)
            candidates = _least_sums([scores[block_id] for block_id in self.blocks], drops, 6)
            return min(candidates, key=lambda positions: trial([self.blocks[position] for position in positions]))

        for name, label, trial in ((VERIFIED, "verified", self.joint), (REPAIRED, "repaired", self.joint_repaired)):
            found[name] = [
                self.blocks[position] for position in self.kept(f"{label}-drop{drops}", partial(best, trial))
            ]
        return found

    def _least(self, scores: dict[BlockId, float], drops: int) -> list[BlockId]:
        chosen = set(sorted(self.blocks, key=scores.__getitem__)[:drops])
        return [block_id for block_id in self.blocks if block_id in chosen]

    def repaired(self, dropped: Sequence[BlockId], repair: str, share: int = 1) -> CutModel:
        model = cut_model(self.teacher, self.family, dropped)
        mend(Damage.of(model, self.calibration, self.config.repair_points // share), repair, Console(quiet=True))
        return model

    def error(self, student: Any) -> float:
        """Output error on the half that neither scores nor choices have seen."""
        return self.halves[1].output_error(student)

    def images(self, transformer: Any) -> Tensor:
        return self._evaluated(transformer, None).images

    def _evaluated(self, transformer: Any, reference: Tensor | None) -> Any:
        count = self.config.images
        prompts = [
            self.prompts[i * len(self.prompts) // min(count, len(self.prompts))]
            for i in range(min(count, len(self.prompts)))
        ]
        sampling = dataclasses.replace(self.sampling, num_inference_steps=self.config.sampling_steps)
        with swapped(self.pipeline, transformer), patched(transformer):
            image_set = ImageSet(prompts=prompts, seeds=[self.seed], sampling=sampling, batch=self.config.batch)
            return evaluate(self.pipeline, image_set, reference=reference)

    @cached_property
    def reference(self) -> Tensor:
        return self.images(self.teacher)

    def measured(self, transformer: Any) -> dict[str, float]:
        metrics = self._evaluated(transformer, None if transformer is self.teacher else self.reference).metrics
        return {name: metrics[name] for name in MEASURED if name in metrics}

    def recovered(self, model: CutModel, steps: int) -> Any:
        """The student of `model`, trained in place."""
        config = self.config
        run = self.folder / "recovery"
        # An earlier run may have been stopped in the middle: a recovery is short, and starts again.
        shutil.rmtree(run, ignore_errors=True)
        student: Any = model.student.float().train()
        method = Recovery(model, RecoveryWeights(task=1.0, out=1.0, feat=0.1))
        train = TrainConfig(
            steps=steps,
            learning_rate=1e-3,
            warmup_steps=min(20, steps),
            ema_decay=0.98,
            seed=self.seed,
            checkpoint_every=1_000_000,
        )
        trainer = Trainer(method, lambda step, rng: self.calibration.pool.batch(config.batch, rng), train, run)
        with patched(student), patched(self.teacher):
            trainer.fit("recover")
        trainer.take_best()
        shutil.rmtree(run)
        return student.eval()

    def cell(self, dropped: Sequence[BlockId], *, ablate: bool) -> dict[str, Any]:
        """Everything about one set of dropped blocks; to `ablate` is to recover it without a
        repair, too."""
        plain, repaired = cut_model(self.teacher, self.family, dropped), self.repaired(dropped, "ridge")
        result: dict[str, Any] = {"parameters": sum(parameter.numel() for parameter in plain.student.parameters())}
        result["cut"] = {"output_error": self.error(plain.student), **self.measured(plain.student)}
        result["repaired"] = {"output_error": self.error(repaired.student), **self.measured(repaired.student)}
        for name, model in (*((("recovered", plain),) if ablate else ()), ("repaired_recovered", repaired)):
            student = self.recovered(model, self.config.recovery_steps)
            result[name] = {
                "output_error": self.error(student),
                **(self.measured(student) if name == "repaired_recovered" else {}),
            }
        return result

    def head_start(self, dropped: Sequence[BlockId]) -> dict[str, dict[str, float]]:
        """Output error after shorter recoveries, by their steps, with and without a repair."""
        result = {}
        for steps in self.config.short_recoveries:
            models = {
                "recovered": cut_model(self.teacher, self.family, dropped),
                "repaired_recovered": self.repaired(dropped, "ridge"),
            }
            result[str(steps)] = {name: self.error(self.recovered(model, steps)) for name, model in models.items()}
        return result


def _least_sums(scores: Sequence[float], drops: int, count: int) -> list[list[int]]:
    return [
        list(found)
        for found in sorted(combinations(range(len(scores)), drops), key=lambda s: sum(scores[i] for i in s))[:count]
    ]


def _name(experiment: Experiment, dropped: Sequence[BlockId]) -> str:
    return spell(dropped, experiment.family).replace(" ", "_").replace(":", "")


def repairs(experiment: Experiment) -> list[dict[str, Any]]:
    """The output error of random sets: cut, and after each repair."""
    rng = random.Random(0)
    drops = len(experiment.blocks) // 3
    rows = []
    for _ in range(experiment.config.random_sets):
        chosen = set(rng.sample(experiment.blocks, drops))
        dropped = [block_id for block_id in experiment.blocks if block_id in chosen]

        def measure(dropped: list[BlockId] = dropped) -> dict[str, float]:
            return {
                "cut": experiment.error(cut(experiment.teacher, dropped)),
                **{name: experiment.error(experiment.repaired(dropped, name).student) for name in REPAIRS},
            }

        rows.append(
            {
                "dropped": spell(dropped, experiment.family),
                **experiment.kept(f"repairs-{_name(experiment, dropped)}", measure),
            }
        )
    return rows


def main(config: Config) -> None:
    torch.manual_seed(0)
    console = Console(stderr=True, highlight=False)
    settings = {name: value for name, value in dataclasses.asdict(config).items() if name != "output"}
    results: dict[str, Any] = {"config": settings, "full": {}, "sets": [], "repairs": [], "head_start": {}}
    plan = [(seed, 3) for seed in config.seeds] + [(config.seeds[0], 4), (config.seeds[0], 2)]
    experiments = {seed: Experiment(config, seed, console) for seed in config.seeds}
    for seed, fraction in plan:
        experiment = experiments[seed]
        results["blocks"] = len(experiment.blocks)
        results["full"][seed] = experiment.kept("full", partial(experiment.measured, experiment.teacher))
        drops = len(experiment.blocks) // fraction
        choices = experiment.choices(drops)
        chosen_by: dict[str, list[str]] = {}
        for name, dropped in choices.items():
            chosen_by.setdefault(spell(dropped, experiment.family), []).append(name)
        for spelled, names in chosen_by.items():
            dropped = choices[names[0]]
            cell = experiment.kept(
                f"set-{_name(experiment, dropped)}",
                partial(experiment.cell, dropped, ablate=(seed, fraction) in plan[: len(config.seeds)]),
            )
            sums = {name: sum(experiment.scores(name, drops)[block_id] for block_id in dropped) for name in CRITERIA}
            results["sets"].append(
                {"seed": seed, "drops": drops, "dropped": spelled, "chosen_by": names, "sums": sums, **cell}
            )
        if fraction == 3:
            results["head_start"][seed] = experiment.kept(
                "head-start", partial(experiment.head_start, choices[REPAIRED])
            )
        if (seed, fraction) == plan[0]:
            results["repairs"] = repairs(experiment)
        write_json(config.output / "results.json", results)
        (config.output / "report.md").write_text(tables(results), encoding="utf-8")
    console.print(f"results: {config.output / 'results.json'}, tables: {config.output / 'report.md'}")


if __name__ == "__main__":
    main(tyro.cli(Config))
