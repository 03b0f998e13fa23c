"""Compile the Triton kernels of every operator for a GPU that need not be there.

    python -m tests.ops.compile_triton 90

The interpreter, which runs them in the other tests, accepts Python that Triton's compiler refuses.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from fastdistill.ops import OPERATORS
from fastdistill.ops import backend as backends

# Limits of a block's shared memory, which only a launch would check.
SHARED_KIB = {80: 163, 90: 227, 100: 227}


class AbsentGpu:
    """Driver that answers what the compiler asks."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: Any = None) -> int:
        return 0


def main(capability: int) -> None:
    driver.set_active(AbsentGpu(capability))
    compiled: set[str] = set()
    launch = JITFunction.run

    def compile_only(self: Any, *args: Any, **kwargs: Any) -> Any:
        compiled.add(f"{self.fn.__module__}.{self.fn.__name__}")
        kernel = launch(self, *args, **{**kwargs, "warmup": True})
        shared = kernel.metadata.shared
        assert shared <= 1024 * SHARED_KIB.get(capability, 99), f"{self.fn.__name__}: {shared} bytes of shared memory"
        return kernel

    JITFunction.run = compile_only
    backends.choose = lambda *_: "triton"
    for op in OPERATORS.values():
        importlib.import_module(op.triton_module)
        for case in op.cases():
            arguments = case.make(torch.bfloat16, torch.device("cpu"))
            results = op(*arguments)
            results = results if isinstance(results, tuple) else (results,)
            leaves = [a for a in arguments if isinstance(a, Tensor) and a.requires_grad]
            if leaves:
                torch.autograd.grad(results, leaves, [torch.zeros_like(r) for r in results])
        print(f"{op.name}: compiled", flush=True)
    assert len(compiled) >= 2 * len(OPERATORS) - 1, f"only {sorted(compiled)}: was a launch not seen?"


if __name__ == "__main__":
    main(int(sys.argv[1]))
