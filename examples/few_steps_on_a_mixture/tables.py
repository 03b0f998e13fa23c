"""`results.json` of the experiment as tables: `python examples/few_steps_on_a_mixture/tables.py
RESULTS > report.md`."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from predictions import PREDICTIONS, Quantity

from fastdistill.evaluation.statistics import over_seeds

SCORES = {
    "sliced_wasserstein": ("sliced Wasserstein-1", "{:.3f}"),
    "energy_distance": ("energy distance", "{:.4f}"),
    "total_variation": ("mode weights, total variation", "{:.3f}"),
    "outside": ("in no mode", "{:.1%}"),
    "spread": ("variance within modes", "{:.2f}"),
    "displacement": ("distance from the flow's sample", "{:.2f}"),
}
# Whatever the number of steps: what every distance is to be compared with.
FLOORS = {"perfect sampler": "", "teacher, 256 steps": "256"}

Rows = list[list[str]]


def tables(results: dict[str, Any]) -> str:
    """Markdown of everything that `results.json` shows."""
    rows, parts = results["rows"], [setting(results["config"]), ""]
    for steps in ("1", "2", "4"):
        parts += [
            f"### {steps} step{'s' if steps != '1' else ''}",
            "",
            *_markdown(_heading(), by_method(rows, steps)),
            "",
        ]
    parts += ["### Mode weights of the students of one step", "", *_markdown(*mode_weights(rows)), ""]
    parts += [
        "### What theory says, and what was measured",
        "",
        *_markdown(["", "theory", "measured", "holds for"], compared(rows)),
        "",
    ]
    parts += ["### What DMD2's critic sees, and what the last step returns", ""]
    parts += [
        "Sliced Wasserstein-1 of the student's `x_0` at all of its steps together, which is what DMD2 matches, and "
        "at the last.",
        "",
    ]
    parts += [*_markdown(["", "2 steps, all", "2 steps, last", "4 steps, all", "4 steps, last"], pooled(rows)), ""]
    parts += ["### Seconds to train one student", "", *_markdown(["", "1 step", "2 steps", "4 steps"], seconds(rows))]
    return "\n".join(parts) + "\n"


def setting(config: dict[str, Any]) -> str:
    """Facts that all rows share."""
    return (
        "Given its label, the data are four modes of unequal weight, and nothing lies between them. Every student "
        "starts from one network "
        f"of flow matching (`start`) and trains for {config['training_steps']} steps of {config['batch']} samples "
        "against the exact "
        "teacher; DMD2 updates its student in every fifth of them, TDM in every second. Averaged weights, "
        f"{config['samples']} samples, "
        f"means and standard deviations over seeds {', '.join(map(str, config['seeds']))}. Each label's samples are "
        "compared with as many "
        "draws of the data. In no mode is what is farther than four deviations from each; the distance from the "
        "flow's sample is that to "
        "where the exact flow ends from the same noise (the perfect sampler shows what chance gives)."
    )


def _heading() -> list[str]:
    return ["", *(title for title, _ in SCORES.values())]


def by_method(rows: dict[str, Any], steps: str) -> Rows:
    """One line for each method that has students of `steps` steps, behind the floors."""
    found = [(label, rows[label.split(",")[0]][key]) for label, key in FLOORS.items()]
    found += [(name, by_steps[steps]) for name, by_steps in rows.items() if steps in by_steps]
    return [[label, *(_over_seeds(by_seed, score) for score in SCORES)] for label, by_seed in found]


def mode_weights(rows: dict[str, Any]) -> tuple[list[str], Rows]:
    """The mean over seeds of each mode's share, of label 0 and of label 1; the perfect sampler's
    are the true ones but for noise."""
    lines = []
    for name, by_steps in rows.items():
        by_seed = by_steps.get("1", by_steps.get(""))
        if by_seed is None:
            continue
        shares = [[share for of_label in scores["weights"] for share in of_label] for scores in by_seed.values()]
        lines.append([name, *(f"{statistics.fmean(share):.3f}" for share in zip(*shares, strict=True))])
    return ["", *(f"{label}:{mode}" for label in (0, 1) for mode in range(4))], lines


def compared(rows: dict[str, Any]) -> Rows:
    """Each prediction with both of its sides, and the seeds in which it holds."""
    lines = []
    for prediction in PREDICTIONS:
        pairs = [(_by_seed(rows, quantity), quantity) for quantity in (prediction.less, prediction.more)]
        held = [prediction.holds(*(side[seed][quantity.score] for side, quantity in pairs)) for seed in pairs[0][0]]
        measured = " against ".join(
            f"{_over_seeds(side, quantity.score)} ({_where(quantity)})" for side, quantity in pairs
        )
        seeds = f"{sum(held)} of {len(held)} seeds"
        verdict = seeds if all(held) else f"**{seeds}**"
        lines.append([prediction.about, prediction.theory, f"{SCORES[prediction.less.score][0]}: {measured}", verdict])
    return lines


def _by_seed(rows: dict[str, Any], quantity: Quantity) -> dict[str, Any]:
    found: dict[str, Any] = rows[quantity.row]["" if quantity.steps is None else str(quantity.steps)]
    return found


def _where(quantity: Quantity) -> str:
    return (
        quantity.row
        if quantity.steps is None
        else f"{quantity.row}, {quantity.steps} step{'s' if quantity.steps > 1 else ''}"
    )


def pooled(rows: dict[str, Any]) -> Rows:
    lines = []
    for name, by_steps in rows.items():
        if {"2", "4"} <= by_steps.keys() and all("pooled" in scores for scores in by_steps["2"].values()):
            of_all = {
                steps: {seed: scores["pooled"] for seed, scores in by_steps[steps].items()} for steps in ("2", "4")
            }
            pairs = [(of_all[steps], by_steps[steps]) for steps in ("2", "4")]
            lines.append([name, *(_over_seeds(by_seed, "sliced_wasserstein") for pair in pairs for by_seed in pair)])
    return lines


def seconds(rows: dict[str, Any]) -> Rows:
    return [
        [
            name,
            *(
                f"{statistics.fmean(s['seconds'] for s in by_steps[steps].values()):.0f}" if steps in by_steps else ""
                for steps in "124"
            ),
        ]
        for name, by_steps in rows.items()
        if all("seconds" in scores for by_seed in by_steps.values() for scores in by_seed.values())
    ]


def _over_seeds(by_seed: dict[str, Any], score: str) -> str:
    """Mean and standard deviation; nothing where it is not defined, as the variance within modes of
    samples that are in none."""
    form, values = SCORES[score][1], [scores[score] for scores in by_seed.values()]
    return "" if any(value is None for value in values) else over_seeds(values, form)


def _markdown(head: Sequence[str], rows: Rows) -> list[str]:
    return [f"| {' | '.join(head)} |", "|" + "---|" * len(head), *(f"| {' | '.join(row)} |" for row in rows)]


if __name__ == "__main__":
    print(tables(json.loads(Path(sys.argv[1]).read_text())), end="")
