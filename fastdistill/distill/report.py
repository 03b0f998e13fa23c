"""Report of a distillation for people: `report.md`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from fastdistill.evaluation.table import rows
from fastdistill.run.versions import CLOSING

REPORT = """\
# {{ config.model }} in {{ config.steps }} step{{ "s" if config.steps > 1 }}, by {{ config.method }}

{{ calls.teacher }} calls of the network for an image before, {{ calls.student }} after; \
{{ "{:.2f}".format(parameters.teacher / 1e6) }} M parameters in the teacher's transformer, \
{{ "{:.2f}".format(parameters.student / 1e6) }} M in the student's. `model/` is a stock diffusers pipeline:

    import torch
    from diffusers import FluxPipeline
    pipeline = FluxPipeline.from_pretrained("{{ output }}/model", dtype=torch.{{ config.save_dtype }})
    pipeline("{{ example }}", num_inference_steps={{ config.steps }}, guidance_scale={{ sampling.guidance_scale }}, \
height={{ sampling.height }}, width={{ sampling.width }}, max_sequence_length={{ sampling.max_sequence_length }}).images[0]

![{{ evaluation|join("; ") }}, from the same prompts and noise](grid.png)
{% if measured %}
## Quality

{{ evaluation.teacher.images }} images of each from the same prompts and noise, seed {{ evaluation.teacher.seeds|join(", ") }}. The \
reference is the teacher in {{ evaluation.teacher.steps }} steps.

| | {{ evaluation|join(" | ") }} |
|---|{% for _ in evaluation %}---|{% endfor %}
| calls of the network | {% for name in evaluation %}{{ calls[name] }} | {% endfor %}
{% for name, values in measured -%}
| {{ name }} | {{ values|join(" | ") }} |
{% endfor %}
{%- endif %}
## Training

{{ config.training_steps }} steps of {{ config.batch }} on {{ material }}; the teacher is guided by true_cfg_scale \
{{ teacher_sampling.true_cfg_scale }}, the times' shift is {{ "{:.3g}".format(shift) }}, seed {{ config.seed }}.\
{% if chosen %} The weights are those of step {{ chosen.step }}, which of all that were measured had the best {{ chosen.monitor }}, \
{{ "{:.2f}".format(chosen.value) }} ({{ config.watch_images }} images from other noise).{% else %} The weights are the averaged ones \
after the last step.{% endif %}

![what was measured while training, and the losses](curves.png)

Images on the way: `samples/`. All values: `metrics.jsonl`; everything else: `distill.json`.

"""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Results of a finished run."""

    evaluation: dict[str, dict[str, Any]]
    """Measurements by model: the teacher, the teacher in as many steps as the student if that is
    another number, the student."""
    calls: dict[str, int]
    """Calls of a network for one image, by model."""
    parameters: dict[str, int]
    shift: float
    watched: dict[str, dict[str, Any]]
    """Measurements of the models that the student was compared with while it was trained."""
    chosen: dict[str, Any] | None
    """The measurement by which the best weights were chosen, and their step."""


def report(record: Mapping[str, Any], *, example: str, output: Path) -> str:
    """Text of `report.md` from the record of a job.

    Args:
        example: a prompt to show how the student is sampled.
    """
    config = record["config"]
    material = {
        "prompts": f"{record['prompts']} prompts and no images",
        "images": f"{config['num_images']} images that the teacher drew",
        "pairs": f"{config['num_images']} pairs of noise and what the teacher drew from it",
    }[record["training_data"]]
    if record["images"]:
        material = f"{record['images']} images of {config['images']}"
    template = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True).from_string(
        REPORT + CLOSING
    )
    measured = rows(list(record["evaluation"].values()))
    return template.render(
        **{**record, "measured": measured, "material": material, "example": example, "output": output}
    )
