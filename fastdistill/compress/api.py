"""``score``, ``select`` and ``repair`` for Python, around ``cut`` (:mod:`fastdistill.compress.surgery`).

Thin layers over what the command runs. The command also keeps every stage's result, so that a long run goes on after a kill.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from fastdistill.compress.choice.budget import parse_budget
from fastdistill.compress.choice.choose import Request, choose
from fastdistill.compress.choice.costs import flops, latency, sizes, workload
from fastdistill.compress.importance import CRITERIA
from fastdistill.compress.importance.calibrate import Calibration, calibrate
from fastdistill.compress.importance.scoring import Scorer
from fastdistill.compress.repairs import REPAIRS
from fastdistill.compress.repairs.damage import Damage
from fastdistill.compress.surgery import boundary_map, check, check_count, spelled_out
from fastdistill.data.images import read_folder
from fastdistill.errors import UserError
from fastdistill.models.blocks import block_ids, tied
from fastdistill.models.families import anatomy_of, family_of
from fastdistill.models.families.family import BlockId
from fastdistill.models.loading import GENERAL_PROMPTS
from fastdistill.models.patch import patched
from fastdistill.models.sampling import SamplingDefaults
from fastdistill.models.weights import check_computable, check_finite
from fastdistill.run.progress import bar


def scorer(
    pipeline: Any,
    prompts: Sequence[str] = GENERAL_PROMPTS,
    *,
    batch: int = 4,
    seed: int = 0,
    drop_blocks: int | None = None,
    console: Console | None = None,
    **options: Any,
) -> Scorer:
    """A calibration of ``pipeline`` to score by several criteria, ``.score("output")``, and to verify with, ``.joint_error(blocks)``.

    Args:
        drop_blocks: how many blocks are going to be dropped, which bounds the search of ``greedy``.
        options: of :func:`calibration`, which also says what is raised.
    """
    material = calibration(pipeline, prompts, batch=batch, seed=seed, console=console, **options)
    network = pipeline.transformer
    return Scorer(network, family_of(network), material, batch=batch, seed=seed, drops=drop_blocks, console=console)


def calibration(
    pipeline: Any,
    prompts: Sequence[str] = GENERAL_PROMPTS,
    *,
    images: str | Path | None = None,
    points: int = 64,
    steps: int = 14,
    batch: int = 4,
    seed: int = 0,
    console: Console | None = None,
    **call: Any,
) -> Calibration:
    """What the full model makes of ``prompts``, to score and to repair by.

    Args:
        pipeline: a diffusers pipeline of a family that can be scored; left as it is.
        prompts: to sample from; ``points`` images are drawn, in ``steps`` steps each.
        images: a folder of images to take instead, with their captions in ``.txt`` files beside them.
        points: at how many points blocks are scored; the command's 256 give steadier scores for four times the time.
        batch: samples per forward pass.
        console: a rich console to show progress on.
        call: arguments of the pipeline's call, such as ``height``; by default those in its folder's fastdistill.json, else FLUX.1-dev's.

    Raises:
        UserError: the family cannot be scored, weights are not finite or not of a type to compute with, or there is nothing to sample from.
    """
    network = getattr(pipeline, "transformer", None)
    if network is None:
        raise UserError(f"scoring needs the pipeline, which samples and encodes prompts, and got a {type(pipeline).__name__}")
    family = family_of(network)
    check_computable(network, type(network).__name__)
    check_finite(network, type(network).__name__)
    if isinstance(prompts, str) or not prompts:
        raise UserError("prompts must be a list of at least one")
    given = read_folder(Path(images), points) if images is not None else []
    folder = getattr(pipeline, "name_or_path", None)
    sampling = dataclasses.replace(SamplingDefaults.load(Path(folder)) if folder else SamplingDefaults(), **call)
    console = console or Console(quiet=True)
    with bar(console, "calibrate", len(given) or points) as tick, patched(network):
        return calibrate(
            pipeline,
            family,
            prompts,
            sampling,
            count=points,
            steps=steps,
            points=points,
            batch=batch,
            seed=seed,
            images=given,
            tick=tick,
        )


def score(pipeline: Any, prompts: Sequence[str] = GENERAL_PROMPTS, *, criterion: str = "output", **options: Any) -> dict[BlockId, float]:
    """What each block of the pipeline's transformer is worth, in the order of the forward pass; the lowest goes first.

    Args:
        criterion: one of those of ``python -m fastdistill.compress --criterion``.
        options: of :func:`scorer`, which also says what is raised.
    """
    if criterion not in CRITERIA:
        raise UserError(f"there is no criterion {criterion!r}; there are {', '.join(CRITERIA)}")
    return scorer(pipeline, prompts, **options).score(criterion)


def select(
    transformer: Any,
    scores: Mapping[BlockId, float],
    *,
    drop_blocks: int | None = None,
    budget: str | None = None,
    joint_error: Callable[[Sequence[BlockId]], float] | None = None,
    verify: int = 6,
    dtype: torch.dtype | None = None,
    **call: Any,
) -> list[BlockId]:
    """The blocks to drop, in the order of the forward pass: the set with the least sum of scores that meets the demand, exactly.

    Args:
        transformer: a diffusers transformer of a supported family.
        scores: of every block; infinite for one that must stay.
        drop_blocks: how many, or:
        budget: what the smaller one may cost: ``params=0.66``, ``memory=8GiB``, ``latency=0.7``, measured here and now, or ``flops=60T``.
        joint_error: measures sets of blocks, as :meth:`Scorer.joint_error` does. Then the ``verify`` best sets by the sum of scores are
            tried, and the best of these is taken.
        dtype: of the weights as they are going to be saved and timed; by default as they are.
        call: of the pipeline, where ``latency`` or ``flops`` are asked for: ``height``, ``width``, ``max_sequence_length``.

    Raises:
        UserError: the family is not supported, the scores are of other blocks, or the demand cannot be met.
    """
    anatomy = anatomy_of(transformer)
    blocks = block_ids(transformer, anatomy)
    if (drop_blocks is None) == (budget is None):
        raise UserError("give either drop_blocks, such as 4, or budget, such as 'params=0.66'")
    if scores.keys() != set(blocks):
        raise UserError(f"these are the scores of {len(scores)} blocks, and not of the {len(blocks)} of this {type(transformer).__name__}")
    if any(math.isnan(value) for value in scores.values()):
        raise UserError("a score is not a number; score again with sound weights")
    request = Request(count=drop_blocks, budget=parse_budget(budget) if budget else None)
    costs = sizes(transformer, anatomy, (dtype or transformer.dtype).itemsize)
    if drop_blocks is not None:
        if drop_blocks < 1:
            raise UserError(f"drop_blocks={drop_blocks} drops nothing; give at least 1")
        check_count(drop_blocks, len(blocks))
    elif request.budget and (quantity := request.budget.quantity) not in costs:
        load = workload(dataclasses.replace(SamplingDefaults(), **call), anatomy.vae_scale_factor)
        costs[quantity] = flops(transformer, anatomy, load) if quantity == "flops" else latency(transformer, anatomy, load, dtype)
    selection = choose(
        request,
        costs,
        {block_id: scores[block_id] for block_id in blocks},
        tied=tied(transformer, anatomy),
        joint=None if joint_error is None else lambda positions: joint_error([blocks[position] for position in positions]),
        best=verify if joint_error else 1,
    )
    return selection.dropped


def repair(
    pipeline: Any,
    smaller: Any,
    drop: Mapping[str, Sequence[int]] | Iterable[BlockId],
    prompts: Sequence[str] = GENERAL_PROMPTS,
    *,
    kind: str = "ridge",
    repair_points: int = 256,
    batch: int = 4,
    seed: int = 0,
    **options: Any,
) -> None:
    """Mend ``smaller``, in place, so that it comes closer to the pipeline's transformer; without training, in closed form.

    Args:
        pipeline: with the full transformer, of a family that can be scored; left as it is.
        smaller: what :func:`cut` made of that transformer by dropping ``drop``.
        kind: one of those of ``python -m fastdistill.compress --repair``.
        repair_points: noised images that it is fitted to; together some thirty tokens for each input of the last layer of a block.
        options: of :func:`calibration`, which also says what else is raised.

    Raises:
        UserError: there is no such repair, or ``smaller`` is not the transformer without these blocks.
    """
    if kind not in REPAIRS:
        raise UserError(f"there is no repair {kind!r}; there are {', '.join(REPAIRS)}")
    teacher = pipeline.transformer
    family = family_of(teacher)
    dropped = spelled_out(drop, family)
    check(teacher, family, dropped)
    boundaries = boundary_map(block_ids(teacher, family), dropped)
    if len(block_ids(smaller, family)) != len(boundaries):
        raise UserError(
            f"the smaller model has {len(block_ids(smaller, family))} blocks, and without these {len(boundaries)} would be left"
        )
    pool = calibration(pipeline, prompts, batch=batch, seed=seed, **options).pool
    REPAIRS[kind](
        Damage(
            student=smaller, teacher=teacher, family=family, boundaries=boundaries, pool=pool, points=repair_points, batch=batch, seed=seed
        )
    )
