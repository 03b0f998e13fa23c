"""Run the benchmarks, keep their JSON under results/<machine>/ and write the tables of README.md
from it.

python -m benchmarks.run [ops | models] [--gpu | --default-malloc | --tables-only]
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.machine import machine
from benchmarks.tables import write_tables

HERE = Path(__file__).parent
SUITES = {"ops": ["test_ops.py"], "models": ["test_blocks.py", "test_flux_dev.py"]}


def measure(suite: str, malloc: str) -> None:
    folder, facts = machine(malloc)
    with tempfile.TemporaryDirectory() as scratch:
        raw = Path(scratch, "raw.json")
        files = [str(HERE / name) for name in SUITES[suite]]
        # A benchmark that fails, for lack of memory perhaps, costs its own rows and not those of
        # the others.
        code = subprocess.run(
            [
                sys.executable,
                "-m",
                "pytest",
                *files,
                "-q",
                "--benchmark-enable",
                f"--benchmark-json={raw}",
                "--benchmark-columns=median,iqr",
            ],
            cwd=HERE.parent,
            env={**os.environ, "FASTDISTILL_BENCH_MALLOC": malloc},
        ).returncode
        measured = json.loads(raw.read_text())["benchmarks"] if raw.exists() else []
    if measured:
        target = (
            HERE / "results" / folder / (f"{suite}-default-malloc.json" if malloc == "default" else f"{suite}.json")
        )
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(
            json.dumps({"machine": facts, "rows": [row for b in measured for row in rows(b)]}, indent=1) + "\n"
        )
    if code:
        write_tables()
        sys.exit(f"some benchmarks failed (pytest exit {code}); their rows are missing")


def rows(measured: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Rows of a benchmark: one if it timed one contender, one for each contender if they took
    turns."""
    info = measured["extra_info"]
    turns = info.pop("turns", None)
    if turns is None:
        times = info.pop("cold_ms", None) or [measured["stats"][q] * 1e3 for q in ("q1", "median", "q3")]
        yield {**info, **named(times)}
        return
    peaks, notes = info.pop("peak_mib", {}), info.pop("notes", {})
    for contender, times in turns.items():
        extra = {"peak_mib": peaks.get(contender), "note": notes.get(contender)}
        yield {
            **info,
            "contender": contender,
            **named(times),
            **{key: value for key, value in extra.items() if value is not None},
        }


def named(times: list[float]) -> dict[str, float]:
    return {f"{name}_ms": round(time, 5) for name, time in zip(("q1", "median", "q3"), times, strict=True)}


if __name__ == "__main__":
    arguments = sys.argv[1:]
    if {"-h", "--help"} & set(arguments):
        print(__doc__)
        sys.exit()
    if unknown := set(arguments) - {*SUITES, "--gpu", "--default-malloc", "--tables-only"}:
        sys.exit(f"unknown: {', '.join(sorted(unknown))}; usage: {__doc__}")
    if "--gpu" in arguments:
        import torch

        if not torch.cuda.is_available():
            sys.exit("no GPU: torch.cuda.is_available() is false; `make bench` measures on the CPU")
    if "--tables-only" not in arguments:
        for suite in [name for name in SUITES if name in arguments] or SUITES:
            measure(suite, "default" if "--default-malloc" in arguments else "keep")
    write_tables()
