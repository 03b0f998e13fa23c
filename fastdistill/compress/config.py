"""The options of ``python -m fastdistill.compress``. Imports no torch, so that ``--help`` answers at once."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from fastdistill.compress.choice.budget import Budget, parse_budget
from fastdistill.errors import UserError
from fastdistill.run.options import Sampling, SamplingOptions, at_least

CriterionName = Literal["output", "trajectory", "greedy", "taylor", "bi", "mse", "cka", "probe", "learned", "random"]


@dataclass(frozen=True, kw_only=True)
class CompressConfig:
    """Make a FLUX pipeline smaller: score its transformer blocks, cut some out, and recover by knowledge distillation.

    Writes a stock diffusers pipeline to OUTPUT/model, with report.md, grid.png, compress.json and metrics.jsonl beside it. An
    interrupted run continues when the same command is given again.
    """

    drop_blocks: Annotated[tuple[str, ...], tyro.conf.arg(metavar="4 | double:1,2 single:0,5-7")] = ()
    """How many blocks to drop, or which ones. Either this or --budget."""
    budget: Annotated[str | None, tyro.conf.arg(metavar="params=0.66 | memory=8GiB | latency=0.7 | flops=0.8")] = None
    """What the transformer may cost at most, as a fraction of the full one or with a unit: parameters (K, M, B), memory of its weights
    as saved (MiB, GiB, MB, GB), measured latency (us, ms, s) or operations (G, T) of one forward pass."""
    dry_run: bool = False
    """Only say what the cut would give in parameters, bytes and operations. Needs no weights: --model may be a config.json."""
    model: str = "emoji"
    """A folder or hub id of a FLUX pipeline; "emoji" is the one that ships with this package."""
    output: Path | None = None
    """Folder to write to, new or empty; default runs/compress-<model>-<blocks>."""
    seed: int = 0
    """Seed of calibration, scores, recovery and evaluation."""

    criterion: CriterionName = "output"
    """What a block is worth. By what happens without it: the error of the output (output), of the end of a short sampling run
    (trajectory), or of the output, measured again after each drop (greedy), or that error to first order (taylor). By what it does to
    the image stream: how much it turns it (bi), how much it adds (mse), how unlike it becomes (cka), how badly a linear map stands
    for it (probe). By masks learned together with a small update of the weights, for how well the rest can recover (learned; --verify 1
    cuts just what they say). Or by chance (random). output and bi are always reported."""
    also_score: tuple[CriterionName, ...] = ()
    """Further criteria to report."""
    longest_run: int = 2
    """Longest run of neighbouring blocks whose joint error is measured, as a candidate beside the single blocks; 1: none. Only with the
    criterion output."""
    verify: int = 6
    """Of the best sets by the sum of scores, how many are tried by real forward passes; the best of these is cut."""
    latency_batch: int = 1
    """Images at once when latency is measured; it is measured at the size to sample at."""
    latency_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Of the weights when latency is measured; default: as the model is loaded, float32 on a CPU and bfloat16 on a GPU."""
    prompts: Path | None = None
    """Text file with one calibration prompt a line; default: the model's own prompts.txt, else a small general list."""
    images: Path | None = None
    """Folder of jpg, png or webp images to score and recover on instead of images that the full model draws, scaled and cropped to
    the size to sample at. Their captions are in .txt files of the same names, or there are none."""
    calibration_images: int = 400
    """Images sampled from the full model, or taken from --images at most, to score and recover on."""
    calibration_steps: int = 14
    """Sampling steps of each; fewer than for display, as the latents only have to be plausible."""
    calibration_points: int = 256
    """Points on those trajectories at which blocks are scored."""

    repair: Literal["ridge", "scale", "average", "none"] = "ridge"
    """How the cut is mended before any training, in closed form: the last layer ahead of each gap is fitted anew to the full model
    (ridge), or scaled (scale); or kept and dropped blocks are averaged (average)."""
    repair_points: int = 1024
    """Noised images that it is fitted to. Together they should have some thirty tokens for each input of that layer: 1024 for the
    emoji model, 256 for FLUX.1-dev at 512 pixels."""

    recovery_steps: int = 400
    """Recovery steps; 0 cuts only."""
    batch: int = 64
    """Samples per forward pass; 1 to 4 for a model of FLUX.1-dev's size."""
    learning_rate: float = 1e-3
    """Peak learning rate of AdamW; cosine decay to zero."""
    ema_decay: float = 0.98
    """Decay of the averaged weights, which are what is saved."""
    task_weight: float = 1.0
    """Weight of the flow-matching loss."""
    output_weight: float = 1.0
    """Weight of the error to the full model's output (OutKD)."""
    feature_weight: float = 0.1
    """Weight of the relative error to the full model's block outputs (FeatKD)."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: slower, far less memory."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of recovery; bf16 is autocast over float32 weights."""
    save_dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Of the saved transformer."""
    device: str | None = None
    """Default: cuda if there is one, else cpu."""

    evaluate_images: int = 200
    """Images of each of the three models to measure; 0 skips the measurement."""
    sampling: Sampling = field(default_factory=SamplingOptions)

    def __post_init__(self) -> None:
        if bool(self.drop_blocks) == bool(self.budget):
            raise UserError("give either --drop-blocks, such as 4 or double:1,2 single:0, or --budget, such as params=0.66")
        self.parsed_budget()
        at_least(
            self,
            1,
            "repair_points",
            "calibration_images",
            "calibration_steps",
            "calibration_points",
            "batch",
            "verify",
            "longest_run",
            "latency_batch",
        )
        at_least(self, 0, "recovery_steps", "evaluate_images", "task_weight", "output_weight", "feature_weight")
        if self.recovery_steps and not (self.task_weight or self.output_weight or self.feature_weight):
            raise UserError(
                "with --task-weight, --output-weight and --feature-weight all zero there is nothing to recover by; "
                "set one, or --recovery-steps 0"
            )

    def stages(self) -> tuple[str, ...]:
        """The models on the way, by what is done to them."""
        return ("full", "cut", *(["repaired"] if self.repair != "none" else []), *(["recovered"] if self.recovery_steps else []))

    def parsed_budget(self) -> Budget | None:
        return parse_budget(self.budget) if self.budget else None
