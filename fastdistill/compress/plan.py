"""``--dry-run``: what a cut would give, from the model's config alone. No weights are read and nothing is computed."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from fastdistill.compress.budget import show
from fastdistill.compress.config import CompressConfig
from fastdistill.compress.costs import Costs, Inputs, flops, kinds, sizes, skeleton_of
from fastdistill.compress.select import limit_of, parse, spell
from fastdistill.compress.surgery import check
from fastdistill.errors import UserError
from fastdistill.models.family import BlockId, Conditioning, Family
from fastdistill.models.loading import EMBEDDED, embedded_folder
from fastdistill.models.registry import FAMILIES, family_of
from fastdistill.models.sampling import SamplingDefaults

COLUMNS = {"params": "parameters", "memory": "weights", "flops": "operations"}
# Of the autoencoder of every FLUX; a pipeline's folder may say otherwise.
VAE_SCALE_FACTOR = 8


def plan(config: CompressConfig) -> str:
    """A table of blocks, parameters, bytes and operations: of the cut that is asked for, or of all that would meet the demand.

    A count or a budget has no scores to choose by yet. But blocks of one kind cost the same, so that what a cut costs depends only on
    how many of each kind stay; all such combinations are listed, for a budget those to which no block can be added.

    Raises:
        UserError: no such model, not a supported one, or a demand that cannot be met.
    """
    network, sampling, scale_factor = read_config(config.model)
    sampling = sampling.replaced(config.sampling)
    family = family_of(network)
    inputs = _inputs(network, family, sampling, scale_factor)
    costs = sizes(network, family, getattr(torch, config.save_dtype).itemsize) | {"flops": flops(network, family, inputs)}
    groups = kinds(network, family)
    names = _names(groups, family)
    text = [
        f"{type(network).__name__}, weights in {config.save_dtype}, one forward pass at {sampling.width} x {sampling.height} pixels "
        f"and {sampling.max_sequence_length} text tokens.",
        "",
        f"| {' + '.join(names)} | " + " | ".join(COLUMNS.values()) + " |",
        "|---" * (len(COLUMNS) + 1) + "|",
        _row([len(group) for group in groups], [], costs),
    ]
    if config.drop_blocks and (request := parse(config.drop_blocks, family)).blocks:
        check(network, family, request.blocks)
        left = [sum(block_id not in request.blocks for block_id in group) for group in groups]
        return "\n".join([*text, _row(left, request.blocks, costs), "", f"Without {spell(request.blocks, family)}."])
    if config.drop_blocks:
        check(network, family, [block_id for group in groups for block_id in group][: request.count])
        found = _combinations(groups, lambda dropped: len(dropped) == request.count)
        closing = f"Every way to drop {request.count}; which blocks go is chosen by scores, for which the weights are needed."
    else:
        found = _within_budget(config, groups, costs)
        closing = (
            f"What meets --budget {config.budget} and would not with one block more; whatever leaves less of each does too. Which blocks "
            "go is chosen by scores, for which the weights are needed."
        )
    rows = [_row([len(group) - count for group, count in zip(groups, counts, strict=True)], dropped, costs) for counts, dropped in found]
    return "\n".join([*text, *rows, "", closing])


def read_config(model: str) -> tuple[Any, SamplingDefaults, int]:
    """A transformer without weights, how it is sampled, and pixels per latent.

    Args:
        model: a pipeline's folder, which needs no more than ``transformer/config.json``; a transformer's folder or config file; a hub id.
    """
    folder = embedded_folder() if model == EMBEDDED else Path(model)
    paths = [folder] if folder.is_file() else [folder / "transformer" / "config.json", folder / "config.json"]
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        if folder.exists() or model.count("/") != 1 or model.startswith((".", "/", "~")):
            raise UserError(
                f"there is no config.json in {model} or its folder transformer; give a pipeline's folder, its transformer's config.json, "
                "or a hub id such as owner/name"
            )
        path = _from_hub(model)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        name = config["_class_name"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is no diffusers config: it has to be a JSON object with _class_name") from error
    if name not in FAMILIES:
        raise UserError(f"{name} is not a supported transformer; supported: {', '.join(FAMILIES)}")
    import diffusers

    try:
        network = skeleton_of(getattr(diffusers, name), config)
    except Exception as error:  # whatever the class makes of a value that it does not expect
        raise UserError(f"{path} does not describe a {name}: {error}") from error
    vae = folder / "vae" / "config.json"
    channels = json.loads(vae.read_text(encoding="utf-8")).get("block_out_channels") if vae.is_file() else None
    return network, SamplingDefaults.load(folder), 2 ** (len(channels) - 1) if channels else VAE_SCALE_FACTOR


def _from_hub(model: str) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(model, "transformer/config.json"))
    except Exception as error:  # no network, no such repository, no permission: each library has its own
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{model} is no folder here, and its config does not come from the hub: {first_line}") from error


def _inputs(network: Any, family: Family, sampling: SamplingDefaults, scale_factor: int) -> Inputs:
    """Without a pipeline to ask, the shapes are those that the config names."""
    pipeline = SimpleNamespace(transformer=network, vae_scale_factor=scale_factor)
    with torch.device("meta"):
        return Inputs(
            x_t=torch.empty(1, *family.latent_shape(pipeline, sampling.height, sampling.width)),
            t=torch.empty(1),
            conditioning=Conditioning(
                prompt_embeds=torch.empty(1, sampling.max_sequence_length, network.config.joint_attention_dim),
                pooled_prompt_embeds=torch.empty(1, network.config.pooled_projection_dim),
                guidance=torch.empty(1) if network.config.guidance_embeds else None,
            ),
        )


def _names(groups: Sequence[Sequence[BlockId]], family: Family) -> list[str]:
    """``double``, ``single``; a stack with more than one kind of block has them told apart by their indices."""
    short = {stack.attribute: stack.short for stack in family.stacks}
    stacks = [group[0].stack for group in groups]
    return [short[group[0].stack] if stacks.count(group[0].stack) == 1 else spell(group, family) for group in groups]


def _within_budget(config: CompressConfig, groups: list[list[BlockId]], costs: Costs) -> list[tuple[tuple[int, ...], list[BlockId]]]:
    budget = config.parsed_budget()
    assert budget is not None
    if budget.quantity not in costs:
        raise UserError(
            f"--budget {config.budget}: {budget.quantity} is measured on the model itself, and --dry-run has only its config; "
            "plan by operations, such as --budget flops=0.7, or give the command without --dry-run"
        )
    cost = costs[budget.quantity]
    limit = limit_of(budget, cost)

    def tight(dropped: list[BlockId]) -> bool:
        left = cost.left(dropped)
        return left <= limit and all(left + cost.blocks[block_id] > limit for block_id in dropped)

    return _combinations(groups, tight)


def _combinations(
    groups: Sequence[Sequence[BlockId]], wanted: Callable[[list[BlockId]], bool]
) -> list[tuple[tuple[int, ...], list[BlockId]]]:
    """How many of each kind to drop, and blocks that stand for them, such that one block stays at least."""
    found = []
    for counts in product(*(range(len(group) + 1) for group in groups)):
        dropped = [block_id for group, count in zip(groups, counts, strict=True) for block_id in group[:count]]
        if len(dropped) < sum(map(len, groups)) and wanted(dropped):
            found.append((counts, dropped))
    return found


def _row(left: Sequence[int], dropped: Sequence[BlockId], costs: Costs) -> str:
    cells = []
    for quantity in COLUMNS:
        cost = costs[quantity]
        share = f" ({cost.left(dropped) / cost.total:.3f})" if dropped else ""
        cells.append(show(quantity, cost.left(dropped)) + share)
    return f"| {' + '.join(map(str, left))} | " + " | ".join(cells) + " |"
