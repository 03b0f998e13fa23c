"""`calibrate`, `score`, `select` and `repair` for Python, around `cut`
(`fastdistill.compress.surgery`).

The command makes the same objects by the same functions. It also keeps the result of every stage,
so that a long run goes on after a kill.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from fastdistill.compress.choice.budget import parse_budget
from fastdistill.compress.choice.choose import Evidence, Request, Trial, choose
from fastdistill.compress.choice.costs import flops, latency, sizes, workload
from fastdistill.compress.importance import CRITERIA
from fastdistill.compress.importance.calibrate import Amount, Calibration, calibrated
from fastdistill.compress.kept import check_kept
from fastdistill.compress.naming import Drop, spelled_out
from fastdistill.compress.repairs import REPAIRS
from fastdistill.compress.repairs.damage import Damage, mend
from fastdistill.compress.surgery import CutModel, boundary_map, check, check_count
from fastdistill.data.images import read_folder
from fastdistill.data.trajectories import Source
from fastdistill.errors import UserError
from fastdistill.models.blocks import block_ids, tied
from fastdistill.models.checks import check_call, check_pipeline, tell_of_long_prompts
from fastdistill.models.digest import digest_of
from fastdistill.models.families import anatomy_of, family_of
from fastdistill.models.families.family import BlockId
from fastdistill.models.loading import GENERAL_PROMPTS
from fastdistill.models.sampling import SamplingDefaults
from fastdistill.models.weights import check_computable, check_finite
from fastdistill.run.numbers import whole
from fastdistill.run.options import SamplingOptions, check_known


def calibrate(
    pipeline: Any,
    prompts: Sequence[str] = GENERAL_PROMPTS,
    *,
    images: str | Path | None = None,
    points: int = 64,
    steps: int = 14,
    batch: int = 4,
    seed: int = 0,
    height: int | None = None,
    width: int | None = None,
    true_cfg_scale: float | None = None,
    guidance_scale: float | None = None,
    max_sequence_length: int | None = None,
    console: Console | None = None,
) -> Calibration:
    """Sample what the blocks of the pipeline's transformer are scored on, and a cut model is mended
    on.

    Args:
        pipeline: a diffusers pipeline of a family that can be scored; left as it is.
        prompts: to sample from; `points` images are drawn, in `steps` steps each.
        images: a folder of images to take instead, with their captions, as docs/images.md lists.
        points: at how many points blocks are scored; the command's 256 give steadier scores for
            four times the time.
        batch: samples per forward pass, here and wherever the calibration is used.
        height: of the images in pixels. It and the arguments below are those of the pipeline's
            call; by default they are as in the fastdistill.json of the pipeline's folder, else as
            for FLUX.1-dev.
        console: a rich console to show progress on; by default nothing is shown.

    Raises:
        UserError: the family cannot be scored, weights are not finite or not of a type to compute
            with, there is nothing to sample from, or a number is too small.
    """
    network = getattr(pipeline, "transformer", None)
    if network is None:
        raise UserError(
            f"calibration needs the pipeline, which samples and encodes prompts, and got a {type(pipeline).__name__}"
        )
    family_of(network)
    check_pipeline(pipeline)
    check_computable(network, type(network).__name__)
    check_finite(network, type(network).__name__)
    if isinstance(prompts, str) or not (prompts := list(prompts)):
        raise UserError("give prompts as a list of at least one, not as one string")
    if strangers := [prompt for prompt in prompts if not isinstance(prompt, str)]:
        raise UserError(f"every prompt must be a string, got {strangers[0]!r}")
    points = whole("points", points, 1)
    amount = Amount(
        images=points,
        points=points,
        steps=whole("steps", steps, 1),
        batch=whole("batch", batch, 1),
        seed=whole("seed", seed, 0, 2**32 - 1),
    )
    options = SamplingOptions(
        height=_whole_if_given("height", height),
        width=_whole_if_given("width", width),
        true_cfg_scale=true_cfg_scale,
        guidance_scale=guidance_scale,
        max_sequence_length=_whole_if_given("max_sequence_length", max_sequence_length),
    )
    folder = getattr(pipeline, "name_or_path", None)
    sampling = (SamplingDefaults.load(Path(folder)) if folder else SamplingDefaults()).replaced(options)
    check_call(pipeline, sampling)
    console = console or Console(quiet=True)
    own = read_folder(Path(images), points) if images is not None else None
    if own:
        console.print(str(own), markup=False, soft_wrap=True)
    captioned = own.images if own else []
    captions = [image.caption for image in captioned]
    tell_of_long_prompts(pipeline, captions or prompts, sampling.max_sequence_length)
    source = Source(pipeline=pipeline, prompts=prompts, sampling=sampling, images=captioned)
    return calibrated(source, amount, console=console)


def score(
    calibration: Calibration, criterion: str = "output", *, drop_blocks: int | None = None
) -> dict[BlockId, float]:
    """Worth of each block of the calibrated transformer, in the order of the forward pass; the
    lowest goes first.

    Args:
        criterion: a name that `python -m fastdistill.compress --help` lists under `--criterion`.
        drop_blocks: how many blocks are going to be dropped, where that is known. It bounds the
            search of `greedy`, and says what the masks of `learned` are learned for.

    Raises:
        UserError: there is no such criterion, or not so many blocks.
    """
    _check_calibration(calibration)
    check_known("criterion", criterion, CRITERIA)
    drops = None if drop_blocks is None else _drops(drop_blocks, len(calibration.blocks))
    return calibration.score(criterion, drops=drops)


def select(
    transformer: Any,
    scores: Mapping[BlockId, float],
    *,
    drop_blocks: int | None = None,
    budget: str | None = None,
    calibration: Calibration | None = None,
    verify: int = 6,
    dtype: torch.dtype | None = None,
    height: int | None = None,
    width: int | None = None,
    max_sequence_length: int | None = None,
) -> list[BlockId]:
    """The blocks to drop, in the order of the forward pass: the set with the least sum of scores
    that meets the demand, exactly.

    Args:
        transformer: a diffusers transformer of a supported family.
        scores: of every block; infinite for one that must stay.
        drop_blocks: how many, or:
        budget: what the smaller one may cost: `params=0.66`, `memory=8GiB`, `latency=0.7`, measured
            here and now, or `flops=60T`.
        calibration: of the transformer, to measure sets of blocks on. Then the `verify` best sets
            by the sum of scores are tried, and the best of these is taken.
        dtype: of the weights as they are going to be saved and timed; by default as they are.
        height: of the images in pixels, where `latency` or `flops` are asked for; with `width` and
            `max_sequence_length` by default as for FLUX.1-dev.

    Raises:
        UserError: the family is not supported, the scores are of other blocks, or the demand cannot
            be met.
    """
    anatomy = anatomy_of(transformer)
    blocks = block_ids(transformer, anatomy)
    if (drop_blocks is None) == (budget is None):
        raise UserError("give either drop_blocks, such as 4, or budget, such as 'params=0.66'")
    count = None if drop_blocks is None else _drops(drop_blocks, len(blocks))
    sets = whole("verify", verify, 1)
    worth = _scores_of(scores, blocks, type(transformer).__name__)
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise UserError(f"dtype must be one of torch's, such as torch.bfloat16, got {dtype!r}")
    size = SamplingOptions(
        height=_whole_if_given("height", height),
        width=_whole_if_given("width", width),
        max_sequence_length=_whole_if_given("max_sequence_length", max_sequence_length),
    )
    if budget is not None and not isinstance(budget, str):
        raise UserError(f"budget must be a text such as 'params=0.66', got {budget!r}")
    request = Request(count=count, budget=parse_budget(budget) if budget is not None else None)
    costs = sizes(transformer, anatomy, (dtype or transformer.dtype).itemsize)
    if request.budget and (quantity := request.budget.quantity) not in costs:
        load = workload(SamplingDefaults().replaced(size), anatomy.vae_scale_factor)
        costs[quantity] = (
            flops(transformer, anatomy, load) if quantity == "flops" else latency(transformer, anatomy, load, dtype)
        )
    evidence = Evidence(scores=worth, tied=tied(transformer, anatomy))
    return choose(request, costs, evidence, _trial(calibration, transformer, blocks, sets)).dropped


def _drops(drop_blocks: Any, blocks: int) -> int:
    """The number of blocks to drop.

    Raises:
        UserError: it is no number, drops nothing, or leaves no model.
    """
    count = whole("drop_blocks", drop_blocks)
    if count < 1:
        raise UserError(f"drop_blocks={count} drops nothing; give at least 1")
    check_count(count, blocks)
    return count


def _whole_if_given(name: str, value: Any) -> int | None:
    return None if value is None else whole(name, value)


def _scores_of(scores: Mapping[BlockId, Any], blocks: Sequence[BlockId], name: str) -> dict[BlockId, float]:
    """Scores of every block of a transformer of the class `name`, in the order of the forward pass.

    Raises:
        UserError: there are other blocks, or a score is no number or minus infinity.
    """
    if not isinstance(scores, Mapping):
        raise UserError(f"give scores as score() returns them, by block, not as a {type(scores).__name__}")
    if scores.keys() != set(blocks):
        strangers = [key for key in scores if key not in blocks]
        named = f" ({strangers[0]!r} is none of them)" if strangers else ""
        raise UserError(
            f"these are the scores of {len(scores)} blocks, and not of the {len(blocks)} of this {name}{named}"
        )
    try:
        worth = {block_id: float(scores[block_id]) for block_id in blocks}
    except (TypeError, ValueError) as error:
        raise UserError(f"every score must be a number: {error}") from error
    if any(math.isnan(value) or value == -math.inf for value in worth.values()):
        raise UserError("a score is not a number, or minus infinity; score again with sound weights")
    return worth


def _trial(calibration: Calibration | None, transformer: Any, blocks: Sequence[BlockId], sets: int) -> Trial | None:
    if calibration is None:
        return None
    _check_calibration(calibration)
    if calibration.blocks != blocks:
        raise UserError(
            f"the calibration is of a transformer of {len(calibration.blocks)} blocks, and this one has {len(blocks)}"
        )
    if calibration.network is not transformer and digest_of(calibration.network) != digest_of(transformer):
        raise UserError(
            f"the calibration is of another {type(transformer).__name__}, with other weights; give that one, or "
            "calibrate a pipeline with this one"
        )
    return Trial(joint=lambda positions: calibration.joint_error(blocks[position] for position in positions), sets=sets)


def _check_calibration(calibration: Any) -> None:
    if not isinstance(calibration, Calibration):
        raise UserError(f"calibration must be what calibrate() returns, got a {type(calibration).__name__}")


def repair(
    calibration: Calibration,
    smaller: Any,
    drop: Drop,
    *,
    kind: str = "ridge",
    points: int = 256,
) -> None:
    """Mend `smaller`, in place, so that it comes closer to the calibrated transformer; without
    training, in closed form.

    Args:
        calibration: of the full transformer.
        smaller: what `cut` made of that transformer by dropping `drop`, in any floating-point
            dtype.
        kind: a name that `python -m fastdistill.compress --help` lists under `--repair`.
        points: noised images that the repair is fitted to; together some thirty tokens for each
            input of the last layer of a block.

    Raises:
        UserError: there is no such repair, or `smaller` is not the transformer without these
            blocks.
    """
    _check_calibration(calibration)
    check_known("repair", kind, REPAIRS)
    points = whole("points", points, 1)
    teacher, family = calibration.network, calibration.family
    dropped = spelled_out(drop, family)
    check(teacher, family, dropped)
    boundaries = boundary_map(calibration.blocks, dropped)
    model = CutModel(student=smaller, teacher=teacher, family=family, boundaries=boundaries)
    check_kept(model)
    mend(Damage.of(model, calibration, points), kind, calibration.console)
