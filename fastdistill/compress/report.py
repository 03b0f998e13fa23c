"""What a run leaves for people and programs: ``report.md`` and ``compress.json``."""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Mapping, Sequence
from typing import Any

import diffusers
import jinja2
import torch

from fastdistill import __version__
from fastdistill.compress.config import CompressConfig
from fastdistill.compress.job import Outcome
from fastdistill.compress.select import spell
from fastdistill.models.family import BlockId

REPORT = """\
# {{ config.model }} without {{ dropped }}

{{ "{:.2f}".format(parameters.full / 1e6) }} M parameters in the transformer before, \
{{ "{:.2f}".format(parameters.compressed / 1e6) }} M after \
({{ "{:.0%}".format(parameters.compressed / parameters.full) }}), {{ blocks|length }} blocks before, {{ kept }} after. \
`model/` is a stock diffusers pipeline.

![full, cut and recovered model from the same noise](grid.png)
{% if measured %}
## Quality

{{ evaluation.full.pictures }} pictures of each model from the same prompts and noise, {{ evaluation.full.steps }} steps, \
seed {{ evaluation.full.seeds|join(", ") }}. The reference is the full model.

| | full | cut | recovered |
|---|---|---|---|
{% for name, values in measured -%}
| {{ name }} | {{ values|join(" | ") }} |
{% endfor %}
{%- endif %}
## Blocks

The relative output error of the model without the block (`output`), how much the block turns the image stream (`bi`), and further \
criteria (`--help` says what they are); chosen by `{{ config.criterion }}`. Without all dropped blocks at once the error is \
{{ "{:.4f}".format(joint_error) }}; their single errors add up to {{ "{:.4f}".format(predicted_error) }}.

| block | {{ scores|join(" | ") }} | |
|---|{% for _ in scores %}---|{% endfor %}---|
{% for block in blocks -%}
| {{ block.name }} | {{ block.scores|join(" | ") }} | {{ block.fate }} |
{% endfor %}
## How

Recovery: {{ config.steps }} steps of {{ config.batch }} on {{ config.calibration_pictures }} pictures that the full model drew of \
{{ prompts }} prompts, L = {{ config.l_task }} L_task + {{ config.l_out }} L_OutKD + {{ config.l_feat }} L_FeatKD, learning rate \
{{ config.learning_rate }}, seed {{ config.seed }}. Curves: `metrics.jsonl`; everything else: `compress.json`.

| stage | seconds |
|---|---|
{% for stage, seconds in seconds.items() -%}
| {{ stage }} | {{ "{:.0f}".format(seconds) }} |
{% endfor %}
fastdistill {{ versions.fastdistill }}, diffusers {{ versions.diffusers }}, torch {{ versions.torch }}, {{ versions.machine }}.
"""


def manifest(config: CompressConfig, outcome: Outcome, prompts: int) -> dict[str, Any]:
    """Everything about the run as JSON: what was dropped and why, what it cost, and with which versions."""
    scores = outcome.scores
    spelled = {block_id: spell([block_id], outcome.family) for block_id in outcome.blocks}
    return {
        "format": 1,
        "model": config.model,
        "dropped": _by_stack(outcome, keep=False),
        "kept": _by_stack(outcome, keep=True),
        "boundaries": {spelled[student]: spelled[teacher] for student, teacher in outcome.boundaries.items()},
        "scores": {name: {spelled[block_id]: value for block_id, value in values.items()} for name, values in scores.items()},
        "predicted_error": sum(scores["output"][block_id] for block_id in outcome.dropped),
        "joint_error": outcome.joint_error,
        "parameters": outcome.parameters,
        "evaluation": outcome.evaluation,
        "prompts": prompts,
        "seconds": outcome.seconds,
        "config": {name: str(value) if name in ("output", "prompts") else value for name, value in dataclasses.asdict(config).items()},
        "versions": {
            "fastdistill": __version__,
            "diffusers": diffusers.__version__,
            "torch": torch.__version__,
            "machine": platform.machine(),
        },
    }


def report(record: Mapping[str, Any], measured: Sequence[tuple[str, Sequence[str]]]) -> str:
    """``report.md`` from a :func:`manifest` and, by row, the label and the texts of the full, cut and recovered model."""
    scores = record["scores"]
    kept = list(record["boundaries"])
    blocks = [
        {
            "name": name,
            "scores": [f"{values[name]:.5f}" for values in scores.values()],
            "fate": "" if name in kept else "dropped",
        }
        for name in scores["output"]
    ]
    dropped = " ".join(f"{name}" for name in scores["output"] if name not in kept)
    template = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True).from_string(REPORT)
    return template.render(**{**record, "blocks": blocks, "kept": len(kept), "measured": measured, "dropped": dropped})


def _by_stack(outcome: Outcome, *, keep: bool) -> dict[str, list[int]]:
    gone = set(outcome.dropped)

    def wanted(block_id: BlockId) -> bool:
        return (block_id not in gone) == keep

    return {
        stack.attribute: [block_id.index for block_id in outcome.blocks if block_id.stack == stack.attribute and wanted(block_id)]
        for stack in outcome.family.stacks
    }
