"""`results.json` of the experiment as tables: `python examples/compare_criteria/tables.py RESULTS >
report.md`."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from fastdistill.evaluation.statistics import over_seeds

STAGES = {"cut": "cut", "repaired": "repaired", "recovered": "recovered", "repaired_recovered": "repaired, recovered"}
ERROR, FRECHET, ACCURACY, PSNR = "output_error", "frechet_distance", "caption_accuracy", "psnr_to_reference"
FORMS = {ERROR: "{:.3f}", FRECHET: "{:.1f}", ACCURACY: "{:.1%}", PSNR: "{:.1f}"}
LAST = "repaired_recovered"

Rows = list[list[str]]


def tables(results: dict[str, Any]) -> str:
    """Markdown of everything that `results.json` shows."""
    sets = results["sets"]
    drops = sorted({row["drops"] for row in sets})
    third = sets[0]["drops"]
    parts = []
    for count in [third, *(count for count in drops if count != third)]:
        rows = [row for row in sets if row["drops"] == count]
        seeds = sorted({row["seed"] for row in rows})
        parts += [
            f"### {count} of {results['blocks']} blocks dropped, seed{'s' if len(seeds) > 1 else ''} {_words(seeds)}",
            "",
        ]
        parts += [*_markdown(_heading(), by_criterion(rows)), ""]
        parts += ["Sets, by seed: " + "; ".join(_sets(rows, seed) for seed in seeds) + ".", ""]
    parts += ["### Does a score say what is left in the end?", ""]
    parts += [*_markdown(["predictor", "cut", "repaired", "recovered", "repaired, recovered"], correlations(sets)), ""]
    r2, count = additivity(sets)
    parts += [
        f"Do errors add up? Over these {count} sets, R^2 of the sum of single errors as a prediction of the joint "
        f"error: {r2:.2f}.",
        "",
    ]
    parts += ["### Repairs, output error of random sets", "", *repairs(results["repairs"])]
    parts += ["", "### What a repair is worth before a short recovery", ""]
    parts += _markdown(["steps", "from the cut", "from the repaired model"], head_starts(results["head_start"]))
    return "\n".join(parts) + "\n"


def by_criterion(rows: Sequence[dict[str, Any]]) -> Rows:
    """One line for each criterion, best output error in the end first."""
    chosen: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        for name in row["chosen_by"]:
            chosen.setdefault(name, []).append(row)

    def cell(found: Sequence[dict[str, Any]], stage: str, metric: str) -> str:
        return (
            ""
            if any(stage not in row for row in found)
            else over_seeds([row[stage][metric] for row in found], FORMS[metric])
        )

    def final(name: str) -> float:
        return statistics.fmean(row[LAST][ERROR] for row in chosen[name])

    return [
        [
            name,
            *(cell(chosen[name], stage, ERROR) for stage in STAGES),
            *(cell(chosen[name], stage, FRECHET) for stage in ("cut", "repaired", LAST)),
            cell(chosen[name], "cut", ACCURACY),
            cell(chosen[name], LAST, ACCURACY),
            cell(chosen[name], LAST, PSNR),
        ]
        for name in sorted(chosen, key=final)
    ]


def _heading() -> list[str]:
    errors = [f"output error, {label}" for label in STAGES.values()]
    return ["criterion", *errors, *(f"Frechet, {STAGES[stage]}" for stage in ("cut", "repaired", LAST)), *LABELS]


LABELS = ["accuracy, cut", "accuracy, repaired, recovered", "PSNR, repaired, recovered"]


def correlations(sets: Sequence[dict[str, Any]]) -> Rows:
    """Spearman's rank correlation of what each criterion predicts for a set with its output error
    at each stage; mean over seeds.

    Every criterion predicts every set that any of them chose, at equal size and seed.
    """
    groups: dict[tuple[int, int], list[dict[str, Any]]] = {}
    for row in sets:
        if all(stage in row for stage in STAGES):
            groups.setdefault((row["seed"], row["drops"]), []).append(row)
    predictors: dict[str, Callable[[dict[str, Any]], float]] = {
        name: lambda row, name=name: row["sums"][name]
        for name in sets[0]["sums"]  # type: ignore[misc]
    }
    predictors["joint error of the cut"] = lambda row: row["cut"][ERROR]
    predictors["joint error after repair"] = lambda row: row["repaired"][ERROR]
    lines = []
    for name, predict in predictors.items():
        found = {}
        for stage in STAGES:
            values = [
                spearman([predict(row) for row in rows], [row[stage][ERROR] for row in rows])
                for rows in groups.values()
            ]
            found[stage] = statistics.fmean(values)
        lines.append((found[LAST], [name, *(f"{value:.2f}" for value in found.values())]))
    return [line for _, line in sorted(lines, key=lambda pair: -pair[0])]


def spearman(first: Sequence[float], second: Sequence[float]) -> float:
    """Pearson's correlation of the ranks; of equal values the mean rank. 0 where one side is
    constant."""
    ranks = [_ranks(first), _ranks(second)]
    if any(len(set(values)) == 1 for values in ranks):
        return 0.0
    return statistics.correlation(*ranks)


def _ranks(values: Sequence[float]) -> list[float]:
    ordered = sorted(values)
    return [ordered.index(value) + (ordered.count(value) - 1) / 2 for value in values]


def additivity(sets: Sequence[dict[str, Any]]) -> tuple[float, int]:
    joint = [row["cut"][ERROR] for row in sets]
    predicted = [row["sums"]["output"] for row in sets]
    mean = statistics.fmean(joint)
    missed = sum((measured - expected) ** 2 for measured, expected in zip(joint, predicted, strict=True))
    return 1 - missed / sum((measured - mean) ** 2 for measured in joint), len(sets)


def repairs(rows: Sequence[dict[str, Any]]) -> list[str]:
    kinds = [name for name in rows[0] if name not in ("dropped", "cut")]
    body = [[row["dropped"], *(f"{row[name]:.3f}" for name in ("cut", *kinds))] for row in rows]
    better = [sum(row[name] < row["cut"] for row in rows) for name in kinds]
    ratios = [statistics.geometric_mean(row[name] / row["cut"] for row in rows) for name in kinds]
    body.append(["better than the cut", "", *(f"{count} of {len(rows)}" for count in better)])
    body.append(["ratio to the cut, geometric mean", "", *(f"{ratio:.2f}" for ratio in ratios)])
    return _markdown(["dropped", "cut", *kinds], body)


def head_starts(by_seed: dict[str, dict[str, dict[str, float]]]) -> Rows:
    """Output errors after recoveries of so many steps, mean and standard deviation over seeds."""
    seeds = list(by_seed.values())

    def cell(steps: str, name: str) -> str:
        return over_seeds([found[steps][name] for found in seeds], "{:.3f}")

    return [[steps, *(cell(steps, name) for name in ("recovered", "repaired_recovered"))] for steps in seeds[0]]


def _sets(rows: Sequence[dict[str, Any]], seed: int) -> str:
    own = [row for row in rows if row["seed"] == seed]
    return f"{seed}: " + ", ".join(f"{row['dropped']} ({', '.join(row['chosen_by'])})" for row in own)


def _words(values: Iterable[int]) -> str:
    return ", ".join(map(str, values))


def _markdown(head: Sequence[str], rows: Rows) -> list[str]:
    return [f"| {' | '.join(head)} |", "|" + "---|" * len(head), *(f"| {' | '.join(row)} |" for row in rows)]


if __name__ == "__main__":
    print(tables(json.loads(Path(sys.argv[1]).read_text())), end="")
