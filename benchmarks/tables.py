"""Tables of README.md from the JSON under results/."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
README = HERE / "README.md"
BEGIN, END = "<!-- tables: written by benchmarks/run.py -->", "<!-- end of tables -->"

OPERATORS = ("eager", "compile", "library", "native", "triton", "copy")
OPERATOR_BASELINES = ("eager", "compile", "library")

Key = tuple[str, str, str, str]


def write_tables() -> None:
    results = [json.loads(path.read_text()) for path in sorted(HERE.glob("results/*/ops*.json"))]
    models = [json.loads(path.read_text()) for path in sorted(HERE.glob("results/*/models.json"))]
    tables = "\n\n".join([*map(model_table, models), *map(operator_table, results)])
    before, rest = README.read_text().split(BEGIN)
    _, after = rest.split(END)
    README.write_text(f"{before}{BEGIN}\n\n{tables}\n\n{END}{after}")


def heading(what: str, facts: dict[str, Any]) -> list[str]:
    malloc = f", malloc {facts['malloc']}" if "malloc" in facts else ""
    rest = ", ".join(f"{k} {v}" for k, v in facts.items() if k not in ("device", "malloc"))
    return [f"### {what} on {facts['device']}{malloc}", "", rest, ""]


def by_key(rows: list[dict[str, Any]]) -> dict[Key, dict[str, dict[str, Any]]]:
    """Rows of every contender by what they measure."""
    groups: dict[Key, dict[str, dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["op"], row["workload"], row["dtype"], row["mode"]), {})[row["contender"]] = row
    return groups


def model_table(results: dict[str, Any]) -> str:
    """Table with one line for each contender: its time relative to the first contender's, memory,
    and share of the peak.

    Memory and the share of the peak of matrix products are there where the same run measured them.
    """
    rows = results["rows"]
    peaks = {row["dtype"]: row["flops"] / row["median_ms"] for row in rows if row["op"] == "matrix product"}
    lines = heading("Models", results["machine"])
    lines += [
        "Milliseconds: median and quartiles of turns that the contenders take. Speed: relative to the first contender.",
        "",
    ]
    lines += [
        "| what | workload | dtype | mode | contender | ms | speed | peak MiB | of matmul peak | note |",
        "|" + "---|" * 5 + "---:|" * 4 + "---|",
    ]
    for key, contenders in by_key(rows).items():
        first = next(iter(contenders.values()))["median_ms"]
        for name, row in contenders.items():
            quartiles = f"{row['median_ms']:.4g} ({row['q1_ms']:.4g} to {row['q3_ms']:.4g})"
            memory = f"{row['peak_mib']:,.0f}" if row.get("peak_mib") else ""
            peak = peaks.get(row["dtype"])
            part = f"{row['flops'] / row['median_ms'] / peak:.0%}" if peak and row.get("flops") else ""
            cells = [*key, name, quartiles, f"{first / row['median_ms']:.2f}x", memory, part, row.get("note", "")]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def operator_table(results: dict[str, Any]) -> str:
    groups = {
        key: {name: row["median_ms"] for name, row in rows.items()} for key, rows in by_key(results["rows"]).items()
    }
    shown = [c for c in OPERATORS if any(c in times for times in groups.values())]
    fast = [c for c in ("native", "triton") if c in shown]
    against = [c for c in OPERATOR_BASELINES if c in shown]
    lines = heading("Operators", results["machine"])
    lines += [
        "Ratios of medians over the rows of an operator: geometric mean, and the smallest.",
        "",
        *summary(groups, fast, against),
    ]
    lines += ["", "Milliseconds, and the share of the copy's bandwidth that the operator reaches.", ""]
    ratios = [*(f"{c} vs {base}" for c in fast for base in against), *(f"{c} vs copy" for c in fast)]
    header = ["op", "workload", "dtype", "mode", *shown, *ratios]
    lines += ["| " + " | ".join(header) + " |", "|" + "---|" * 4 + "---:|" * (len(header) - 4)]
    for key, t in groups.items():
        cells = [f"{t[c]:.3g}" if c in t else "" for c in shown]
        cells += [f"{t[b] / t[c]:.2f}x" if c in t and b in t else "" for c in fast for b in against]
        cells += [f"{t['copy'] / t[c]:.0%}" if c in t and "copy" in t else "" for c in fast]
        lines.append("| " + " | ".join([*key, *cells]) + " |")
    return "\n".join(lines)


def summary(groups: dict[Key, dict[str, float]], fast: list[str], against: list[str]) -> list[str]:
    """One line for each operator and mode that trains: forward + backward, or forward where there
    is no backward."""
    pairs = [(c, base) for c in fast for base in against]
    lines = [
        "| op | mode | " + " | ".join(f"{c} vs {base}" for c, base in pairs) + " |",
        "|---|---|" + "---:|" * len(pairs),
    ]
    for op in dict.fromkeys(key[0] for key in groups):
        modes = {key[3] for key in groups if key[0] == op}
        mode = "both" if "both" in modes else "forward"
        rows = [times for key, times in groups.items() if key[0] == op and key[3] == mode]
        cells = []
        for c, base in pairs:
            ratios = [t[base] / t[c] for t in rows if c in t and base in t]
            mean = math.exp(sum(map(math.log, ratios)) / len(ratios)) if ratios else 0.0
            cells.append(f"{mean:.1f}x (from {min(ratios):.1f}x)" if ratios else "")
        lines.append(f"| {op} | {mode} | " + " | ".join(cells) + " |")
    return lines
