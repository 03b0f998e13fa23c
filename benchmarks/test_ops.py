"""Every operator at model sizes, on each contender, beside a copy of the same bytes.

`python -m benchmarks.run` runs this file and writes results/<machine>/ops.json and the tables in README.md.
The contenders take turns in one process: a ratio compares rows of one run, never of two.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdistill.ops import OPERATORS
from fastdistill.ops.backend import why_not
from fastdistill.ops.op import Operator, Sample

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CONTENDERS = ("copy", "eager", "compile", "native", "triton")
DTYPES = (torch.bfloat16, torch.float32)
MODES = ("forward", "backward", "both")

if sys.platform == "linux":
    # glibc gives large freed blocks back to the kernel, and a fresh one costs a page fault per 4 KiB: more
    # than the operator. Every contender keeps its memory here, as with the allocators (jemalloc, tcmalloc)
    # that CPU training uses.
    M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
    libc = ctypes.CDLL(None)
    libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    libc.mallopt(M_MMAP_THRESHOLD, 2**30)


def rows() -> list[Any]:
    return [
        pytest.param(op, sample, dtype, id=f"{op.name}-{sample.id}-{str(dtype).removeprefix('torch.')}")
        for op in OPERATORS.values()
        for sample in op.workloads()
        for dtype in DTYPES
    ]


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("op", "sample", "dtype"), rows())
def test_op(benchmark: Any, op: Operator, sample: Sample, dtype: torch.dtype, mode: str, contender: str) -> None:
    if contender in ("native", "triton") and (reason := why_not(op, contender, DEVICE, dtype)):  # type: ignore[arg-type]
        pytest.skip(reason)
    if contender == "triton" and DEVICE == "cpu":
        pytest.skip("the interpreter is no contender")
    if mode != "forward" and op.backward_schema is None:
        pytest.skip("no backward")
    torch.manual_seed(0)
    arguments = sample.make(dtype, torch.device(DEVICE))
    forward_bytes, backward_bytes = op.bytes_moved(*arguments)
    moved = {"forward": forward_bytes, "backward": backward_bytes, "both": forward_bytes + backward_bytes}[mode]
    run = copy_of(moved) if contender == "copy" else step(function(op, contender), arguments, mode)

    benchmark.extra_info.update(
        op=op.name,
        sample=sample.id,
        dtype=str(dtype).removeprefix("torch."),
        mode=mode,
        contender=contender,
        bytes=moved,
    )
    benchmark.pedantic(run, rounds=25, warmup_rounds=5)


def function(op: Operator, contender: str) -> Callable[..., Any]:
    if contender == "eager":
        return op.reference
    if contender == "compile":
        torch._dynamo.reset()
        return torch.compile(op.reference, fullgraph=True)
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

    return synchronised({"forward": forward, "backward": backward, "both": both}[mode])


def copy_of(moved: int) -> Callable[[], None]:
    """Reads half of the bytes and writes the other half."""
    source = torch.ones(moved // 2, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    return synchronised(lambda: target.copy_(source))


def synchronised(run: Callable[[], Any]) -> Callable[[], None]:
    def timed() -> None:
        run()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    return timed
