"""The options of `python -m fastdistill.distill`, some of them of one method. Imports no torch, so
that `--help` answers at once."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import tyro

from fastdistill.distill.methods import METHODS
from fastdistill.distill.options import MethodOptions
from fastdistill.errors import UserError
from fastdistill.run.options import JobConfig, TrainingOptions, at_least, check_known, positive

if TYPE_CHECKING:
    MethodName = str
else:
    MethodName = Literal[tuple(METHODS)]

REFERENCE_WIDTH = 128
"""Width of the tokens of the emoji FLUX, for which learning rates are stated."""


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """Data that the student is trained on."""

    num_images: int = 1024
    """Images that the teacher draws to train on, or that are taken from --images at most."""
    image_steps: int | None = None
    """Sampling steps of each image; default: those of the teacher."""
    teacher_cache: Path | None = None
    """Folder for what the teacher draws and how it is measured, where other runs with the same
    teacher, prompts and seed find it; default: with the run, until that is finished."""

    def __post_init__(self) -> None:
        at_least(self, 1, "num_images", "image_steps")


@dataclass(frozen=True, kw_only=True)
class StudentTrainingOptions(TrainingOptions):
    """Training of the student."""

    training_steps: int = 300
    """Updates; in tdm and dmd2 updates of the critic, of which the student has one in
    --critic-updates."""
    learning_rate: float = 5e-4
    """Peak learning rate of AdamW for a model of the emoji FLUX's width, 128; a wider one gets as
    much less as it is wider (Yang et al. 2022, muP). Cosine decay to zero."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "training_steps")


@dataclass(frozen=True, kw_only=True)
class WatchOptions:
    """Measurements of the student in training, by which the best weights are kept."""

    watch_every: int = 50
    """Training steps between measurements of the student; 0: none, and the last weights are the
    result."""
    watch_images: int = 100
    """Images of each such measurement, from other noise than those of the report."""
    patience: int | None = None
    """Stop after so many measurements in a row without a better one."""

    def __post_init__(self) -> None:
        at_least(self, 0, "watch_every")
        at_least(self, 1, "watch_images", "patience")
        if self.patience is not None and not self.watch_every:
            raise UserError("--patience counts measurements: give --watch-every, too")


@dataclass(frozen=True, kw_only=True)
class DistillConfig(JobConfig):
    """Teach a student to draw in few steps what its teacher draws in many. Every method has options
    of its own: --method NAME --help.

    Writes a stock diffusers pipeline to OUTPUT/model, and report.md, grid.png, curves.png,
    distill.json, metrics.jsonl and samples/ to OUTPUT. An interrupted run continues when the same
    command is given again.
    """

    method: Annotated[MethodName, tyro.conf.arg(help=f"What the student learns. {METHODS.explained()}.")]
    steps: int
    """Sampling steps of the student."""
    student: str | None = None
    """A pipeline whose transformer the student starts from, such as a smaller one that
    fastdistill.compress made; default: the teacher."""
    shift: float | None = None
    """Moves the student's times towards noise if above 1; default: the shift of the teacher's
    scheduler, of a dynamic one at the size to sample at."""

    data: Annotated[DataOptions, tyro.conf.OmitArgPrefixes] = field(default_factory=DataOptions)
    training: Annotated[StudentTrainingOptions, tyro.conf.OmitArgPrefixes] = field(
        default_factory=StudentTrainingOptions
    )
    watch: Annotated[WatchOptions, tyro.conf.OmitArgPrefixes] = field(default_factory=WatchOptions)
    options: Annotated[MethodOptions, tyro.conf.OmitArgPrefixes] = field(default_factory=MethodOptions)
    """Options of the method. From Python begin with `config_for`, which knows their class and their
    defaults."""

    results_do_not_depend_on: ClassVar[tuple[str, ...]] = (
        *JobConfig.results_do_not_depend_on,
        "teacher_cache",
        "student",
    )

    more: ClassVar[str | None] = "training_steps"

    def __post_init__(self) -> None:
        check_known("method", self.method, METHODS)
        wanted = METHODS[self.method].Options
        if not isinstance(self.options, wanted):
            raise UserError(
                f"{self.method} takes options of its own: give options={wanted.__name__}(...), "
                f"or begin with config_for({self.method!r})"
            )
        positive(self, "shift")
        if self.run.images and self.options.training_data == "pairs":
            raise UserError(
                f"{self.method} trains on pairs of noise and what the teacher draws from it: leave out --images"
            )
        if self.run.images and self.options.training_data == "prompts":
            raise UserError(f"{self.method} with these options trains on prompts and no images: leave out --images")
        self.options.resolved(self.steps, self.training.training_steps)

    def idle(self) -> dict[str, str]:
        found: dict[str, str] = {}
        for reason, names in self.options.idle().items():
            found |= self.given(reason, *names)
        data = ("num_images", "image_steps", "teacher_cache")
        if self.options.training_data == "prompts":
            found |= self.given(f"with {self.method}, which with these options trains on prompts alone", *data)
        elif self.run.images:
            found |= self.given("with --images", *data[1:])
        if not self.watch.watch_every:
            found |= self.given("without --watch-every", "watch_images")
        return found

    @property
    def name(self) -> str:
        return f"distill-{self.run.model_name}-{self.method}-{self.steps}"

    @property
    def image_count(self) -> int:
        return self.data.num_images


def config_of(arguments: Sequence[str]) -> type[DistillConfig]:
    """Options that a command line may give: those of every method, and its own if it names one."""
    name = _named(arguments)
    return DistillConfig if name is None or name not in METHODS else config_for(name)


@cache
def config_for(name: str) -> type[DistillConfig]:
    """Config with the options of the method `name`, and with its defaults.

        FewStepStudent(config_for("tdm")(steps=4)).run()

    A group of options that is given replaces the method's defaults in that group.

    Raises:
        UserError: there is no such method.
    """
    check_known("method", name, METHODS)
    method = METHODS[name]
    groups: dict[str, type] = {"training": StudentTrainingOptions, "watch": WatchOptions, "options": method.Options}
    fields: list[tuple[str, Any, Any]] = [
        (
            group,
            Annotated[options, tyro.conf.OmitArgPrefixes],
            field(default_factory=_with_defaults(options, method.command_defaults)),
        )
        for group, options in groups.items()
    ]
    fields.append(("method", DistillConfig.__annotations__["method"], field(default=name)))
    described = f"{method.Options.__doc__}\n\n{inspect.cleandoc(DistillConfig.__doc__ or '')}"
    namespace = {"__module__": __name__, "__doc__": described}
    return dataclasses.make_dataclass(
        "DistillConfig", fields, bases=(DistillConfig,), namespace=namespace, frozen=True, kw_only=True
    )


def _with_defaults(options: Any, defaults: Any) -> Callable[[], Any]:
    """Constructor of a group of options with those of `defaults` that are in the group."""
    own = {each.name for each in dataclasses.fields(options)}
    return partial(options, **{name: value for name, value in defaults.items() if name in own})


def _named(arguments: Sequence[str]) -> str | None:
    for position, argument in enumerate(arguments):
        if argument == "--method" and position + 1 < len(arguments):
            return arguments[position + 1]
        if argument.startswith("--method="):
            return argument.removeprefix("--method=")
    return None
