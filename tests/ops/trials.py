"""Trials that the inherited suite loops over: operator x backend x device x dtype x case."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdistill.ops import OPERATORS
from fastdistill.ops.backend import BACKENDS, Backend, why_not
from fastdistill.ops.op import Case, Operator

DEVICES = ("cpu", "cuda")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One case of an operator on one backend, device and dtype."""

    op: Operator
    backend: Backend
    device: str
    dtype: torch.dtype
    case: Case

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.op.name}-{self.backend}-{self.device}-{dtype}-{self.case.id}"

    @property
    def interpreted(self) -> bool:
        """Whether Triton's interpreter runs it, a thousand times slower than a GPU."""
        return self.backend == "triton" and self.device == "cpu"

    def arguments(self) -> tuple[Any, ...]:
        return tuple(self.case.make(self.dtype, torch.device(self.device)))

    def run(self, arguments: Sequence[Any]) -> tuple[Tensor, ...]:
        return as_tuple(self.op(*arguments, backend=self.backend))


def trials(
    *,
    dtypes: Sequence[torch.dtype] = DTYPES,
    backends: Sequence[Backend] = BACKENDS,
    every_case: bool = True,
    fast: Sequence[Backend] = ("native",),
    compiles: bool = False,
    differentiable: bool = False,
) -> Callable[[Any], Any]:
    """Parametrise a test with `trial`.

    A backend that this machine cannot run is skipped with the reason.

    Args:
        fast: backends that are not left to the slow tests.
        compiles: the test compiles for every trial. Only the first of an operator is then fast,
            as it is in Triton's interpreter.
        differentiable: only of operators that have a gradient.
    """
    tried = [op for op in OPERATORS.values() if op.backward_schema is not None or not differentiable]
    return pytest.mark.parametrize("trial", list(_trials(tried, dtypes, backends, every_case, fast, compiles)))


def _trials(
    operators: Sequence[Operator],
    dtypes: Sequence[torch.dtype],
    backends: Sequence[Backend],
    every_case: bool,
    fast: Sequence[Backend],
    compiles: bool,
) -> Iterator[Any]:
    for op in operators:
        cases = op.cases() if every_case else op.cases()[:1]
        for backend in backends:
            for device in DEVICES:
                for dtype in dtypes:
                    if dtype not in op.dtypes(backend, device):
                        continue
                    for case in cases:
                        trial = Trial(op=op, backend=backend, device=device, dtype=dtype, case=case)
                        first = case is cases[0] and dtype is dtypes[0]
                        slow = backend not in fast or ((compiles or trial.interpreted) and not first)
                        yield pytest.param(
                            trial, id=str(trial), marks=[*_marks(trial), *([pytest.mark.slow] if slow else [])]
                        )


def _marks(trial: Trial) -> list[pytest.MarkDecorator]:
    if trial.device == "cuda":
        return [pytest.mark.gpu]
    reason = why_not(trial.op.name, trial.backend, trial.device, trial.dtype)
    return [pytest.mark.skip(reason=reason)] if reason else []


def as_tuple(results: Any) -> tuple[Tensor, ...]:
    return tuple(results) if isinstance(results, (tuple, list)) else (results,)


def leaves(arguments: Sequence[Any]) -> list[Tensor]:
    """Tensors whose gradients are compared."""
    return [a for a in arguments if isinstance(a, Tensor) and a.requires_grad]


def converted(arguments: Sequence[Any], dtype: torch.dtype) -> tuple[Any, ...]:
    """Equal values in another dtype, as new leaves."""
    return tuple(
        a.detach().to(dtype).requires_grad_(a.requires_grad) if isinstance(a, Tensor) and a.is_floating_point() else a
        for a in arguments
    )


def detached(arguments: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(a.detach() if isinstance(a, Tensor) else a for a in arguments)


def gradients(
    run: Callable[[Sequence[Any]], tuple[Tensor, ...]], arguments: Sequence[Any], upstream: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """Outputs of `run`, then the gradient of every leaf for the given upstream gradients."""
    outputs = run(arguments)
    wanted = leaves(arguments)
    if not wanted or not any(o.requires_grad for o in outputs):
        return tuple(o.detach() for o in outputs)
    grads = torch.autograd.grad(outputs, wanted, [u.to(o.dtype) for u, o in zip(upstream, outputs, strict=True)])
    return (*(o.detach() for o in outputs), *grads)
