"""The compression of one pipeline from end to end: calibrate, score, choose, cut, recover, measure, write."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from fastdistill.compress.calibrate import Calibration, calibrate
from fastdistill.compress.config import CompressConfig
from fastdistill.compress.importance import CRITERIA
from fastdistill.compress.importance.criterion import Material
from fastdistill.compress.importance.ledger import Ledger
from fastdistill.compress.importance.output_error import joint_output_error, predictions
from fastdistill.compress.recovery import Recovery, RecoveryWeights
from fastdistill.compress.resources import require_disk, require_memory
from fastdistill.compress.select import Request, choose, parse, spell
from fastdistill.compress.surgery import boundary_map, check, cut
from fastdistill.compress.workspace import Workspace
from fastdistill.models.family import BlockId, Family
from fastdistill.models.features import block_ids
from fastdistill.models.patch import patched
from fastdistill.models.registry import family_of
from fastdistill.models.sampling import SamplingDefaults
from fastdistill.progress import bar
from fastdistill.train.trainer import TrainConfig, Trainer

Evaluate = Callable[[Any, str], dict[str, Any]]
"""``(pipeline, name) -> measurements``, a JSON object."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a finished run knows; the manifest and the report are made from it."""

    family: Family
    blocks: list[BlockId]
    dropped: list[BlockId]
    boundaries: dict[BlockId, BlockId]
    scores: dict[str, dict[BlockId, float]]
    joint_error: float
    """The relative output error of the cut model before recovery; the sum of the single errors would predict it if they added up."""
    parameters: dict[str, int]
    evaluation: dict[str, dict[str, Any]]
    seconds: dict[str, float]


def validate(config: CompressConfig, pipeline: Any, output: Path) -> Request:
    """What ``--drop-blocks`` asks of this pipeline.

    Raises:
        UserError: it cannot be met, or the disk of ``output`` or the memory would not suffice.
    """
    transformer = pipeline.transformer
    family = family_of(transformer)
    request = parse(config.drop_blocks, family)
    blocks = block_ids(transformer, family)
    drops = request.blocks if request.count is None else blocks[: request.count]
    check(transformer, family, drops)
    size = transformer.num_parameters()
    # float32 weights, two Adam moments and their average, twice while a checkpoint replaces the last one, and the result.
    require_disk(output, size * 4 * (8 if config.steps else 2))
    if config.steps:
        require_memory(pipeline.device, size * (len(blocks) - len(drops)) // len(blocks) * 20)
    return request


def compress(
    config: CompressConfig,
    pipeline: Any,
    prompts: Sequence[str],
    sampling: SamplingDefaults,
    workspace: Workspace,
    evaluate: Evaluate,
    console: Console,
) -> Outcome:
    """Run every stage, or read it from the workspace if an interrupted run has finished it. Leaves the pipeline as it was.

    Raises:
        UserError: :func:`validate` does, before any long work.
    """
    request = validate(config, pipeline, workspace.output)
    teacher = pipeline.transformer
    teacher.requires_grad_(False)
    family = family_of(teacher)
    blocks = block_ids(teacher, family)
    clock = workspace.clock

    with clock("calibrate"), patched(teacher):
        calibration = _calibrate(config, pipeline, family, prompts, sampling, workspace, console)
    with clock("score"), patched(teacher):
        scores = _scores(config, teacher, family, calibration, request, workspace, console)
        dropped = choose(request, scores[config.criterion])
        joint_error = workspace.cached("joint_error", lambda: _joint_error(config, teacher, family, calibration, dropped))
    console.print(f"dropping {spell(dropped, family)}: output error {joint_error:.3f} before recovery")

    boundaries = boundary_map(blocks, dropped)
    student = cut(teacher, dropped)
    evaluation = {}
    with clock("evaluate"):
        evaluation["full"] = workspace.cached("evaluation-full", lambda: evaluate(pipeline, "full"))
        with _transformer(pipeline, student):
            evaluation["cut"] = workspace.cached("evaluation-cut", lambda: evaluate(pipeline, "cut"))
    if config.steps:
        with clock("recover"):
            _recover(config, student, teacher, family, boundaries, calibration, workspace.work / "recovery")
    student.to(getattr(torch, config.save_dtype))
    saved = _save(pipeline, student, workspace.output / "model", sampling, prompts)
    with clock("evaluate"), _transformer(pipeline, student.to(teacher.dtype)):
        evaluation["recovered"] = workspace.cached("evaluation-recovered", lambda: evaluate(pipeline, "recovered"))
    if config.steps:
        shutil.copy(workspace.work / "recovery" / "metrics.jsonl", workspace.output / "metrics.jsonl")
    return Outcome(
        family=family,
        blocks=blocks,
        dropped=dropped,
        boundaries=boundaries,
        scores=scores,
        joint_error=joint_error,
        parameters={"full": teacher.num_parameters(), "compressed": saved},
        evaluation=evaluation,
        seconds=workspace.seconds,
    )


def _calibrate(
    config: CompressConfig,
    pipeline: Any,
    family: Family,
    prompts: Sequence[str],
    sampling: SamplingDefaults,
    workspace: Workspace,
    console: Console,
) -> Calibration:
    with bar(console, "calibrate", config.calibration_pictures) as tick:
        return calibrate(
            pipeline,
            family,
            prompts,
            sampling,
            pictures=config.calibration_pictures,
            steps=config.calibration_steps,
            points=config.calibration_points,
            batch=config.batch,
            seed=config.seed,
            cache=workspace.work / "calibration.safetensors",
            tick=tick,
        )


def _scores(
    config: CompressConfig,
    teacher: nn.Module,
    family: Family,
    calibration: Calibration,
    request: Request,
    workspace: Workspace,
    console: Console,
) -> dict[str, dict[BlockId, float]]:
    """Of ``output`` and ``bi``, which every report has, of the criterion that chooses, and of those asked for."""
    blocks = block_ids(teacher, family)
    drops = len(request.blocks) if request.count is None else request.count
    material = Material(points=calibration.points, runs=calibration.runs, batch=config.batch, seed=config.seed, drops=drops)

    def score(criterion: str) -> list[float]:
        with bar(console, f"score by {criterion}", len(blocks)) as advance:
            shown = 0

            def tick(share: float) -> None:
                nonlocal shown
                reached = int(share * len(blocks))
                advance(reached - shown)
                shown = reached

            ledger = Ledger(workspace.work / f"scores-{criterion}.jsonl", tick)
            scores = CRITERIA[criterion](teacher, family, material, ledger)
        return [scores[block_id] for block_id in blocks]

    names = dict.fromkeys(["output", "bi", config.criterion, *config.also_score])
    values = {name: workspace.cached(f"scores-{name}", partial(score, name)) for name in names}
    return {name: dict(zip(blocks, values[name], strict=True)) for name in names}


def _joint_error(config: CompressConfig, teacher: nn.Module, family: Family, calibration: Calibration, dropped: Sequence[BlockId]) -> float:
    reference = predictions(teacher, family, calibration.points, config.batch)
    return joint_output_error(teacher, family, calibration.points, config.batch, dropped, reference)


def _recover(
    config: CompressConfig,
    student: Any,
    teacher: nn.Module,
    family: Family,
    boundaries: dict[BlockId, BlockId],
    calibration: Calibration,
    run: Path,
) -> None:
    """Train ``student`` in place; it ends with the averaged weights."""
    student.float().train()
    if config.gradient_checkpointing:
        student.enable_gradient_checkpointing()
    weights = RecoveryWeights(task=config.l_task, out=config.l_out, feat=config.l_feat)
    train = TrainConfig(
        steps=config.steps,
        learning_rate=config.learning_rate,
        warmup_steps=min(20, config.steps),
        ema_decay=config.ema_decay,
        precision=config.precision,
        seed=config.seed,
        log_every=10,
        checkpoint_every=100,
    )
    method = Recovery(student, teacher, family, boundaries, weights)
    trainer = Trainer(method, lambda step, rng: calibration.pool.batch(config.batch, rng), train, run)
    with patched(student), patched(teacher):
        trainer.fit("recover")
    trainer.emas["student"].copy_to(student)
    student.eval()


@contextmanager
def _transformer(pipeline: Any, transformer: nn.Module) -> Iterator[None]:
    """The pipeline with another transformer inside the block."""
    earlier, pipeline.transformer = pipeline.transformer, transformer
    try:
        yield
    finally:
        pipeline.transformer = earlier


def _save(pipeline: Any, student: Any, folder: Path, sampling: SamplingDefaults, prompts: Sequence[str]) -> int:
    """Write the stock pipeline whole or not at all; return the parameters of its transformer."""
    if not folder.exists():
        unfinished = folder.with_name(folder.name + ".partial")
        shutil.rmtree(unfinished, ignore_errors=True)
        with _transformer(pipeline, student):
            pipeline.save_pretrained(unfinished)
        sampling.save(unfinished)
        (unfinished / "prompts.txt").write_text("\n".join(prompts) + "\n", encoding="utf-8")
        unfinished.replace(folder)
    return int(student.num_parameters())
