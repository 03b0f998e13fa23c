"""Runs the operator benchmark, keeps its JSON under results/<machine>/ and writes the tables of README.md
from it.

python -m benchmarks.run [--tables-only]
"""

from __future__ import annotations

import json
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
CONTENDERS = ("eager", "compile", "native", "triton", "copy")


def cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists() and (match := re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text())):
        return match[1].strip()
    return platform.processor() or platform.machine()


def machine() -> tuple[str, dict[str, Any]]:
    """A folder name and the facts that a number is worth nothing without."""
    import torch

    import fastdistill

    facts = fastdistill.info()
    gpu = facts["gpus"][0] if facts["gpus"] else None
    device = gpu or f"{cpu_name()} {os.cpu_count()} cores"
    git = subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=12"], cwd=HERE, capture_output=True, text=True)
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-"), {
        "device": device,
        "threads": torch.get_num_threads(),
        "cpu_kernels": facts["cpu"]["kernels"],
        "python": facts["python"],
        "torch": torch.__version__,
        "triton": facts["packages"]["triton"],
        "fastdistill": facts["fastdistill"],
        "commit": git.stdout.strip() or "not committed",
    }


def measure() -> None:
    folder, facts = machine()
    with tempfile.TemporaryDirectory() as scratch:
        raw = Path(scratch, "raw.json")
        command = [sys.executable, "-m", "pytest", str(HERE / "test_ops.py"), "-q", "--benchmark-enable"]
        subprocess.run(
            [*command, f"--benchmark-json={raw}", "--benchmark-columns=median,iqr"],
            check=True,
            cwd=HERE.parent,
        )
        measured = json.loads(raw.read_text())["benchmarks"]
    rows = [{**b["extra_info"], **{f"{q}_ms": round(b["stats"][q] * 1e3, 4) for q in ("median", "q1", "q3")}} for b in measured]
    target = HERE / "results" / folder / "ops.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps({"machine": facts, "rows": rows}, indent=1) + "\n")


def table(results: dict[str, Any]) -> str:
    facts, rows = results["machine"], results["rows"]
    times: dict[tuple[str, ...], dict[str, float]] = {}
    for row in rows:
        key = (row["op"], row["sample"], row["dtype"], row["mode"])
        times.setdefault(key, {})[row["contender"]] = row["median_ms"]
    shown = [c for c in CONTENDERS if any(c in t for t in times.values())]
    fast = [c for c in ("native", "triton") if c in shown]
    ratios = [f"{c} vs {base}" for c in fast for base in ("eager", "compile")]
    header = ["op", "sample", "dtype", "mode", *(f"{c} ms" for c in shown), *ratios]
    lines = [
        f"### {facts['device']}",
        "",
        ", ".join(f"{k} {v}" for k, v in facts.items() if k != "device"),
        "",
    ]
    lines += ["| " + " | ".join(header) + " |", "|" + "---|" * 4 + "---:|" * (len(header) - 4)]
    for key, t in times.items():
        cells = [f"{t[c]:.2f}" if c in t else "" for c in shown]
        cells += [f"{t[b] / t[c]:.2f}x" if c in t and b in t else "" for c in fast for b in ("eager", "compile")]
        lines.append("| " + " | ".join([*key, *cells]) + " |")
    return "\n".join(lines)


def write_tables() -> None:
    results = sorted(HERE.glob("results/*/ops.json"))
    tables = "\n\n".join(table(json.loads(path.read_text())) for path in results)
    before, rest = README.read_text().split(BEGIN)
    _, after = rest.split(END)
    README.write_text(f"{before}{BEGIN}\n\n{tables}\n\n{END}{after}")


if __name__ == "__main__":
    if "--tables-only" not in sys.argv[1:]:
        measure()
    write_tables()
