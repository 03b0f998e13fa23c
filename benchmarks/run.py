"""Runs the operator benchmark, keeps its JSON under results/<machine>/ and writes the tables of README.md
from it.

python -m benchmarks.run [--gpu | --default-malloc | --tables-only]
"""

from __future__ import annotations

import json
import math
import os
import platform
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
README = HERE / "README.md"
BEGIN, END = "<!-- tables: written by benchmarks/run.py -->", "<!-- end of tables -->"
CONTENDERS = ("eager", "compile", "library", "native", "triton", "copy")


def cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists() and (match := re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text())):
        return match[1].strip()
    return platform.processor() or platform.machine()


def machine(malloc: str) -> tuple[str, dict[str, Any]]:
    """A folder name and the facts that a number is worth nothing without."""
    import torch

    import fastdistill

    facts = fastdistill.info()
    gpu = facts["gpus"][0] if facts["gpus"] else None
    device = gpu or f"{cpu_name()} {os.cpu_count()} cores"
    git = subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=12"], cwd=HERE, capture_output=True, text=True)
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-"), {
        "device": device,
        **({} if gpu else {"malloc": "as the system has it" if malloc == "default" else "keeps freed memory"}),
        "threads": torch.get_num_threads(),
        "cpu_kernels": facts["cpu"]["kernels"],
        "python": facts["python"],
        "torch": torch.__version__,
        "triton": facts["packages"]["triton"],
        "fastdistill": facts["fastdistill"],
        "commit": git.stdout.strip() or "not committed",
    }


def measure(malloc: str) -> None:
    folder, facts = machine(malloc)
    with tempfile.TemporaryDirectory() as scratch:
        raw = Path(scratch, "raw.json")
        command = [sys.executable, "-m", "pytest", str(HERE / "test_ops.py"), "-q", "--benchmark-enable"]
        subprocess.run(
            [*command, f"--benchmark-json={raw}", "--benchmark-columns=median,iqr"],
            check=True,
            cwd=HERE.parent,
            env={**os.environ, "FASTDISTILL_BENCH_MALLOC": malloc},
        )
        measured = json.loads(raw.read_text())["benchmarks"]
    rows = [{**b["extra_info"], **quartiles(b)} for b in measured]
    target = HERE / "results" / folder / ("ops-default-malloc.json" if malloc == "default" else "ops.json")
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps({"machine": facts, "rows": rows}, indent=1) + "\n")


def quartiles(measured: dict[str, Any]) -> dict[str, float]:
    stats = measured["stats"]
    cold = measured["extra_info"].pop("cold_ms", None)
    times = cold or [stats[q] * 1e3 for q in ("q1", "median", "q3")]
    return {f"{name}_ms": round(time, 5) for name, time in zip(("q1", "median", "q3"), times, strict=True)}


def table(results: dict[str, Any]) -> str:
    facts, rows = results["machine"], results["rows"]
    times: dict[tuple[str, ...], dict[str, float]] = {}
    for row in rows:
        key = (row["op"], row["sample"], row["dtype"], row["mode"])
        times.setdefault(key, {})[row["contender"]] = row["median_ms"]
    shown = [c for c in CONTENDERS if any(c in t for t in times.values())]
    fast = [c for c in ("native", "triton") if c in shown]
    against = [c for c in ("eager", "compile", "library") if c in shown]
    malloc = f", malloc {facts['malloc']}" if "malloc" in facts else ""
    lines = [f"### {facts['device']}{malloc}", "", ", ".join(f"{k} {v}" for k, v in facts.items() if k not in ("device", "malloc")), ""]
    lines += ["Ratios of medians over the rows of an operator: geometric mean, and the smallest.", ""]
    lines += summary(times, fast, against)
    lines += ["", "Milliseconds, and the part of the copy's bandwidth that the operator reaches.", ""]
    header = [
        "op",
        "sample",
        "dtype",
        "mode",
        *shown,
        *(f"{c} vs {base}" for c in fast for base in against),
        *(f"{c} vs copy" for c in fast),
    ]
    lines += ["| " + " | ".join(header) + " |", "|" + "---|" * 4 + "---:|" * (len(header) - 4)]
    for key, t in times.items():
        cells = [f"{t[c]:.3g}" if c in t else "" for c in shown]
        cells += [f"{t[b] / t[c]:.2f}x" if c in t and b in t else "" for c in fast for b in against]
        cells += [f"{t['copy'] / t[c]:.0%}" if c in t else "" for c in fast]
        lines.append("| " + " | ".join([*key, *cells]) + " |")
    return "\n".join(lines)


def summary(times: dict[tuple[str, ...], dict[str, float]], fast: list[str], against: list[str]) -> list[str]:
    """One line for each operator and mode that trains: forward + backward, or forward where there is no backward."""
    pairs = [(c, base) for c in fast for base in against]
    lines = ["| op | mode | " + " | ".join(f"{c} vs {base}" for c, base in pairs) + " |", "|---|---|" + "---:|" * len(pairs)]
    for op in dict.fromkeys(key[0] for key in times):
        modes = {key[3] for key in times if key[0] == op}
        mode = "both" if "both" in modes else "forward"
        rows = [t for key, t in times.items() if key[0] == op and key[3] == mode]
        cells = []
        for c, base in pairs:
            ratios = [t[base] / t[c] for t in rows if c in t and base in t]
            mean = math.exp(sum(map(math.log, ratios)) / len(ratios)) if ratios else 0.0
            cells.append(f"{mean:.1f}x (from {min(ratios):.1f}x)" if ratios else "")
        lines.append(f"| {op} | {mode} | " + " | ".join(cells) + " |")
    return lines


def write_tables() -> None:
    results = sorted(HERE.glob("results/*/ops*.json"))
    tables = "\n\n".join(table(json.loads(path.read_text())) for path in results)
    before, rest = README.read_text().split(BEGIN)
    _, after = rest.split(END)
    README.write_text(f"{before}{BEGIN}\n\n{tables}\n\n{END}{after}")


if __name__ == "__main__":
    if "--gpu" in sys.argv[1:]:
        import torch

        if not torch.cuda.is_available():
            sys.exit("no GPU: torch.cuda.is_available() is false; `make bench` measures on the CPU")
    if "--tables-only" not in sys.argv[1:]:
        measure("default" if "--default-malloc" in sys.argv[1:] else "keep")
    write_tables()
