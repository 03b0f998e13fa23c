"""Record and report of a run, for programs and people: `compress.json` and `report.md`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2

from fastdistill.compress.choice.budget import show
from fastdistill.compress.choice.choose import Selection, spell
from fastdistill.compress.choice.costs import Costs
from fastdistill.compress.config import CompressConfig
from fastdistill.compress.stages import Stage, best, finite, percent, verdict
from fastdistill.compress.surgery import CutModel
from fastdistill.evaluation.table import rows
from fastdistill.models.blocks import block_ids
from fastdistill.models.families.family import BlockId
from fastdistill.models.sampling import SamplingDefaults
from fastdistill.run.versions import CLOSING

REPORT = """\
# {{ config.model }} without {{ dropped }}

**{{ verdict }}**

{{ "{:.2f}".format(parameters.full / 1e6) }} M parameters in the transformer before, \
{{ "{:.2f}".format(parameters.compressed / 1e6) }} M after \
({{ "{:.0%}".format(parameters.compressed / parameters.full) }}), {{ blocks|length }} blocks before, {{ kept }} after. \
`model/` is a stock diffusers pipeline.

![{{ evaluation|join(", ") }} model from the same noise](grid.png)
{% if measured %}
## Quality

{{ evaluation.full.images }} images of each model from the same prompts and noise, {{ evaluation.full.steps }} steps, \
seed {{ evaluation.full.seeds|join(", ") }}. The reference is the full model.

| | {{ evaluation|join(" | ") }} |
|---|{% for _ in evaluation %}---|{% endfor %}
{% for name, values in measured -%}
| {{ name }} | {{ values|join(" | ") }} |
{% endfor %}
{%- endif %}
## Stages

A stage begins with the best one before it. What is saved is the stage whose images are closest to the full model's, of {{ held_out }} prompts from noise that nothing is trained on: the difference is that of the final latents, in parts of their size. The output error is that of single predictions on the way to the images.

| stage | difference of the images | output error | |
|---|---|---|---|
{% for row in stages -%}
| {{ row|join(" | ") }} |
{% endfor %}
## Size

| | full | cut | |
|---|---|---|---|
{% for row in sizes -%}
| {{ row|join(" | ") }} |
{% endfor %}
Operations and time are of one forward pass of the transformer at {{ at.width }} x {{ at.height }} pixels and \
{{ at.max_sequence_length }} text tokens.

## Choice

{{ choice.asked }}: {{ choice.dropped }}. {% if choice.front %}\
The sets with the least sum of scores were tried by real forward passes without all of their blocks, and the best of those that meet the \
demand was taken.{% endif %}

| dropped | {{ choice.quantity }} left | score | errors added up | joint error | meets the demand |
|---|---|---|---|---|---|
{% for row in verified -%}
| {{ row|join(" | ") }} |
{% endfor %}
{{ adding_up }}
{% if front %}
The Pareto front of the scores over all sets{{ " (every one in compress.json)" if front|length < choice.front|length }}:

| dropped | {{ choice.quantity }} left | score |
|---|---|---|
{% for row in front -%}
| {{ row|join(" | ") }} |
{% endfor %}
{%- endif %}
## Blocks

The relative output error of the model without the block (`output`), how much the block turns the image stream (`bi`), and further \
criteria (`--help` says what they are); chosen by `{{ config.criterion }}`. The single errors of the dropped blocks add up to \
{{ "{:.4f}".format(predicted_error) }}.

| block | {{ scores|join(" | ") }} | |
|---|{% for _ in scores %}---|{% endfor %}---|
{% for block in blocks -%}
| {{ block.name }} | {{ block.scores|join(" | ") }} | {{ block.fate }} |
{% endfor %}
## How

Recovery: {{ config.recovery_steps }} steps of {{ config.batch }} on \
{% if images %}{{ images }} images of {{ config.images }}{% else %}{{ config.calibration_images }} images that the full model drew \
of {{ prompts }} prompts{% endif %}, L = {{ config.task_weight }} L_task + {{ config.output_weight }} L_OutKD + \
{{ config.feature_weight }} L_FeatKD, learning rate {{ config.learning_rate }}, seed {{ config.seed }}. \
Curves: `metrics.jsonl`; everything else: `compress.json`.

"""


FRONT_ROWS = 12
"""Rows of the Pareto front that report.md shows; for a model of FLUX.1-dev's size the front has
hundreds."""
SIZES = {
    "blocks": "blocks",
    "params": "parameters",
    "memory": "weights as saved",
    "flops": "operations",
    "latency": "time, sum of blocks",
}


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Facts that a finished run knows of the models; the record and the report are made from them.

    Attributes:
        costs: of the full model, by quantity.
        latency_after: nanoseconds of one forward pass of the cut model, if a latency budget had it
            measured.
        scores: of each block, by criterion.
        stages: of the smaller model; the best of them is saved.
        held_out: number of images by which stages are compared.
        evaluation: measurements by model: full, cut, repaired, recovered.
    """

    model: CutModel
    selection: Selection
    costs: Costs
    latency_after: int | None
    scores: Mapping[str, Mapping[BlockId, float]]
    stages: Sequence[Stage]
    held_out: int
    evaluation: Mapping[str, Mapping[str, Any]]

    @property
    def blocks(self) -> list[BlockId]:
        """Every block of the full model, in the order of the forward pass."""
        return block_ids(self.model.teacher, self.model.family)

    def spelled(self, blocks: Iterable[BlockId]) -> str:
        return spell(list(blocks), self.model.family)


def manifest(config: CompressConfig, outcome: Outcome, sampling: SamplingDefaults) -> dict[str, Any]:
    """Blocks that were dropped, why, and what came of it, as JSON."""
    scores = outcome.scores
    spelled = {block_id: outcome.spelled([block_id]) for block_id in outcome.blocks}
    parts = {"full": outcome.model.teacher, "compressed": outcome.model.student}
    return {
        "dropped": _by_stack(outcome, keep=False),
        "kept": _by_stack(outcome, keep=True),
        "boundaries": {spelled[student]: spelled[teacher] for student, teacher in outcome.model.boundaries.items()},
        "scores": {
            name: {spelled[block_id]: value for block_id, value in values.items()} for name, values in scores.items()
        },
        "choice": _choice(config, outcome),
        "costs": _costs(outcome),
        "at": {"height": sampling.height, "width": sampling.width, "max_sequence_length": sampling.max_sequence_length},
        "predicted_error": sum(scores["output"][block_id] for block_id in outcome.selection.dropped),
        "verdict": verdict(outcome.stages),
        "saved": best(outcome.stages).name,
        "held_out": outcome.held_out,
        "distances": {stage.name: finite(stage.distance) for stage in outcome.stages},
        "output_errors": {stage.name: finite(stage.output_error) for stage in outcome.stages},
        "parameters": {name: sum(parameter.numel() for parameter in part.parameters()) for name, part in parts.items()},
        "evaluation": outcome.evaluation,
    }


def report(record: Mapping[str, Any]) -> str:
    """Text of `report.md`, from the record of the run (`Job.record` of a `manifest`)."""
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
    template = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True).from_string(
        REPORT + CLOSING
    )
    choice = record["choice"]
    quantity = choice["quantity"]
    verified = [
        [
            row["dropped"],
            show(quantity, row["left"]),
            f"{row['score']:.5f}",
            f"{row['predicted']:.5f}",
            f"{row['joint']:.5f}",
            "yes" if row["eligible"] else "no",
        ]
        for row in choice["verified"]
    ]
    return template.render(
        **{
            **record,
            "blocks": blocks,
            "kept": len(kept),
            "measured": rows(list(record["evaluation"].values())),
            "dropped": dropped,
            "sizes": _size_rows(record["costs"]),
            "verified": verified,
            "front": [
                [row["dropped"] or "nothing", show(quantity, row["left"]), f"{row['score']:.5f}"]
                for row in _thinned(choice["front"])
            ],
            "adding_up": _adding_up(choice["additivity"]),
            "stages": [
                [name, percent(distance), "" if error is None else f"{error:.4f}", "saved" * (name == record["saved"])]
                for name, distance in record["distances"].items()
                for error in [record["output_errors"][name]]
            ],
        }
    )


def _choice(config: CompressConfig, outcome: Outcome) -> dict[str, Any]:
    selection = outcome.selection

    def spelled(positions: Sequence[int]) -> str:
        return outcome.spelled(outcome.blocks[position] for position in positions)

    return {
        "asked": f"--budget {config.budget}" if config.budget else f"--drop-blocks {' '.join(config.drop_blocks)}",
        "quantity": selection.quantity,
        "full": selection.full,
        "limit": selection.limit,
        "dropped": outcome.spelled(selection.dropped),
        "front": [
            {"dropped": spelled(choice.dropped), "left": selection.full - choice.saved, "score": choice.error}
            for choice in selection.front
        ],
        "verified": [
            {
                "dropped": spelled(found.dropped),
                "left": selection.full - found.saved,
                "score": found.score,
                "predicted": found.predicted,
                "joint": found.joint,
                "eligible": found.eligible,
            }
            for found in selection.verified
        ],
        "additivity": dataclasses.asdict(selection.additivity),
    }


def _costs(outcome: Outcome) -> dict[str, dict[str, Any]]:
    """Costs by quantity: of the full and the cut model, of each block and of what is outside the
    blocks."""
    result: dict[str, dict[str, Any]] = {}
    for quantity, cost in outcome.costs.items():
        result[quantity] = {
            "full": cost.total,
            "cut": cost.left(outcome.selection.dropped),
            "outside": cost.outside,
            "blocks": {outcome.spelled([block_id]): value for block_id, value in cost.blocks.items()},
        }
    if outcome.latency_after is not None:
        result["latency"]["cut_measured"] = outcome.latency_after
    return result


def _size_rows(costs: Mapping[str, Any]) -> list[list[str]]:
    def row(label: str, quantity: str, full: int, left: int) -> list[str]:
        return [label, show(quantity, full), show(quantity, left), f"{left / full:.3f}"]

    rows = [row(SIZES[quantity], quantity, cost["full"], cost["cut"]) for quantity, cost in costs.items()]
    for quantity, cost in costs.items():
        if "cut_measured" in cost:
            rows.append(row("time, the cut model's own", quantity, cost["full"], cost["cut_measured"]))
    return rows


def _thinned(front: Sequence[Any]) -> list[Any]:
    if len(front) <= FRONT_ROWS:
        return list(front)
    return [front[i * (len(front) - 1) // (FRONT_ROWS - 1)] for i in range(FRONT_ROWS)]


def _adding_up(additivity: Mapping[str, Any]) -> str:
    sets = additivity["sets"]
    if additivity["r2"] is None:
        return f"Whether errors add up cannot be said from {sets} set{'s' if sets > 1 else ''}; it takes three of different errors."
    line = (
        ""
        if additivity["r2_linear"] is None
        else f", of the best straight line through them {additivity['r2_linear']:.3f}"
    )
    return f"Do errors add up? Over these {sets} sets, R^2 of the sums as a prediction of the joint errors is {additivity['r2']:.3f}{line}."


def _by_stack(outcome: Outcome, *, keep: bool) -> dict[str, list[int]]:
    gone = set(outcome.selection.dropped)

    def wanted(block_id: BlockId) -> bool:
        return (block_id not in gone) == keep

    return {
        stack.attribute: [
            block_id.index for block_id in outcome.blocks if block_id.stack == stack.attribute and wanted(block_id)
        ]
        for stack in outcome.model.family.stacks
    }
