"""The benchmarks of whole models run on a GPU; here they run on a CPU at a tiny geometry, and
tables are written from what comes out."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import run, tables
from benchmarks.test_flux_dev import Geometry, attention_contenders, measure_inference, measure_recovery_step
from benchmarks.turns import take_turns

SMALL = {"attention_head_dim": 16, "num_attention_heads": 2, "axes_dims_rope": (4, 6, 6), "joint_attention_dim": 8}
TINY = Geometry(
    device=torch.device("cpu"),
    text=4,
    image=16,
    doubles=2,
    singles=3,
    rounds=2,
    config={**SMALL, "pooled_projection_dim": 8},
)


@pytest.fixture(autouse=True)
def _compile_without_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))


def as_benchmark(info: dict[str, Any]) -> dict[str, Any]:
    return {"extra_info": info, "stats": {"q1": 1.0, "median": 1.0, "q3": 1.0}}


@pytest.mark.slow
def test_whole_models_are_measured_and_their_outputs_compared() -> None:
    inference, recovery = measure_inference(TINY), measure_recovery_step(TINY)
    assert set(inference["turns"]) == {"stock", "patched", "stock compiled", "patched compiled"}
    for name, note in inference["notes"].items():
        assert float(note.split()[1]) < 0.05, f"{name}: {note}"
    rows = [row for info in (inference, recovery) for row in run.rows(as_benchmark(info))]
    assert len(rows) == 6
    assert all(0 < row["q1_ms"] <= row["median_ms"] <= row["q3_ms"] for row in rows)
    text = tables.model_table({"machine": {"device": "a test"}, "rows": rows})
    assert text.count("\n| FLUX.1-dev |") == 6
    assert "2+3 blocks to 1+2" in text


@pytest.mark.parametrize("mode", ["forward", "both"])
def test_attention_contenders_run(mode: str) -> None:
    contenders = attention_contenders(torch.device("cpu"), tokens=12, heads=2, head_size=16, mode=mode)
    assert {"native", "rope_attention"} <= set(contenders)
    assert all(len(quartiles) == 3 for quartiles in take_turns(contenders, 1, 0).values())


def test_the_tables_are_those_of_the_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A ratio of medians, the geometric mean over rows, and the baseline's own name."""
    rows = [
        {"op": "o", "workload": s, "dtype": "float32", "mode": "both", "contender": c, "median_ms": ms}
        for s, times in (("a", {"eager": 8.0, "native": 2.0}), ("b", {"eager": 9.0, "native": 9.0}))
        for c, ms in times.items()
    ]
    folder = tmp_path / "results" / "machine"
    folder.mkdir(parents=True)
    (folder / "ops.json").write_text(json.dumps({"machine": {"device": "a test"}, "rows": rows}))
    monkeypatch.setattr(tables, "HERE", tmp_path)
    monkeypatch.setattr(tables, "README", tmp_path / "README.md")
    tables.README.write_text(f"before {tables.BEGIN} old {tables.END} after")
    tables.write_tables()
    text = tables.README.read_text()
    assert "| o | both | 2.0x (from 1.0x) |" in text
    assert "| o | a | float32 | both | 8 | 2 | 4.00x |" in text
    assert "old" not in text
