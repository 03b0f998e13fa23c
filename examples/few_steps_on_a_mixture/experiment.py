"""Experiment: one, two and four steps of every method's student on a mixture with an exact teacher.
About 45 minutes on one core.

    python examples/few_steps_on_a_mixture/experiment.py --output runs/mixture

Every method starts from the same small flow-matching network, one per seed, and trains for equally
many steps of equally many samples. An interrupted run continues; a finished one is only tabulated
again: OUTPUT/results.json, OUTPUT/report.md and OUTPUT/mixture.png.
"""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import tyro
from diffusers import FlowMatchEulerDiscreteScheduler
from figure import figure
from mixture import FLOW, WIDTH, Batches, LabelFamily, Labels, Perceptron, mixture, teacher
from rich.console import Console
from safetensors.torch import load_file, save_file
from tables import tables
from torch import Tensor

from fastdistill.data.pairs import PairPool
from fastdistill.diffusion import schedulers
from fastdistill.diffusion.prediction import Prediction, Predictor
from fastdistill.diffusion.sampler import sample
from fastdistill.diffusion.timesteps import Uniform, few_step_times
from fastdistill.distill import METHODS
from fastdistill.distill.methods.discriminator import Heads
from fastdistill.distill.methods.distillation import Distillation
from fastdistill.distill.methods.teacher_pairs import PairOptions, teacher_pairs
from fastdistill.evaluation.samples import energy_distance, modes, sliced_wasserstein
from fastdistill.run.files import write_json
from fastdistill.run.versions import versions
from fastdistill.train.config import RoleConfig, TrainConfig
from fastdistill.train.denoising import Denoising
from fastdistill.train.trainer import Trainer

STEPS = (1, 2, 4)
MANY = 256
"""Steps of the teacher that stand for the flow itself."""


@dataclass(frozen=True, kw_only=True)
class Config:
    output: Path
    """Folder for the results; an interrupted run in it is continued."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the start, of training and of samples."""
    start_steps: int = 4000
    """Steps of flow matching, which every method starts from."""
    training_steps: int = 3000
    """Steps of every method, in each of which it sees a batch."""
    batch: int = 512
    samples: int = 10_000
    """By which a student is measured, half of them for each label."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """Row of the tables: a method with its options, and how it is trained."""

    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    steps: tuple[int, ...] = STEPS
    """Steps of the students."""
    train: Mapping[str, Any] = field(default_factory=dict)


TRAIN: dict[str, Any] = {"learning_rate": 3e-3, "ema_decay": 0.99}
# Ten times the default in the student: in two dimensions a smaller weight changes little.
GAN = {"gan_weight": 0.05, "gan_critic_weight": 0.05}
MATCHING = {"betas": (0.0, 0.99)}
# A critic that keeps up with its student, in proportions as the command's.
FOLLOWED = {
    "learning_rate": 1e-3,
    "roles": {"critic": RoleConfig(learning_rate=3e-3, ema_decay=None, betas=(0.0, 0.99))},
    **MATCHING,
}
ROWS: dict[str, Row] = {
    "dmd2": Row(method="dmd2", options=GAN, train=MATCHING),
    "dmd2 without GAN": Row(method="dmd2", options={"gan_weight": 0.0}, train=MATCHING),
    # In one step, from t = 1, noised data is noise.
    "dmd2 without GAN, on noised data": Row(
        method="dmd2", options={"gan_weight": 0.0, "backward_simulation": 0.0}, steps=(2, 4), train=MATCHING
    ),
    "dmd2 without GAN, critic told the step": Row(
        method="dmd2", options={"gan_weight": 0.0, "critic_knows_step": True}, steps=(2, 4), train=MATCHING
    ),
    "dmd2 without GAN, with ISG": Row(
        method="dmd2", options={"gan_weight": 0.0, "isg_weight": 1.0}, steps=(2, 4), train=MATCHING
    ),
    # Matching compares scores up to t = 0.3, where modes that far apart do not overlap yet.
    "dmd2 at little noise": Row(method="dmd2", options=GAN | {"time_high": 0.3}, steps=(1,), train=MATCHING),
    "dmd2 without GAN at little noise": Row(
        method="dmd2", options={"gan_weight": 0.0, "time_high": 0.3}, steps=(1,), train=MATCHING
    ),
    "dmd2 without GAN, critic told the step, which keeps up": Row(
        method="dmd2",
        options={"gan_weight": 0.0, "critic_updates": 2, "critic_knows_step": True},
        steps=(2, 4),
        train=FOLLOWED,
    ),
    "tdm": Row(method="tdm", options={"critic_updates": 2}, steps=(2, 4), train=FOLLOWED),
    "tdm, critic of the score": Row(
        method="tdm", options={"critic_updates": 2, "critic_target": "score"}, steps=(2, 4), train=FOLLOWED
    ),
    "dmd": Row(method="dmd", steps=(1,), train=MATCHING),
    "progressive": Row(method="progressive"),
    "consistency": Row(method="consistency"),
    "reflow": Row(method="reflow"),
    "reflow, straightening only": Row(method="reflow", options={"straighten": 1_000_000}, steps=(1,)),
    "output_kd": Row(method="output_kd"),
}


class Experiment:
    """One seed: its start, and what was measured so far."""

    def __init__(self, config: Config, seed: int, console: Console) -> None:
        self.config, self.seed, self.console = config, seed, console
        self.folder = config.output / f"seed{seed}"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.data, self.teacher, self.family = mixture(), teacher(), LabelFamily()
        self.batches = Batches(self.data, config.batch)
        count = config.samples // 2
        self.labels = torch.arange(2).repeat_interleave(count)
        self.noise = torch.randn(2 * count, 2, generator=self._rng(1))
        self.drawn = torch.cat([self.data.given(label).draw(count, self._rng(2 + label))[0] for label in (0, 1)])

    def _rng(self, use: int) -> torch.Generator:
        return torch.Generator().manual_seed(1000 * self.seed + use)

    def kept(self, name: str, make: Callable[[], Any]) -> Any:
        """The JSON value `name`: from the folder if it is there."""
        path = self.folder / f"{name}.json"
        if not path.exists():
            self.console.print(f"seed {self.seed}: {name}")
            write_json(path, make())
        return json.loads(path.read_text())

    def taught(self, steps: int) -> Tensor:
        """The exact teacher's samples, as FLUX is sampled."""
        return sample(self.teacher.predictor(self.labels), self.noise, few_step_times(steps), sampler="flow_euler")

    @cached_property
    def flow(self) -> Tensor:
        """End of the flow from the noise that all samples start from."""
        return self.taught(MANY)

    def sampled(self, student: Perceptron, times: Tensor, stochastic: bool) -> Tensor:
        scheduler: Any = FlowMatchEulerDiscreteScheduler(shift=1.0, stochastic_sampling=stochastic)
        scheduler.set_timesteps(sigmas=times.tolist())
        predictor = Predictor(
            function=lambda x_t, t: student(x_t, t, self.labels), process=FLOW, prediction=Prediction.VELOCITY
        )
        return schedulers.run(predictor, scheduler, self.noise, self._rng(4))

    @torch.no_grad()
    def seen_by_the_critic(self, student: Perceptron, times: Tensor) -> Tensor:
        """Samples that DMD2 matches: the student's `x_0` at all of its steps, here each sample's at
        one that is drawn."""
        x_t, found = self.noise, []
        for t, s in pairwise([*times, torch.zeros(())]):
            velocity = student(x_t, t.expand(len(x_t)), self.labels)
            found.append(x_t - t * velocity)
            x_t = x_t + (s - t) * velocity
        chosen = torch.randint(len(times), (len(x_t),), generator=self._rng(7))
        return torch.stack(found)[chosen, torch.arange(len(x_t))]

    def scores(self, samples: Tensor) -> dict[str, Any]:
        """Each label's samples against its own modes, and the mean over both; and how far they are
        from the flow's, from the same noise."""
        found: list[dict[str, Any]] = []
        for label in (0, 1):
            own = self.labels == label
            of_modes = dataclasses.asdict(modes(samples[own], self.data.given(label)))
            found.append(
                {
                    "sliced_wasserstein": sliced_wasserstein(samples[own], self.drawn[own]),
                    "energy_distance": energy_distance(samples[own], self.drawn[own]),
                    **{name: of_modes[name] for name in ("total_variation", "outside", "spread", "weights")},
                }
            )
        means = {name: (found[0][name] + found[1][name]) / 2 for name in found[0] if name != "weights"}
        means["displacement"] = float((samples - self.flow).norm(dim=1).mean())
        # JSON knows no NaN, which the variance within modes is where no sample is in one.
        defined = {name: None if math.isnan(value) else value for name, value in means.items()}
        return {**defined, "weights": [of_label["weights"] for of_label in found]}

    def trained(self, method: Any, source: Any, describe: str, **settings: Any) -> Perceptron:
        """The averaged student."""
        folder = self.folder / "run"
        # An earlier run may have been stopped in the middle: these are short, and start again.
        shutil.rmtree(folder, ignore_errors=True)
        config = TrainConfig(
            **{**TRAIN, "seed": self.seed, "checkpoint_every": 1_000_000, "log_every": 100, **settings}
        )
        trainer = Trainer(method, source, config, folder)
        trainer.fit(describe)
        trainer.take_best()
        shutil.rmtree(folder)
        student: Perceptron = method.networks["student"].eval()
        return student

    def start(self) -> Perceptron:
        """The diffusion model that every method starts from."""
        path = self.folder / "start.safetensors"
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            network = Perceptron()
        if not path.exists():
            method = Denoising(network, self.family, FLOW, Prediction.VELOCITY, Uniform())
            network = self.trained(method, self.batches, "start", steps=self.config.start_steps)
            save_file(network.state_dict(), path)
        network.load_state_dict(load_file(path))
        return network

    def method(self, name: str, steps: int) -> Distillation:
        row, total = ROWS[name], self.config.training_steps
        options: dict[str, Any] = dict(row.options)
        setup: dict[str, Any] = {
            "student": self.start(),
            "teacher": self.teacher,
            "family": self.family,
            "steps": steps,
        }
        if row.method == "progressive":
            phases = 5 - STEPS.index(steps)
            options |= {"teacher_steps": steps << phases, "phase_length": total // phases}
        elif row.method == "reflow":
            options = {"straighten": total // 2, **options}
        elif options.get("gan_weight"):
            with torch.random.fork_rng():
                torch.manual_seed(self.seed)
                setup["heads"] = Heads(WIDTH, heads=1)
        if options.get("critic_knows_step"):
            setup["critic"] = self.start().told()
        method: Distillation = METHODS[row.method](METHODS[row.method].Options(**options), **setup)
        return method

    def pairs(self, method: Distillation) -> PairPool:
        """As many as fit the flow closely; the same for every method that takes pairs."""
        options = PairOptions(count=65_536, steps=32, sampler="ode_heun", batch=8192)
        return teacher_pairs(
            method, self.folder / "pairs", options, conditioning=Labels(torch.arange(2)), shape=(2,), seed=self.seed
        )

    def cell(self, name: str, steps: int) -> dict[str, Any]:
        """Train a student of `steps` steps, and measure it."""
        method = self.method(name, steps)
        pool = self.pairs(method) if ROWS[name].method in ("reflow", "dmd") else None
        source = self.batches if pool is None else lambda step, rng: pool.batch(self.config.batch, rng)
        began = time.perf_counter()
        settings = {"steps": self.config.training_steps, **ROWS[name].train}
        student = self.trained(method, source, f"{name}, {steps} steps", **settings)
        seconds = time.perf_counter() - began
        samples = self.sampled(student, method.times, method.stochastic_sampling)
        save_file({"samples": samples}, self._samples(name, steps))
        pooled = (
            {"pooled": self.scores(self.seen_by_the_critic(student, method.times))}
            if ROWS[name].method == "dmd2"
            else {}
        )
        return {"seconds": seconds, **self.scores(samples), **pooled}

    def references(self) -> dict[str, dict[str, dict[str, Any]]]:
        """By row and steps: the exact teacher, the network that all start from, and a perfect
        sampler, whose scores are sampling noise."""
        fresh = torch.cat(
            [self.data.given(label).draw(len(self.drawn) // 2, self._rng(5 + label))[0] for label in (0, 1)]
        )
        network = self.start()

        def taught(steps: int) -> dict[str, Any]:
            return self.scores(self.taught(steps))

        def start(steps: int) -> dict[str, Any]:
            return self.scores(self.sampled(network, few_step_times(steps), stochastic=False))

        return {
            "perfect sampler": {"": self.kept("perfect", lambda: self.scores(fresh))},
            "teacher": {str(steps): self.kept(f"teacher-{steps}", partial(taught, steps)) for steps in (*STEPS, MANY)},
            "start": {str(steps): self.kept(f"start-{steps}", partial(start, steps)) for steps in STEPS},
        }

    def cells(self, name: str) -> dict[str, dict[str, Any]]:
        """The scores of a row by the student's steps."""
        return {
            str(steps): self.kept(f"{_file(name)}-{steps}", partial(self.cell, name, steps))
            for steps in ROWS[name].steps
        }

    def columns(self) -> dict[str, dict[int, Tensor]]:
        """Content of the figure: samples by row and steps."""
        found = {
            name: {steps: load_file(self._samples(name, steps))["samples"] for steps in row.steps}
            for name, row in ROWS.items()
        }
        return {"teacher": {steps: self.taught(steps) for steps in STEPS}, **found}

    def _samples(self, name: str, steps: int) -> Path:
        return self.folder / f"{_file(name)}-{steps}.safetensors"


def _file(name: str) -> str:
    return name.replace(",", "").replace(" ", "-")


def main(config: Config) -> None:
    torch.set_num_threads(1)
    console = Console(stderr=True, highlight=False)
    results: dict[str, Any] = {
        "config": {name: value for name, value in dataclasses.asdict(config).items() if name != "output"},
        "train": TRAIN,
        "methods": {name: dataclasses.asdict(row) for name, row in ROWS.items()},
        "versions": versions(),
        "rows": {},
    }
    for seed in config.seeds:
        experiment = Experiment(config, seed, console)
        found = experiment.references() | {name: experiment.cells(name) for name in ROWS}
        for name, by_steps in found.items():
            for steps, scores in by_steps.items():
                results["rows"].setdefault(name, {}).setdefault(steps, {})[str(seed)] = scores
        write_json(config.output / "results.json", results)
        (config.output / "report.md").write_text(tables(results), encoding="utf-8")
        if seed == config.seeds[0]:
            figure(config.output / "mixture.png", experiment.drawn, experiment.columns(), experiment.labels)
    console.print(f"results: {config.output / 'results.json'}, tables: {config.output / 'report.md'}")


if __name__ == "__main__":
    main(tyro.cli(Config))
