"""Time of every operator at the sizes of models, on each contender, and of a copy of as many bytes.

`python -m benchmarks.run` runs this file and writes results/<machine>/ops.json and the tables in
README.md. The contenders take turns in one process: a ratio compares rows of one run, never of two.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.libraries import LIBRARIES
from fastdistill.ops import OPERATORS
from fastdistill.ops.backend import why_not
from fastdistill.ops.op import Case, Operator

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CONTENDERS = ("copy", "eager", "compile", "library", "native", "triton")
DTYPES = (torch.bfloat16, torch.float32)
MODES = ("forward", "backward", "both")

if sys.platform == "linux" and os.environ.get("FASTDISTILL_BENCH_MALLOC") != "default":
    # glibc gives large freed blocks back to the kernel, and a fresh block costs a page fault for
    # every 4 KiB, more than the operator itself. Every contender keeps its memory here, as with the
    # allocators (jemalloc, tcmalloc) that CPU training uses.
    M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
    libc = ctypes.CDLL(None)
    libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    libc.mallopt(M_MMAP_THRESHOLD, 2**30)


def rows() -> list[Any]:
    return [
        pytest.param(op, case, dtype, id=f"{op.name}-{case.id}-{str(dtype).removeprefix('torch.')}")
        for op in OPERATORS.values()
        for case in op.workloads()
        for dtype in DTYPES
    ]


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("op", "case", "dtype"), rows())
def test_op(benchmark: Any, op: Operator, case: Case, dtype: torch.dtype, mode: str, contender: str) -> None:
    if reason := why_absent(op, contender, dtype):
        pytest.skip(reason)
    if mode != "forward" and op.backward_schema is None:
        pytest.skip("no backward")
    torch.manual_seed(0)
    arguments = case.make(dtype, torch.device(DEVICE))
    forward_bytes, backward_bytes = op.bytes_moved(*arguments)
    moved = {"forward": forward_bytes, "backward": backward_bytes, "both": forward_bytes + backward_bytes}[mode]
    run = copy_of(moved) if contender == "copy" else step(function(op, contender, mode), arguments, mode)

    benchmark.extra_info.update(
        op=op.name,
        workload=case.id,
        dtype=str(dtype).removeprefix("torch."),
        mode=mode,
        contender=contender,
        bytes=moved,
    )
    if DEVICE == "cuda":
        benchmark.extra_info["cold_ms"] = cold_quartiles_ms(run)
        benchmark.pedantic(run, rounds=1)  # a benchmark that is not run is an error
    else:
        benchmark.pedantic(run, rounds=25, warmup_rounds=5)


def cold_quartiles_ms(run: Callable[[], None]) -> list[float]:
    """Quartiles of the time on the GPU, with the L2 cache emptied before every round.

    The host launches while the cache is emptied, so the time of a launch counts only if it is
    longer.
    """
    from triton.testing import do_bench

    times = torch.tensor(do_bench(run, warmup=20, rep=60, return_mode="all"))
    return [float(times.quantile(q)) for q in (0.25, 0.5, 0.75)]


def why_absent(op: Operator, contender: str, dtype: torch.dtype) -> str | None:
    if contender == "library":
        package, _ = LIBRARIES.get(op.name, ("", None))
        if not package:
            return "no library has it"
        if DEVICE == "cpu" or importlib.util.find_spec(package) is None:
            return f"{package} is not installed, or not for this device"
        return None
    if contender == "triton" and DEVICE == "cpu":
        return "the interpreter is no contender"
    return why_not(op.name, contender, DEVICE, dtype) if contender in ("native", "triton") else None  # type: ignore[arg-type]


def function(op: Operator, contender: str, mode: str) -> Callable[..., Any]:
    if contender == "eager":
        return op.reference
    if contender == "compile":
        torch._dynamo.reset()
        # A backward pass alone runs again and again on one forward pass, whose buffers it may then
        # not take over.
        torch._functorch.config.donated_buffer = mode != "backward"
        return torch.compile(op.reference, fullgraph=True)
    if contender == "library":
        return LIBRARIES[op.name][1]
    return lambda *arguments: op(*arguments, backend=contender)  # type: ignore[arg-type]


def step(f: Callable[..., Any], arguments: Any, mode: str) -> Callable[[], None]:
    leaves = [a for a in arguments if isinstance(a, Tensor) and a.requires_grad]
    outputs = f(*arguments)
    upstream = [torch.randn_like(o) for o in (outputs if isinstance(outputs, tuple) else (outputs,))]

    def forward() -> None:
        with torch.no_grad():
            f(*arguments)

    def backward() -> None:
        torch.autograd.grad(outputs, leaves, upstream, retain_graph=True)

    def both() -> None:
        torch.autograd.grad(f(*arguments), leaves, upstream)

    return {"forward": forward, "backward": backward, "both": both}[mode]


def copy_of(moved: int) -> Callable[[], None]:
    """Copy that reads half of the bytes and writes the other half."""
    source = torch.ones(moved // 2, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)

    def copy() -> None:
        target.copy_(source)

    return copy
