"""Options that several commands share. Imports no torch, so that `--help` answers at once.

A group of options is a frozen dataclass that checks itself when it is made. A command has groups as
fields of its config, where `OmitArgPrefixes` gives each a box in `--help` and its flags no prefix.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from numbers import Integral, Real
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, ClassVar, Literal, get_args, get_type_hints

import tyro

from fastdistill.errors import UserError
from fastdistill.run.resources import require_writable


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """Sampling, where it should differ from the model's fastdistill.json; without that file, from
    FLUX.1-dev's defaults."""

    num_inference_steps: int | None = None
    """Sampling steps."""
    true_cfg_scale: float | None = None
    """Classifier-free guidance with the empty prompt; 1 is off."""
    guidance_scale: float | None = None
    """Embedded guidance of a guidance-distilled model; other models ignore it."""
    height: int | None = None
    """Pixels."""
    width: int | None = None
    """Pixels."""
    max_sequence_length: int | None = None
    """T5 tokens."""

    def __post_init__(self) -> None:
        at_least(self, 1, "num_inference_steps", "height", "width", "max_sequence_length")
        at_least(self, 1, "true_cfg_scale")
        at_least(self, 0, "guidance_scale")


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Input and output of the run."""

    dry_run: bool = False
    """Only print what is planned. Needs no weights: --model may be a config.json."""
    model: str = "emoji"
    """A folder or hub id of a FLUX pipeline; "emoji" is the one that ships with this package."""
    output: Path | None = None
    """Folder to write to, new or empty; default: a folder in runs/, named after the command, the
    model and what is asked for."""
    seed: int = 0
    """Seed of everything that is random: calibration, training and evaluation."""
    prompts: Path | None = None
    """Text file with one prompt a line; default: the model's own prompts.txt, else a small general
    list."""
    images: Path | None = None
    """Folder of images to use instead of images that the model draws, scaled and cropped to the
    size to sample at. Their captions are in .txt files of the same names, or in a metadata.jsonl or
    metadata.csv, or there are none; docs/images.md lists all that is read."""
    evaluate_images: int = 200
    """Images of each model to measure, at least those of the grid; 0 skips the measurement."""
    save_dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Type of the saved transformer's weights."""
    device: str | None = None
    """Default: cuda if there is one, else cpu."""
    cache: Path | None = None
    """Folder of results that other runs can use: what the full model drew and how it was measured;
    "none" keeps nothing for other runs. Default: $XDG_CACHE_HOME/fastdistill, or
    ~/.cache/fastdistill."""
    cache_gib: float = 20
    """Size in GiB above which the results in --cache that were not used for the longest time are
    removed."""

    def __post_init__(self) -> None:
        for name in ("output", "prompts", "images", "cache"):
            if isinstance(value := getattr(self, name), str):
                object.__setattr__(self, name, Path(value))
        at_least(self, 0, "evaluate_images", "cache_gib")
        check_seeds(self, "seed")
        check_choice(self, "save_dtype")
        if not self.model:
            raise UserError('--model is empty; give a folder or hub id of a FLUX pipeline, or "emoji"')

    @property
    def model_name(self) -> str:
        """Name of the model in the default output folder: that of its folder, or the end of its hub
        id."""
        path = Path(self.model)
        return (path.resolve() if path.exists() else path).name or "model"


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """Training of the student."""

    batch: int = 64
    """Samples of an update, and images at once wherever else a network runs; 1 to 4 for a model of
    FLUX.1-dev's size."""
    micro_batches: int = 1
    """Equal parts of a training batch that are in memory one at a time."""
    learning_rate: float = 1e-3
    """Peak learning rate of AdamW; cosine decay to zero."""
    betas: tuple[float, float] = (0.9, 0.99)
    """Decay of AdamW's two moments."""
    ema_decay: float = 0.98
    """Decay of the averaged weights, which are what is measured and saved."""
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    """adamw8bit keeps both moments in a byte each; it needs bitsandbytes."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: slower, far less memory."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of training; bf16 is autocast over float32 weights."""
    checkpoint_every: int = 100
    """Training steps between checkpoints, from which a killed run continues."""
    checkpoint_minutes: float = 10
    """Minutes after which a checkpoint is written, too, whatever the step; 0: by steps alone."""
    tensorboard: bool = False
    """Write curves and images for TensorBoard, too, to OUTPUT/tensorboard."""

    def __post_init__(self) -> None:
        at_least(self, 1, "batch", "micro_batches", "checkpoint_every")
        at_least(self, 0, "checkpoint_minutes")
        if self.batch % self.micro_batches:
            raise UserError(
                f"a batch of {self.batch} cannot be cut into {self.micro_batches} equal parts: change --micro-batches"
            )
        positive(self, "learning_rate")
        decay(self, "betas", "ema_decay")
        check_choice(self, "optimizer", "precision")


Sampling = Annotated[SamplingOptions, tyro.conf.OmitArgPrefixes]
Run = Annotated[RunOptions, tyro.conf.OmitArgPrefixes]
Training = Annotated[TrainingOptions, tyro.conf.OmitArgPrefixes]


@dataclass(frozen=True, kw_only=True)
class JobConfig(ABC):
    """Options of a job: a command that trains, writes a pipeline and a report, and goes on after an
    interruption.

    A command adds its own, and gives a group other defaults by redeclaring its field:

        training: Training = field(default_factory=partial(TrainingOptions, learning_rate=5e-4))
    """

    run: Run = field(default_factory=RunOptions)
    training: Training = field(default_factory=TrainingOptions)
    sampling: Sampling = field(default_factory=SamplingOptions)

    results_do_not_depend_on: ClassVar[tuple[str, ...]] = (
        "output",
        "cache",
        "cache_gib",
        "model",
        "prompts",
        "images",
        "checkpoint_every",
        "checkpoint_minutes",
        "tensorboard",
    )
    """Options that an interrupted run may be continued with other values of. Paths are among them,
    as what lies there is compared by its content (`Job.inputs`)."""

    more: ClassVar[str | None] = None
    """Option with a larger value of which a finished run is trained on."""

    @property
    @abstractmethod
    def name(self) -> str:
        """Name of the default output folder in `runs/`."""

    @property
    @abstractmethod
    def image_count(self) -> int:
        """Number of images that are taken from `--images` at most."""

    def idle(self) -> dict[str, str]:
        """Options that were given and do nothing next to the others, each with the reason."""
        return {}

    def given(self, reason: str, *names: str) -> dict[str, str]:
        """Options of `names` that differ from their defaults, each with the `reason`."""
        factories = {each.name: each.default_factory for each in fields(self)}
        default = flat({name: asdict(make()) for name, make in factories.items() if make is not MISSING})
        flags = self.flags()
        return {name: reason for name in names if flags[name] != default.get(name)}

    def flags(self) -> dict[str, Any]:
        """Every option by its name, whatever group it is in."""
        return flat(asdict(self))

    def settings(self) -> dict[str, Any]:
        """The options that results depend on."""
        return {name: value for name, value in self.flags().items() if name not in self.results_do_not_depend_on}


def flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings with those of every group among the others."""
    result: dict[str, Any] = {}
    for name, value in settings.items():
        result |= flat(value) if isinstance(value, Mapping) else {name: value}
    return result


def at_least(options: object, least: float, *names: str) -> None:
    """Raise `UserError` for an option of `names` that is given and less than `least`, or not
    finite."""
    for name, value in _numbers(options, names):
        if value < least:
            raise UserError(f"{flag(name)} must be at least {least:g}, got {value}")


def positive(options: object, *names: str) -> None:
    """Raise `UserError` for an option of `names` that is given and not above zero, or not finite."""
    for name, value in _numbers(options, names):
        if value <= 0:
            raise UserError(f"{flag(name)} must be positive, got {value:g}")


def decay(options: object, *names: str) -> None:
    """Raise `UserError` for an option of `names` that is given and no decay of a moving average, in
    [0, 1)."""
    for name, value in _numbers(options, names):
        if not 0 <= value < 1:
            raise UserError(f"{flag(name)} must be at least 0 and less than 1, got {value:g}")


def check_seeds(options: object, *names: str) -> None:
    """Raise `UserError` for a seed that no generator takes."""
    at_least(options, 0, *names)
    for name, value in _numbers(options, names):
        if value >= 2**32:
            raise UserError(f"{flag(name)} must be less than 2^32, got {value}")


def check_choice(options: object, *names: str) -> None:
    """Raise `UserError` for an option of `names` that is none of its literals, as from Python."""
    for name in names:
        known, value = get_args(get_type_hints(type(options))[name]), getattr(options, name)
        if value not in known:
            raise UserError(f"{flag(name)} is one of {', '.join(known)}, got {value!r}")


def check_known(kind: str, name: str, known: Iterable[str]) -> None:
    """Raise `UserError` if a plug-in is named that is not among the `known` ones of its kind."""
    if name not in (names := list(known)):
        raise UserError(f"there is no {kind} {name!r}; there are {', '.join(names)}")


def flag(name: str) -> str:
    """Flag of the option `name`, such as `--learning-rate`."""
    return f"--{name.replace('_', '-')}"


def _numbers(options: object, names: tuple[str, ...]) -> Iterator[tuple[str, float]]:
    """Every number that is given for `names`.

    Raises:
        UserError: a value is no number of the annotated type, or infinite or NaN, which every
            comparison would let pass.
    """
    hints = get_type_hints(type(options))
    for name in names:
        value, kinds = getattr(options, name), _kinds(hints[name])
        for number in value if isinstance(value, tuple) else (value,):
            if number is None and NoneType in kinds:
                continue
            kind, words = (Real, "a number") if float in kinds else (Integral, "a whole number")
            is_number = isinstance(number, kind) and not isinstance(number, bool)
            if not is_number:
                raise UserError(f"{flag(name)} must be {words}, got {number!r}")
            if not math.isfinite(number):
                raise UserError(f"{flag(name)} must be a finite number, got {number}")
            yield name, number


def _kinds(hint: Any) -> set[Any]:
    """A type with the types that it is made of, such as a float within a tuple or None."""
    return {hint}.union(*(_kinds(part) for part in get_args(hint)))


def check_output(path: Path, overwrite: bool) -> None:
    """Raise `UserError` if `path` cannot be written, before the work for it begins."""
    if path.exists() and not overwrite:
        raise UserError(f"{path} exists; choose another --output, or give --overwrite")
    if path.is_dir():
        raise UserError(f"{path} is a folder; give --output the name of a file")
    if not path.parent.is_dir():
        raise UserError(f"there is no folder {path.parent} for --output")
    require_writable(path.parent)
