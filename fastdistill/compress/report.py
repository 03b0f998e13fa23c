"""Record and report of a run, for programs and people: `compress.json` and `report.md`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from fastdistill.compress.choice.budget import show
from fastdistill.compress.choice.choose import Selection, spell
from fastdistill.compress.choice.costs import Costs
from fastdistill.compress.config import CompressConfig
from fastdistill.compress.stages import Stage, best, finite, percent, verdict
from fastdistill.compress.surgery import CutModel
from fastdistill.evaluation.table import SIZE, TIME, rows
from fastdistill.models.blocks import block_ids
from fastdistill.models.families.family import BlockId
from fastdistill.models.sampling import SamplingDefaults
from fastdistill.run.versions import CLOSING

REPORT = """\
# {{ config.model }} without {{ choice.dropped }}

**{{ verdict }}**

| | full model | compressed | |
|---|---|---|---|
{% for row in gains -%}
| {{ row|join(" | ") }} |
{% endfor %}
The compressed model is in `{{ output }}/model`, a pipeline of diffusers that loads where fastdistill is not installed:

    import torch
    from diffusers import FluxPipeline

    pipeline = FluxPipeline.from_pretrained("{{ output }}/model", dtype=torch.{{ dtype }})
    image = pipeline(
        {{ call|join(",\\n        ") }},
    ).images[0]

![{{ evaluation|join(", ") }} model from the same noise](grid.png)

A row is a model, a column one prompt and one noise: {% for prompt in shown %}{{ loop.index }}. {{ prompt }}\
{{ "; " if not loop.last }}{% endfor %}.

## Stages

Every step begins with the best stage before it. That is the stage whose images are the closest to the full model's, for {{ held_out }} \
prompts and noises that neither training nor calibration use. The difference of the images is measured in the latents that the \
autoencoder makes images of, relative to their size: 0 % is the same image, 100 % as far off as no image at all. The error of a \
single prediction is the same of what the network predicts in one sampling step. It has no say: small errors may add up on the way \
to an image.

| stage | what was done | difference of the images | error of a prediction | |
|---|---|---|---|---|
{% for row in stages -%}
| {{ row|join(" | ") }} |
{% endfor %}
{%- if measured %}
{{ evaluation.full.images }} images of each model from the same prompts and noise, {{ evaluation.full.steps }} sampling steps, \
seed {{ evaluation.full.seeds|join(", ") }}. The reference is the full model.

| | {{ evaluation|join(" | ") }} |
|---|{% for _ in evaluation %}---|{% endfor %}
{% for name, values in measured -%}
| {{ name }} | {{ values|join(" | ") }} |
{% endfor %}
{%- endif %}
## Choice of the blocks

{{ chosen }}
{% if verified %}
| without | {{ choice.quantity }} left | error, measured | error, estimated | small enough |
|---|---|---|---|---|
{% for row in verified -%}
| {{ row|join(" | ") }} |
{% endfor %}
{{ adding_up }}
{% endif %}
{%- if front %}
The least error, as estimated, for every size{{ " (all of them in compress.json)" if front|length < choice.front|length }}:

| without | {{ choice.quantity }} left | error, estimated |
|---|---|---|
{% for row in front -%}
| {{ row|join(" | ") }} |
{% endfor %}
{%- endif %}
## Blocks

{% if scores %}What each block is worth, one left out at a time: {% for name in scores %}`{{ name }}` is {{ meanings[name] }}\
{{ "; " if not loop.last }}{% endfor %}. {% endif %}A model has {{ blocks|length }} blocks in the order of this table.

| block | {% for name in scores %}{{ name }} | {% endfor %}now |
|---|{% for _ in scores %}---|{% endfor %}---|
{% for block in blocks -%}
| {{ block.name }} | {% for score in block.scores %}{{ score }} | {% endfor %}{{ block.fate }} |
{% endfor %}
## How

{% for line in how -%}
- {{ line }}
{% endfor %}
The prompts of all images that were measured:

{% for prompt in prompts_measured -%}
{{ loop.index }}. {{ prompt }}
{% endfor %}
"""

FRONT_ROWS = 12
"""Rows of the Pareto front that report.md shows; for a model of FLUX.1-dev's size the front has
hundreds."""
SIZES = {
    "params": "parameters of the transformer",
    "blocks": "its blocks",
    "memory": "its weights as saved",
    "flops": "operations of a forward pass",
    "latency": "time of its blocks, added up",
}
MEGABYTE = 1e6


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Facts that a finished run knows of the models; the record and the report are made from them.

    Attributes:
        costs: of the full model, by quantity.
        latency_after: nanoseconds of one forward pass of the cut model, if a latency budget had it
            measured.
        speed: measured forward passes of both, as JSON (`fastdistill.compress.speed`).
        disk: bytes of the folders of the full and the compressed pipeline, where they are known.
        scores: of each block, by criterion.
        stages: of the smaller model; the best of them is saved.
        held_out: number of images by which stages are compared.
        evaluation: measurements by model: full, cut, repaired, recovered.
    """

    model: CutModel
    selection: Selection
    costs: Costs
    latency_after: int | None
    speed: Mapping[str, Any]
    disk: Mapping[str, int | None]
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
        "verdict": verdict(outcome.stages),
        "saved": best(outcome.stages).name,
        "dropped": _by_stack(outcome, keep=False),
        "kept": _by_stack(outcome, keep=True),
        "boundaries": {spelled[student]: spelled[teacher] for student, teacher in outcome.model.boundaries.items()},
        "blocks": list(spelled.values()),
        "scores": {
            name: {spelled[block_id]: value for block_id, value in values.items()} for name, values in scores.items()
        },
        "choice": _choice(config, outcome),
        "costs": _costs(outcome),
        "speed": outcome.speed,
        "disk": outcome.disk,
        "sampling": dataclasses.asdict(sampling),
        "predicted_error": (
            sum(scores["output"][block_id] for block_id in outcome.selection.dropped) if "output" in scores else None
        ),
        "held_out": outcome.held_out,
        "distances": {stage.name: finite(stage.distance) for stage in outcome.stages},
        "output_errors": {stage.name: finite(stage.output_error) for stage in outcome.stages},
        "parameters": {name: sum(parameter.numel() for parameter in part.parameters()) for name, part in parts.items()},
        "evaluation": outcome.evaluation,
    }


def report(
    record: Mapping[str, Any],
    *,
    output: Path,
    dtype: str,
    shown: Sequence[str],
    measured: Sequence[str],
    meanings: Mapping[str, str],
) -> str:
    """Text of `report.md`, from the record of the run (`Job.record` of a `manifest`).

    Args:
        output: folder of the run.
        dtype: to load the pipeline in, by the name that torch has for it.
        shown: prompts of the columns of the grid.
        measured: prompts of all images that were measured.
        meanings: of the criteria, by name.
    """
    scores, choice = record["scores"], record["choice"]
    blocks = [
        {
            "name": name,
            "scores": [f"{values[name]:.5f}" for values in scores.values()],
            "fate": "kept" if name in record["boundaries"] else "dropped",
        }
        for name in record["blocks"]
    ]
    quantity = choice["quantity"]
    verified = [
        [
            row["dropped"],
            show(quantity, row["left"]),
            f"{row['joint']:.5f}",
            f"{row['score']:.5f}",
            "yes" if row["eligible"] else "no, for comparison",
        ]
        for row in choice["verified"]
    ]
    template = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True).from_string(
        REPORT + CLOSING
    )
    return template.render(
        **{
            **record,
            "output": output,
            "dtype": dtype,
            "call": _call(record["sampling"], shown[0]),
            "shown": shown,
            "prompts_measured": measured,
            "meanings": meanings,
            "gains": gains(record),
            "stages": _stage_rows(record),
            "measured": quality(list(record["evaluation"].values())),
            "chosen": _chosen(record),
            "verified": verified,
            "front": [
                [row["dropped"] or "nothing", show(quantity, row["left"]), f"{row['score']:.5f}"]
                for row in _thinned(choice["front"])
            ],
            "adding_up": _adding_up(choice["additivity"]),
            "blocks": blocks,
            "how": _how(record),
        }
    )


def gains(record: Mapping[str, Any]) -> list[list[str]]:
    """Rows of size, speed and quality: what, before, after, and the gain."""
    costs, disk, timed = record["costs"], record["disk"], record["speed"]
    table = [
        [label, show(name, costs[name]["full"]), show(name, costs[name]["cut"]), _less(costs[name])]
        for name, label in SIZES.items()
        if name in costs
    ]
    if disk["full"] is not None:
        sizes = [f"{size / MEGABYTE:.1f} MB" for size in (disk["full"], disk["compressed"])]
        table.append(["folder on disk", *sizes, _less({"full": disk["full"], "cut": disk["compressed"]})])
    else:
        table.append(["folder on disk", "", f"{disk['compressed'] / MEGABYTE:.1f} MB", ""])
    table.append(
        ["time of a forward pass", f"{timed['full_ms']:.2f} ms", f"{timed['compressed_ms']:.2f} ms", faster(timed)]
    )
    if "cut_measured" in costs.get("latency", {}):
        latency = costs["latency"]
        table.append(
            ["the same, alone", show("latency", latency["full"]), show("latency", latency["cut_measured"]), ""]
        )
    return [*table, ["difference of the images", "0 %", percent(record["distances"][record["saved"]]), ""]]


def quality(evaluations: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[str]]]:
    """Rows of the measurements of images; size and time are measured better elsewhere."""
    return [row for row in rows(evaluations) if row[0] not in (SIZE.label, TIME.label)]


def faster(timed: Mapping[str, Any]) -> str:
    """Speed-up with its interval: `1.18 times as fast (1.15 to 1.21)`."""
    low, high = timed["times_faster_between"]
    if low <= 1 <= high:
        return f"no sure difference ({low:.2f} to {high:.2f} times as fast)"
    return f"{timed['times_faster']:.2f} times as fast ({low:.2f} to {high:.2f})"


def headline(record: Mapping[str, Any]) -> str:
    """Result of a run in a few lines: what is saved, how large it is, and how fast."""
    what = (SIZES["params"], "folder on disk", "time of a forward pass")
    lines = [f"{row[0]}: {' -> '.join(filter(None, row[1:3]))}, {row[3]}" for row in gains(record) if row[0] in what]
    return "\n".join([record["verdict"], *(line.removesuffix(", ") for line in lines)])


def _less(cost: Mapping[str, int]) -> str:
    share = cost["cut"] / cost["full"] - 1
    return f"{abs(share):.0%} {'less' if share <= 0 else 'more'}".replace("%", " %")


def _call(sampling: Mapping[str, Any], prompt: str) -> list[str]:
    """Arguments of the pipeline's call."""
    guided = {"true_cfg_scale": sampling["true_cfg_scale"], "negative_prompt": ""}
    given = {name: value for name, value in sampling.items() if name != "true_cfg_scale"}
    return [repr(prompt)] + [
        f"{name}={value!r}" for name, value in (given | (guided if sampling["true_cfg_scale"] > 1 else {})).items()
    ]


def _stage_rows(record: Mapping[str, Any]) -> list[list[str]]:
    config, errors = record["config"], record["output_errors"]
    done = {
        "cut": f"without {record['choice']['dropped']}",
        "repaired": f"repaired by `{config['repair']}`, without training",
        "recovered": f"trained for {config['recovery_steps']} steps",
    }
    return [
        [
            name,
            done[name],
            percent(distance),
            "" if errors[name] is None else f"{errors[name]:.4f}",
            "**saved**" * (name == record["saved"]),
        ]
        for name, distance in record["distances"].items()
    ]


def _chosen(record: Mapping[str, Any]) -> str:
    choice = record["choice"]
    if not choice["front"]:
        return f"`{choice['asked']}` names the blocks."
    return (
        f"`{choice['asked']}` was asked for, and {choice['dropped']} chosen: the sets of blocks with the least estimated error, the sum of "
        f"what `{record['config']['criterion']}` says of their blocks, were tried by running the model without them, and of those that "
        "are small enough the one with the least measured error was taken. An error is the change of what the network predicts, relative to "
        "its size: 0 is no change, 1 as wrong as predicting nothing."
    )


def _how(record: Mapping[str, Any]) -> list[str]:
    config = record["config"]
    source = (
        f"{record['images']} images of {config['images']}"
        if record["images"]
        else f"{config['calibration_images']} images that the full model drew of {record['prompts']} prompts"
    )
    lines = [f"Material: {source}."]
    if config["repair"] != "none":
        lines.append(f"Repair by `{config['repair']}`, fitted to {config['repair_points']} noised images.")
    if config["recovery_steps"]:
        lines.append(
            f"Recovery: {config['recovery_steps']} training steps with a batch size of {config['batch']}, learning rate "
            f"{config['learning_rate']}; the loss is {config['task_weight']} times the error to the material, "
            f"{config['output_weight']} times the error to the full model's predictions, and {config['feature_weight']} times the "
            "error to the output of its blocks. Values of every tenth step are in `metrics.jsonl`."
        )
    lines.append(f"Seed {config['seed']}. Every number and option of this run is in `compress.json`.")
    return lines


def _choice(config: CompressConfig, outcome: Outcome) -> dict[str, Any]:
    selection = outcome.selection

    def spelled(positions: Sequence[int]) -> str:
        return outcome.spelled(outcome.blocks[position] for position in positions)

    return {
        "asked": config.asked,
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


def _thinned(front: Sequence[Any]) -> list[Any]:
    if len(front) <= FRONT_ROWS:
        return list(front)
    return [front[i * (len(front) - 1) // (FRONT_ROWS - 1)] for i in range(FRONT_ROWS)]


def _adding_up(additivity: Mapping[str, Any]) -> str:
    sets = additivity["sets"]
    if additivity["r2"] is None:
        return f"Do errors add up? That cannot be said from {sets} set{'s' if sets > 1 else ''}; it takes three of different errors."
    line = (
        ""
        if additivity["r2_linear"] is None
        else f", and {additivity['r2_linear']:.3f} if they are off by the same factor and offset everywhere"
    )
    return (
        f"Do errors add up? R^2, the share of the differences between the errors of these {sets} sets that is predicted by adding "
        f"up those of single blocks, is {additivity['r2']:.3f}{line} (1: they add up; 0 or less: they do not)."
    )


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
