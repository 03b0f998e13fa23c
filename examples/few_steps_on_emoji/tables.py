"""The results of the experiment as tables for people."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2

from fastdistill.evaluation.statistics import over_seeds

TABLES = """\
# Few-step students of the emoji FLUX

Each student had {{ facts.budget }} passes of the transformer over a batch of {{ facts.batch }} images, a backward pass counted as two, \
and of the teacher's images, if its method takes any, {{ facts.images }}. Measured on {{ facts.evaluated }} images of each \
seed, mean ± standard deviation over the seeds that are named. A call is one evaluation of the transformer for one image.
{% for steps, rows in groups %}
## {{ steps }} step{{ "s" if steps > 1 }}

| | seeds | calls | training steps | {{ metrics|join(" | ") }} |
|---|---|---:|---:|{% for _ in metrics %}---:|{% endfor %}
{% for row in rows -%}
| {{ row|join(" | ") }} |
{% endfor %}
{%- endfor %}"""

METRICS = {
    "frechet_distance": ("Frechet distance", "{:.2f}"),
    "frechet_distance_to_reference": ("to the teacher's images", "{:.2f}"),
    "background_total_variation": ("background total variation", "{:.3f}"),
    "background_purity": ("background purity", "{:.1%}"),
    "caption_accuracy": ("caption accuracy", "{:.1%}"),
    "psnr_to_reference": ("PSNR to the teacher, dB", "{:.1f}"),
}


def tables(facts: Mapping[str, Any], runs: Sequence[Mapping[str, Any]]) -> str:
    groups = []
    for steps in sorted({run["steps"] for run in runs}):
        by_name: dict[str, dict[int, Mapping[str, Any]]] = defaultdict(dict)
        for run in (run for run in runs if run["steps"] == steps):
            for name, measured in run["evaluation"].items():
                student = name == "student"
                extra = {"training_steps": run["training_steps"]} if student else {}
                by_name[run["method"] if student else name][run["seed"]] = {
                    **measured,
                    "calls": run["calls"][name],
                    **extra,
                }
        groups.append((steps, [_row(name, found) for name, found in by_name.items()]))
    template = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True).from_string(TABLES)
    return template.render(facts=facts, groups=groups, metrics=[title for title, _ in METRICS.values()])


def _row(name: str, found: Mapping[int, Mapping[str, Any]]) -> list[str]:
    """One model: its seeds, what it cost, and every metric over the seeds."""
    seeds = sorted(found)
    first = found[seeds[0]]
    row = [name, ", ".join(map(str, seeds)), str(first["calls"]), str(first.get("training_steps", ""))]
    for key, (_, form) in METRICS.items():
        values = [found[seed][key] for seed in seeds if found[seed].get(key) is not None]
        row.append(over_seeds(values, form) if values else "")
    return row
