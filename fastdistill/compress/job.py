"""The compression of one pipeline from end to end: calibrate, score, choose, cut, repair, recover, measure, write."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from fastdistill.compress.choice.budget import show
from fastdistill.compress.choice.choose import Request, Selection, choose, limit_of, parse, spell
from fastdistill.compress.choice.costs import Cost, Costs, flops, latency, sizes, workload
from fastdistill.compress.choice.solve import Interval
from fastdistill.compress.choice.verify import best_of, intervals
from fastdistill.compress.config import CompressConfig
from fastdistill.compress.importance.calibrate import Calibration, calibrate
from fastdistill.compress.importance.scoring import Scorer
from fastdistill.compress.recovery import Recovery, RecoveryWeights
from fastdistill.compress.repairs import REPAIRS
from fastdistill.compress.repairs.damage import Damage
from fastdistill.compress.surgery import check, check_count
from fastdistill.data.images import Captioned
from fastdistill.errors import UserError
from fastdistill.models.blocks import block_ids, tied
from fastdistill.models.families import family_of
from fastdistill.models.families.family import BlockId, Family
from fastdistill.models.patch import patched
from fastdistill.models.sampling import SamplingDefaults
from fastdistill.models.saving import save, swapped
from fastdistill.run.files import atomic_write
from fastdistill.run.progress import bar, share_bar
from fastdistill.run.resources import require_disk, require_memory
from fastdistill.run.workspace import Workspace
from fastdistill.train.config import TrainConfig
from fastdistill.train.trainer import Trainer

Evaluate = Callable[[Any, str], dict[str, Any]]
"""``(pipeline, name) -> measurements``, a JSON object."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a finished run knows; the manifest and the report are made from it."""

    family: Family
    blocks: list[BlockId]
    selection: Selection
    costs: Costs
    latency_after: int | None
    """Nanoseconds of one forward pass of the cut model, if a latency budget had it measured."""
    boundaries: dict[BlockId, BlockId]
    scores: dict[str, dict[BlockId, float]]
    output_errors: dict[str, float]
    """Of the cut, the repaired and the recovered model, relative. The sum of the single errors would predict the first if they added up."""
    parameters: dict[str, int]
    evaluation: dict[str, dict[str, Any]]
    seconds: dict[str, float]


def validate(config: CompressConfig, pipeline: Any, output: Path) -> Request:
    """What ``--drop-blocks`` or ``--budget`` asks of this pipeline.

    Raises:
        UserError: it cannot be met, as far as that is known before anything is measured, or the disk of ``output`` or the memory would not
            suffice.
    """
    transformer = pipeline.transformer
    family = family_of(transformer)
    budget = config.parsed_budget()
    blocks = block_ids(transformer, family)
    size = transformer.num_parameters()
    if budget is None:
        request = parse(config.drop_blocks, family)
        drops = len(request.blocks) if request.count is None else request.count
        check(transformer, family, request.blocks)
        check_count(drops, len(blocks))
        left = size * (len(blocks) - drops) // len(blocks)
    else:
        request = Request(budget=budget)
        static = sizes(transformer, family, _save_dtype(config).itemsize)
        # Of operations and time nothing is known yet: the blocks that go for them may be the small ones.
        left = size
        if budget.quantity in static:
            left = size * limit_of(budget, static[budget.quantity]) // static[budget.quantity].total
    # float32 weights, two Adam moments and their average, twice while a checkpoint replaces the last one, the repaired model, the result.
    require_disk(output, size * 4 * (9 if config.recovery_steps else 2))
    if config.recovery_steps:
        what = "recovery, beside the full model (float32 weights, gradients, two Adam moments and averaged weights),"
        require_memory(pipeline.device, left * 20, what, "drop more blocks, or give --recovery-steps 0 to cut without recovery")
    return request


def compress(
    config: CompressConfig,
    pipeline: Any,
    prompts: Sequence[str],
    images: Sequence[Captioned],
    sampling: SamplingDefaults,
    workspace: Workspace,
    evaluate: Evaluate,
    console: Console,
) -> Outcome:
    """Run every stage, or read it from the workspace if an interrupted run has finished it. Leaves the pipeline as it was.

    Raises:
        UserError: :func:`validate` does, or the costs that are measured first show that a budget cannot be met.
    """
    request = validate(config, pipeline, workspace.output)
    teacher = pipeline.transformer
    teacher.requires_grad_(False)
    family = family_of(teacher)
    blocks = block_ids(teacher, family)
    clock = workspace.clock

    with clock("costs"):
        costs = _costs(config, request, pipeline, family, sampling, workspace)
    if request.budget:
        try:
            limit_of(request.budget, costs[request.budget.quantity])
        except UserError:
            # Nothing has been done yet, and another budget should find the folder free.
            workspace.finish()
            raise
    with clock("calibrate"), patched(teacher):
        calibration = _calibrate(config, pipeline, family, prompts, images, sampling, workspace, console)
    drops = len(request.blocks) if request.count is None else request.count
    scorer = Scorer(teacher, family, calibration, batch=config.batch, seed=config.seed, drops=drops, console=console)
    with clock("score"):
        scores = _scores(config, scorer, workspace)
        selection = _select(config, request, costs, scorer, scores, workspace, console)
    dropped = selection.dropped
    errors = {"cut": best_of(selection.verified).joint}
    console.print(f"dropping {spell(dropped, family)}: output error {errors['cut']:.3f}")

    damage = Damage.by_cutting(
        teacher, family, dropped, pool=calibration.pool, points=config.repair_points, batch=config.batch, seed=config.seed
    )
    student = damage.student
    latency_after = None
    if "latency" in costs:
        with clock("costs"):
            latency_after = workspace.cached("latency-after", lambda: _latency(config, student, pipeline, family, sampling).total)
        if latency_after > selection.limit:
            console.print(
                f"the cut model takes {show('latency', latency_after)} where its blocks promised {show('latency', selection.limit)} at "
                "most: they were timed one by one, and times vary; ask for a little less to be sure"
            )
    evaluation = {}
    with clock("evaluate"):
        evaluation["full"] = workspace.cached("evaluation-full", lambda: evaluate(pipeline, "full"))
        with swapped(pipeline, student):
            evaluation["cut"] = workspace.cached("evaluation-cut", lambda: evaluate(pipeline, "cut"))
    if config.repair != "none":
        with clock("repair"):
            _repair(config, damage, workspace.work / "repaired.safetensors", console)
            errors["repaired"] = workspace.cached("error-repaired", lambda: scorer.output_error(student))
        console.print(f"repaired by {config.repair}: output error {errors['repaired']:.3f}")
        with clock("evaluate"), swapped(pipeline, student):
            evaluation["repaired"] = workspace.cached("evaluation-repaired", lambda: evaluate(pipeline, "repaired"))
    if config.recovery_steps:
        with clock("recover"):
            _recover(config, damage, workspace.work / "recovery")
    student.to(_save_dtype(config))
    save(pipeline, student, workspace.output / "model", sampling, prompts)
    saved = sum(parameter.numel() for parameter in student.parameters())
    if config.recovery_steps:
        student.to(teacher.dtype)
        errors["recovered"] = workspace.cached("error-recovered", lambda: scorer.output_error(student))
        console.print(f"recovered: output error {errors['recovered']:.3f}")
        with clock("evaluate"), swapped(pipeline, student):
            evaluation["recovered"] = workspace.cached("evaluation-recovered", lambda: evaluate(pipeline, "recovered"))
        shutil.copy(workspace.work / "recovery" / "metrics.jsonl", workspace.output / "metrics.jsonl")
    return Outcome(
        family=family,
        blocks=blocks,
        selection=selection,
        costs=costs,
        latency_after=latency_after,
        boundaries=dict(damage.boundaries),
        scores=scores,
        output_errors=errors,
        parameters={"full": teacher.num_parameters(), "compressed": saved},
        evaluation=evaluation,
        seconds=workspace.seconds,
    )


def _calibrate(
    config: CompressConfig,
    pipeline: Any,
    family: Family,
    prompts: Sequence[str],
    images: Sequence[Captioned],
    sampling: SamplingDefaults,
    workspace: Workspace,
    console: Console,
) -> Calibration:
    with bar(console, "calibrate", len(images) or config.calibration_images) as tick:
        return calibrate(
            pipeline,
            family,
            prompts,
            sampling,
            count=config.calibration_images,
            steps=config.calibration_steps,
            points=config.calibration_points,
            batch=config.batch,
            seed=config.seed,
            images=images,
            cache=workspace.work / "calibration.safetensors",
            tick=tick,
        )


def _scores(config: CompressConfig, scorer: Scorer, workspace: Workspace) -> dict[str, dict[BlockId, float]]:
    """Of ``output`` and ``bi``, which every report has, of the criterion that chooses, and of those asked for."""

    def score(criterion: str) -> list[float]:
        return list(scorer.score(criterion, workspace.work / f"scores-{criterion}.jsonl").values())

    names = dict.fromkeys(["output", "bi", config.criterion, *config.also_score])
    values = {name: workspace.cached(f"scores-{name}", partial(score, name)) for name in names}
    return {name: dict(zip(scorer.blocks, values[name], strict=True)) for name in names}


def _costs(
    config: CompressConfig, request: Request, pipeline: Any, family: Family, sampling: SamplingDefaults, workspace: Workspace
) -> Costs:
    """Of every quantity; latency is measured only for a budget of it."""
    teacher = pipeline.transformer
    blocks = block_ids(teacher, family)
    costs = sizes(teacher, family, _save_dtype(config).itemsize)
    costs["flops"] = flops(teacher, family, workload(sampling, pipeline.vae_scale_factor))
    if request.budget and request.budget.quantity == "latency":

        def measure() -> list[int]:
            cost = _latency(config, teacher, pipeline, family, sampling)
            return [cost.outside, *cost.blocks.values()]

        # Kept: another measurement would be another problem, and the continued run would choose other blocks.
        outside, *times = workspace.cached("latency", measure)
        costs["latency"] = Cost(blocks=dict(zip(blocks, times, strict=True)), outside=outside)
    return costs


def _latency(config: CompressConfig, transformer: Any, pipeline: Any, family: Family, sampling: SamplingDefaults) -> Cost:
    """Of the stock model, which is what is saved."""
    dtype = getattr(torch, config.latency_dtype) if config.latency_dtype else None
    return latency(transformer, family, workload(sampling, pipeline.vae_scale_factor, config.latency_batch), dtype)


def _select(
    config: CompressConfig,
    request: Request,
    costs: Costs,
    scorer: Scorer,
    scores: dict[str, dict[BlockId, float]],
    workspace: Workspace,
    console: Console,
) -> Selection:
    def joint(positions: Sequence[int]) -> float:
        dropped = [scorer.blocks[position] for position in positions]
        name = f"joint-{sum(1 << position for position in positions):x}"
        return float(workspace.cached(name, lambda: scorer.joint_error(dropped)))

    runs: dict[Interval, float] | None = None
    if config.criterion == "output" and not request.blocks and config.longest_run > 1:
        found = list(intervals(len(scorer.blocks), config.longest_run))
        with bar(console, "score runs", len(found)) as advance:
            runs = {}
            for first, last in found:
                runs[first, last] = joint(range(first, last + 1))
                advance(1)
    return choose(
        request,
        costs,
        scores[config.criterion],
        output_errors=scores["output"],
        joint=joint,
        intervals=runs,
        best=config.verify,
        tied=tied(scorer.network, scorer.family),
    )


def _repair(config: CompressConfig, damage: Damage, cache: Path, console: Console) -> None:
    """Mend the student in place, or read what an interrupted run made of it from ``cache``."""
    if not cache.exists():
        with share_bar(console, "repair") as tick, patched(damage.teacher):
            REPAIRS[config.repair](dataclasses.replace(damage, tick=tick))
        with atomic_write(cache) as unfinished:
            save_file(damage.student.state_dict(), unfinished)
    damage.student.load_state_dict(load_file(cache))


def _recover(config: CompressConfig, damage: Damage, run: Path) -> None:
    """Train the student in place; it ends with the averaged weights."""
    student: Any = damage.student.float().train()
    if config.gradient_checkpointing:
        student.enable_gradient_checkpointing()
    weights = RecoveryWeights(task=config.task_weight, out=config.output_weight, feat=config.feature_weight)
    train = TrainConfig(
        steps=config.recovery_steps,
        learning_rate=config.learning_rate,
        warmup_steps=min(20, config.recovery_steps),
        ema_decay=config.ema_decay,
        precision=config.precision,
        seed=config.seed,
        log_every=10,
        checkpoint_every=100,
    )
    method = Recovery(student, damage.teacher, damage.family, damage.boundaries, weights)
    trainer = Trainer(method, lambda step, rng: damage.pool.batch(config.batch, rng), train, run)
    with patched(student), patched(damage.teacher):
        trainer.fit("recover")
    trainer.emas["student"].copy_to(student)
    student.eval()


def _save_dtype(config: CompressConfig) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, config.save_dtype)
    return dtype
