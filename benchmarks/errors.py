"""Relative RMS errors against float64, of the operators and of eager PyTorch.

    python -m benchmarks.errors [cuda]

Eager PyTorch runs in the dtype of the operator. On a machine without a GPU, Triton runs in its
interpreter. The table holds geometric means over the cases of the test suite, and over all results
and gradients.
"""

from __future__ import annotations

import math
import os
import sys

if "cuda" not in sys.argv[1:]:
    os.environ["TRITON_INTERPRET"] = "1"

import torch
from torch import Tensor

from fastdistill.ops import OPERATORS
from fastdistill.ops.backend import why_not
from fastdistill.ops.op import FLOATS
from tests.ops.trials import Trial, as_tuple, converted, gradients

DEVICE = "cuda" if "cuda" in sys.argv[1:] else "cpu"


def relative(actual: Tensor, exact: Tensor) -> float:
    return float((actual.double() - exact).norm() / exact.norm())


def errors(trial: Trial) -> tuple[list[float], list[float]]:
    """Errors of the backend and of eager, without results that are zero or exact in either."""
    torch.manual_seed(0)
    arguments = trial.arguments()
    with torch.no_grad():
        upstream = [torch.randn_like(o) for o in as_tuple(trial.op.reference(*arguments))]

    def reference(a: object) -> tuple[Tensor, ...]:
        return as_tuple(trial.op.reference(*a))  # type: ignore[misc]

    exact = gradients(reference, converted(arguments, torch.float64), upstream)
    eager, fast = gradients(reference, arguments, upstream), gradients(trial.run, arguments, upstream)
    pairs = [
        (relative(f, x), relative(e, x))
        for f, e, x in zip(fast, eager, exact, strict=True)
        if x.numel() and float(x.norm())
    ]
    kept = [pair for pair in pairs if min(pair) > 0]
    return [f for f, _ in kept], [e for _, e in kept]


def mean(values: list[float]) -> str:
    return f"{math.exp(sum(map(math.log, values)) / len(values)):.1e}" if values else "exact"


if __name__ == "__main__":
    print(
        "| operator | backend | "
        + " | ".join(f"{str(dtype).removeprefix('torch.')}: error (eager's)" for dtype in FLOATS)
        + " |"
    )
    print("|---|---|" + "---|" * len(FLOATS))
    for op in OPERATORS.values():
        for backend in ("native", "triton"):
            cells = []
            for dtype in FLOATS:
                if why_not(op.name, backend, DEVICE, dtype):
                    continue
                fast: list[float] = []
                eager: list[float] = []
                for case in op.cases():
                    of_fast, of_eager = errors(Trial(op=op, backend=backend, device=DEVICE, dtype=dtype, case=case))
                    fast += of_fast
                    eager += of_eager
                cells.append(f"{mean(fast)} ({mean(eager)})")
            if cells:
                print(f"| {op.name} | {backend} | " + " | ".join(cells) + " |", flush=True)
