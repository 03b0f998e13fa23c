"""The options of `python -m fastdistill.compress`. Imports no torch, so that `--help` answers at
once."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from fastdistill.compress.choice.budget import Budget, parse_budget
from fastdistill.compress.importance import CRITERIA
from fastdistill.compress.repairs import REPAIRS
from fastdistill.errors import UserError, notice
from fastdistill.run.numbers import whole
from fastdistill.run.options import JobConfig, Run, RunOptions, at_least, check_known, flag

REPAIR_NAMES = (*REPAIRS, "none")
EVALUATE_IMAGES = 64
"""Images of each model to measure by default. With 200 a third of the time would go into measuring;
intervals and the row of a perfect sampler say what 64 can tell."""

if TYPE_CHECKING:
    CriterionName = str
    RepairName = str
else:
    CriterionName = Literal[tuple(CRITERIA)]
    RepairName = Literal[REPAIR_NAMES]


@dataclass(frozen=True, kw_only=True)
class CalibrationOptions:
    """Data that blocks are scored on and the cut model is recovered on."""

    calibration_images: int = 400
    """Images sampled from the full model, or taken from --images at most, to score and recover on."""
    calibration_steps: int = 14
    """Sampling steps of each image; fewer than for display, as the latents only have to be
    plausible."""
    calibration_points: int = 256
    """Points on the trajectories of these images at which blocks are scored."""

    def __post_init__(self) -> None:
        at_least(self, 1, "calibration_images", "calibration_steps", "calibration_points")


@dataclass(frozen=True, kw_only=True)
class ChoiceOptions:
    """Choice of the blocks to cut."""

    criterion: Annotated[
        CriterionName,
        tyro.conf.arg(help=f"What a block is worth; output and bi are always reported. {CRITERIA.explained()}."),
    ] = "output"
    also_score: tuple[CriterionName, ...] = ()
    """Further criteria to report."""
    longest_run: int = 2
    """Longest run of neighbouring blocks whose joint error is measured, as a candidate in addition
    to single blocks; 1: none. Only with the criterion output."""
    verify: int = 6
    """Number of best sets by the sum of scores that are tried by real forward passes; the best of
    these is cut."""
    latency_batch: int = 1
    """Images at once when latency is measured; it is measured at the size to sample at."""
    latency_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Type of the weights when latency is measured; default: as the model is loaded, float32 on a
    CPU and bfloat16 on a GPU."""

    def __post_init__(self) -> None:
        at_least(self, 1, "verify", "longest_run", "latency_batch")
        for name in (self.criterion, *self.also_score):
            check_known("criterion", name, CRITERIA)


@dataclass(frozen=True, kw_only=True)
class RepairOptions:
    """Repair of the cut model before any training."""

    repair: Annotated[RepairName, tyro.conf.arg(help=f"A repair in closed form, or none. {REPAIRS.explained()}.")] = (
        "ridge"
    )
    repair_points: int = 1024
    """Noised images that the repair is fitted to. They should have some thirty tokens for each
    input of the layer: 1024 images for the emoji model, 360 for FLUX.1-dev at 512 pixels, 100 at
    1024; a note says so where they have fewer."""

    def __post_init__(self) -> None:
        at_least(self, 1, "repair_points")
        check_known("repair", self.repair, REPAIR_NAMES)


@dataclass(frozen=True, kw_only=True)
class RecoveryOptions:
    """Training of the repaired model, to come closer to the full one."""

    recovery_steps: int = 400
    """Training steps; 0 cuts only."""
    task_weight: float = 1.0
    """Weight of the flow-matching loss."""
    output_weight: float = 1.0
    """Weight of the error to the full model's output (OutKD)."""
    feature_weight: float = 0.1
    """Weight of the relative error to the full model's block outputs (FeatKD)."""

    def __post_init__(self) -> None:
        at_least(self, 0, "recovery_steps", "task_weight", "output_weight", "feature_weight")
        if self.recovery_steps and not (self.task_weight or self.output_weight or self.feature_weight):
            raise UserError(
                "with --task-weight, --output-weight and --feature-weight all zero there is nothing to recover by; "
                "set one, or --recovery-steps 0"
            )


@dataclass(frozen=True, kw_only=True)
class CompressConfig(JobConfig):
    """Make a FLUX pipeline smaller: score its transformer blocks, cut some out, and recover by
    knowledge distillation.

    Writes a stock diffusers pipeline to OUTPUT/model, and report.md, grid.png, compress.json and
    metrics.jsonl to OUTPUT. An interrupted run continues when the same command is given again.
    """

    drop_blocks: Annotated[tuple[str, ...], tyro.conf.arg(metavar="4 | 2 4 6 | double:1,2 single:0,5-7")] = ()
    """Number of blocks to drop, or the blocks. Give either this or --budget. Several numbers make
    several models in one run, and a report that compares them."""
    budget: Annotated[
        tuple[str, ...], tyro.conf.arg(metavar="params=0.66 | memory=8GiB | latency=0.7 | flops=0.8 | several")
    ] = ()
    """Largest cost of the transformer, as a fraction of the full one or with a unit: parameters (K,
    M, B), memory of its weights as saved (MiB, GiB, MB, GB), measured latency (us, ms, s) or
    operations (G, T) of one forward pass. Several make several models, as for --drop-blocks."""
    run: Run = field(default_factory=partial(RunOptions, evaluate_images=EVALUATE_IMAGES))
    calibration: Annotated[CalibrationOptions, tyro.conf.OmitArgPrefixes] = field(default_factory=CalibrationOptions)
    choice: Annotated[ChoiceOptions, tyro.conf.OmitArgPrefixes] = field(default_factory=ChoiceOptions)
    repair: Annotated[RepairOptions, tyro.conf.OmitArgPrefixes] = field(default_factory=RepairOptions)
    recovery: Annotated[RecoveryOptions, tyro.conf.OmitArgPrefixes] = field(default_factory=RecoveryOptions)

    def __post_init__(self) -> None:
        for name in ("drop_blocks", "budget"):
            given = getattr(self, name)
            if given is None or isinstance(given, str):
                words = tuple((given or "").split())
            elif isinstance(given, Iterable):
                words = tuple(str(word) for word in given)
            else:
                words = (str(whole(flag(name), given)),)
            object.__setattr__(self, name, words)
        if bool(self.drop_blocks) == bool(self.budget):
            raise UserError(
                "give either --drop-blocks, such as 4 or double:1,2 single:0, or --budget, such as params=0.66"
            )
        for text in self.budget:
            parse_budget(text)
        if len(set(self.sizes)) < len(self.sizes):
            raise UserError(f"{self.asked} asks for the same size twice")

    @property
    def sizes(self) -> list[tuple[str, ...]]:
        """Words of each model that is asked for: a budget, a number, or the blocks of the only one."""
        if self.budget:
            return [(text,) for text in self.budget]
        return [(word,) for word in self.drop_blocks] if all(map(str.isdigit, self.drop_blocks)) else [self.drop_blocks]

    def of_size(self, words: tuple[str, ...], output: Path, cache: Path | None) -> CompressConfig:
        """Config of one of `sizes` alone, which writes to `output`."""
        run = replace(self.run, output=output, cache=cache)
        return replace(self, run=run, budget=words) if self.budget else replace(self, run=run, drop_blocks=words)

    @property
    def asked(self) -> str:
        """Size as it was asked for, `--drop-blocks 4` or `--budget params=0.66`."""
        return " ".join(["--budget", *self.budget] if self.budget else ["--drop-blocks", *self.drop_blocks])

    def idle(self) -> dict[str, str]:
        found: dict[str, str] = {}
        if not self.recovery.recovery_steps:
            training = tuple(asdict(self.training).keys() - {"batch"})
            found |= self.given("with --recovery-steps 0", "task_weight", "output_weight", "feature_weight", *training)
        if self.repair.repair == "none":
            found |= self.given("with --repair none", "repair_points")
        if not any(text.startswith("latency") for text in self.budget):
            found |= self.given("without a --budget of latency", "latency_batch", "latency_dtype")
        if any(":" in word for word in self.drop_blocks):
            found |= self.given("where --drop-blocks names the blocks", "longest_run", "verify")
        return found

    @property
    def name(self) -> str:
        asked = "-".join(self.drop_blocks or self.budget)
        return f"compress-{self.run.model_name}-{plain(asked)}"

    @property
    def image_count(self) -> int:
        return self.calibration.calibration_images

    def parsed_budget(self) -> Budget | None:
        """Budget of a config of one size."""
        return parse_budget(self.budget[0]) if self.budget else None


def plain(asked: str) -> str:
    """Words of a size as the name of a folder."""
    return asked.translate(str.maketrans("", "", ":="))


def tell_of_few_points(config: CompressConfig, needed: int) -> None:
    """Tell the user if a repair by least squares would be fitted to too few images."""
    given = config.repair.repair_points
    if config.repair.repair == "ridge" and given < needed:
        notice(
            f"--repair-points {given} may make the model worse: its layers have thirty tokens for each input "
            f"with {needed} or more"
        )
