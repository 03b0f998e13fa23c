"""What a run leaves for people and programs: ``report.md`` and ``distill.json``."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from fastdistill.distill.config import DistillConfig
from fastdistill.distill.job import Outcome
from fastdistill.models.sampling import SamplingDefaults
from fastdistill.run.versions import CLOSING, versions

REPORT = """\
# {{ config.model }} in {{ config.steps }} step{{ "s" if config.steps > 1 }}, by {{ config.method }}

{{ calls.teacher }} calls of the network for an image before, {{ calls.student }} after; \
{{ "{:.2f}".format(parameters.teacher / 1e6) }} M parameters in the teacher's transformer, \
{{ "{:.2f}".format(parameters.student / 1e6) }} M in the student's. `model/` is a stock diffusers pipeline:

    from diffusers import FluxPipeline
    pipeline = FluxPipeline.from_pretrained("{{ output }}/model")
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


def manifest(
    config: DistillConfig,
    outcome: Outcome,
    teacher_sampling: SamplingDefaults,
    sampling: SamplingDefaults,
    *,
    prompts: Sequence[str],
    images: int,
    command: str,
) -> dict[str, Any]:
    """Everything about the run as JSON: what was trained, how, what came of it, and with which versions.

    Args:
        sampling: of the student.
        images: the number of images from a folder that were trained on, 0 if the teacher drew them.
    """
    return {
        "format": 1,
        "command": command,
        **dataclasses.asdict(outcome),
        "sampling": dataclasses.asdict(sampling),
        "teacher_sampling": dataclasses.asdict(teacher_sampling),
        "prompts": len(prompts),
        "images": images,
        "config": {name: str(value) if isinstance(value, Path) else value for name, value in dataclasses.asdict(config).items()},
        "versions": versions(),
    }


def report(
    record: Mapping[str, Any], measured: Sequence[tuple[str, Sequence[str]]], *, example: str, output: Path, training_data: str
) -> str:
    """``report.md`` from a :func:`manifest` and, by row, the label and the texts of each model of its evaluation."""
    config = record["config"]
    material = {
        "prompts": f"{record['prompts']} prompts and no images",
        "images": f"{config['num_images']} images that the teacher drew",
        "pairs": f"{config['num_images']} pairs of noise and what the teacher drew from it",
    }[training_data]
    if record["images"]:
        material = f"{record['images']} images of {config['images']}"
    template = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True).from_string(REPORT + CLOSING)
    return template.render(**{**record, "measured": measured, "material": material, "example": example, "output": output})
