"""The options of ``python -m fastdistill.distill``, some of them of one method. Imports no torch, so that ``--help`` answers at once."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from fastdistill.distill.options import OPTIONS, MethodOptions
from fastdistill.errors import UserError
from fastdistill.run.options import Sampling, SamplingOptions, at_least

MethodName = Literal["tdm", "dmd2", "dmd", "progressive", "consistency", "reflow", "guidance", "output_kd"]

REFERENCE_WIDTH = 128
"""Of the tokens of the emoji FLUX, for which learning rates are stated."""


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """Teach a student to draw in few steps what its teacher draws in many. Every method has options of its own: --method NAME --help.

    Writes a stock diffusers pipeline to OUTPUT/model, with report.md, grid.png, curves.png, distill.json, metrics.jsonl and samples/
    beside it. An interrupted run continues when the same command is given again.
    """

    method: MethodName
    """Distribution matching at every step of the student's way (tdm), of the data with a critic and a GAN (dmd2), or in one step and held
    to pairs (dmd); halving the number of steps again and again (progressive); jumps to the end of a trajectory (consistency, as LCM);
    straight paths (reflow). Not for few steps, but to halve the calls of each: guidance of any scale as an input of the student
    (guidance), or the guided teacher's output (output_kd)."""
    steps: int
    """Sampling steps of the student."""
    dry_run: bool = False
    """Only print the resolved settings and the memory that training needs. TrainingData no weights: --model may be a config.json."""
    model: str = "emoji"
    """The teacher, a folder or hub id of a FLUX pipeline; "emoji" is the one that ships with this package."""
    student: str | None = None
    """A pipeline whose transformer the student starts from, such as a smaller one that fastdistill.compress made; default: the teacher."""
    output: Path | None = None
    """Folder to write to, new or empty; default runs/distill-<model>-<method>-<steps>."""
    seed: int = 0
    """Seed of images, training and evaluation."""

    prompts: Path | None = None
    """Text file with one prompt a line to train on; default: the model's own prompts.txt, else a small general list."""
    images: Path | None = None
    """Folder of jpg, png or webp images to train on instead of images that the teacher draws, scaled and cropped to the size to sample
    at. Their captions are in .txt files of the same names, or there are none."""
    num_images: int = 1024
    """Images that the teacher draws to train on, or that are taken from --images at most."""
    teacher_cache: Path | None = None
    """Where to keep what the teacher draws and how it is measured, for other runs with the same teacher, prompts and seed to take it from;
    default: with the run, until that is finished."""
    image_steps: int | None = None
    """Sampling steps of each; default: those of the teacher."""
    shift: float | None = None
    """Moves the student's times towards noise if above 1; default: the shift of the teacher's scheduler, of a dynamic one at the size to
    sample at."""

    training_steps: int = 300
    """Updates; in tdm and dmd2 those of the critic, of which the student has one in --critic-updates."""
    batch: int = 64
    """Samples of an update, and images at once otherwise."""
    micro_batches: int = 1
    """Equal parts of a batch that are in memory one at a time."""
    learning_rate: float = 5e-4
    """Peak learning rate of AdamW for a model of the emoji FLUX's width, 128; a wider one gets as much less as it is wider (Yang et al.
    2022, muP). Cosine decay to zero."""
    betas: tuple[float, float] = (0.9, 0.99)
    """Of AdamW."""
    ema_decay: float = 0.98
    """Decay of the averaged weights, which are what is measured and saved."""
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    """adamw8bit keeps both moments in a byte each; it needs bitsandbytes."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: slower, far less memory."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of training; bf16 is autocast over float32 weights."""
    save_dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Of the saved transformer."""
    tensorboard: bool = False
    """Curves and images for TensorBoard, too, in OUTPUT/tensorboard."""
    device: str | None = None
    """Default: cuda if there is one, else cpu."""

    watch_every: int = 50
    """Training steps between measurements of the student, by which the best weights are kept; 0: the last are the result."""
    watch_images: int = 100
    """Images of each such measurement, from other noise than those of the report."""
    patience: int | None = None
    """Stop after so many measurements in a row without a better one."""
    evaluate_images: int = 200
    """Images of teacher and student to measure in the end; 0 skips it."""
    sampling: Sampling = field(default_factory=SamplingOptions)
    """How the teacher is sampled, and with which guidance it teaches."""
    options: Annotated[MethodOptions, tyro.conf.arg(name="")] = field(default_factory=MethodOptions)

    def __post_init__(self) -> None:
        at_least(self, 1, "num_images", "image_steps", "training_steps", "batch", "micro_batches", "watch_images", "patience")
        at_least(self, 0, "watch_every", "evaluate_images")
        for name in ("learning_rate", "shift"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise UserError(f"--{name.replace('_', '-')} must be positive, got {value:g}")
        if not 0 <= self.ema_decay < 1:
            raise UserError(f"--ema-decay is at least 0 and less than 1, got {self.ema_decay:g}")
        if self.batch % self.micro_batches:
            raise UserError(f"a batch of {self.batch} cannot be cut into {self.micro_batches} equal parts: change --micro-batches")
        if self.patience is not None and not self.watch_every:
            raise UserError("--patience counts measurements: give --watch-every, too")
        if self.images and self.options.training_data == "pairs":
            raise UserError(f"{self.method} trains on pairs of noise and what the teacher draws from it: leave out --images")
        if self.images and self.options.training_data == "prompts":
            raise UserError(f"{self.method} with these options trains on prompts and no images: leave out --images, or give --prompts")
        self.options.resolved(self.steps, self.training_steps)

    def settings(self) -> dict[str, Any]:
        """What a run's results depend on, to tell it from others."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in ("output", "teacher_cache")}


TRAINING: dict[str, dict[str, Any]] = {
    "tdm": {"learning_rate": 5e-5, "betas": (0.0, 0.99), "training_steps": 100, "watch_every": 20},
    "dmd2": {"learning_rate": 5e-5, "betas": (0.0, 0.99)},
    "dmd": {"learning_rate": 1e-4, "betas": (0.0, 0.99)},
}
"""Defaults that a method has of its own, found on the emoji FLUX."""

# A critic that keeps up with its student.
FOLLOWED: dict[str, Any] = {"critic_learning_rate": 4e-4, "critic_updates": 2}
OPTION_DEFAULTS: dict[str, dict[str, Any]] = {"tdm": FOLLOWED, "dmd2": {**FOLLOWED, "critic_knows_step": True}}
"""Where the command departs from the paper: see docs/distillation.md for the evidence."""


def config_of(arguments: Sequence[str]) -> type[DistillConfig]:
    """The options that a command line may give: those of every method, and its own if it names one."""
    method = _named(arguments)
    if method not in OPTIONS:
        return DistillConfig
    options = OPTIONS[method]
    fields: list[tuple[str, Any, Any]] = [
        ("options", Annotated[options, tyro.conf.arg(name="")], field(default_factory=partial(options, **OPTION_DEFAULTS.get(method, {})))),
        *((name, DistillConfig.__annotations__[name], value) for name, value in TRAINING.get(method, {}).items()),
    ]
    namespace = {"__module__": __name__, "__doc__": f"{options.__doc__}\n\n{inspect.cleandoc(DistillConfig.__doc__ or '')}"}
    return dataclasses.make_dataclass("DistillConfig", fields, bases=(DistillConfig,), namespace=namespace, frozen=True, kw_only=True)


def _named(arguments: Sequence[str]) -> str | None:
    for position, argument in enumerate(arguments):
        if argument == "--method" and position + 1 < len(arguments):
            return arguments[position + 1]
        if argument.startswith("--method="):
            return argument.removeprefix("--method=")
    return None
