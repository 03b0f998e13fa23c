"""Contract of an operator.

An operator is one object: a schema, a reference in plain PyTorch, the shapes of its results, its
gradient and its tangent, the cases on which tests try it and the workloads on which benchmarks
measure it. A subclass states these; this file registers them with torch and runs the chosen
backend.

Torch knows an operator as `fastdistill::<name>` and `fastdistill::<name>_backward`, which the
compiled library implements for CPU and CUDA tensors, and by the `triton` overloads of both. The
`eager` backend is the reference itself, differentiated by autograd and visible to torch.compile.

One kernel file serves a family of operators. A line `Kernels: ...` in the docstring of an
operator's file names its kernel files, relative to the repository (`csrc`) or to the package
(`ops/triton`).
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastdistill.ops import backend as backends
from fastdistill.ops import transforms
from fastdistill.ops.backend import NAMESPACE, Backend, Request

Arguments = tuple[Any, ...]
"""Arguments of a forward op."""
Tensors = tuple[Tensor, ...]
Tangents = tuple[Tensor | None, ...]
"""Tangent of each argument, None where the argument is constant."""

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One set of arguments, drawn by `make(dtype, device)` from torch's global generator.

    The suite compares the gradients of the tensors among the arguments that require a gradient.
    """

    id: str
    make: Callable[[torch.dtype, torch.device], Sequence[Any]]


class Operator(ABC):
    """A fused operator. Its methods take the positional arguments of `schema` as `arguments`.

    A subclass is constructed once, which enters it in `OPERATORS` and registers it with torch.

    Attributes:
        name: name of the operator and of its public function.
        schema: arguments and results of the forward op.
        backward_schema: arguments and results of the backward op; None without a gradient.
        triton_module: module of the Triton kernels.
        visible_results: number of leading results of the forward op that the caller receives. The
            other results are saved for the backward op.
        is_derivative: False where the gradient is by definition not the derivative of the value.
    """

    name: ClassVar[str]
    schema: ClassVar[str]
    backward_schema: ClassVar[str | None] = None
    triton_module: ClassVar[str]
    visible_results: ClassVar[int] = 1
    is_derivative: ClassVar[bool] = True

    @abstractmethod
    def check(self, *arguments: Any) -> None:
        """Raise `TypeError` or `ValueError` naming the argument at fault and what was expected."""

    @abstractmethod
    def reference(self, *arguments: Any) -> Any:
        """Formula in plain, differentiable PyTorch, for any floating dtype."""

    @abstractmethod
    def fake(self, *arguments: Any) -> Any:
        """Results of the forward op with the right shape, dtype and strides, and no values."""

    @abstractmethod
    def cases(self) -> Sequence[Case]:
        """Small cases that reach every branch: broadcasts, strides, odd and empty sizes."""

    @abstractmethod
    def workloads(self) -> Sequence[Case]:
        """Cases of the sizes that models have, for the benchmark."""

    @abstractmethod
    def bytes_moved(self, *arguments: Any) -> tuple[int, int]:
        """Bytes that a perfect forward and a perfect backward must read and write."""

    def fake_backward(self, *arguments: Any) -> Any:
        """Results of the backward op with the right shape, dtype and strides, and no values."""
        raise NotImplementedError(f"{self.name} has no backward op")

    def save(self, ctx: Any, arguments: tuple[Any, ...], results: Any) -> None:  # noqa: B027
        """Save on the autograd context what `backward` needs; the forward op gave `results`."""

    def visible(self, results: Sequence[Tensor]) -> Tensor | tuple[Tensor, ...]:
        """Part of the forward op's results that the caller receives."""
        return results[0] if self.visible_results == 1 else tuple(results[: self.visible_results])

    def backward(self, ctx: Any, backward_op: Callable[..., Any], *grads: Tensor) -> tuple[Tensor | None, ...]:
        """One gradient or None for each argument of `schema`, computed by `backward_op`."""
        raise NotImplementedError(f"{self.name} has no backward op")

    def jvp(self, backend: Backend, arguments: Arguments, results: Tensors, tangents: Tangents) -> Tensors:
        """Tangent of each tensor that the caller receives: the product of the Jacobian with
        `tangents`.

        Where the gradient is not the derivative of the value, the product with the matrix of which
        the gradient is the transpose: both modes agree.

        Args:
            backend: the backend of the forward op, for `forward_op` and `backward_op` of this and
                other operators.
            arguments: those of the forward op.
            results: those of the forward op, with what it saved.
            tangents: one for each argument, of its shape and dtype and of any strides; None where
                the argument is constant. At least one is a tensor.
        """
        raise NotImplementedError(
            f"{self.name} has no forward-mode derivative: run it with backend='eager' or in "
            f"`with use_backend('eager')`, or detach its arguments"
        )

    def forward_op(self, backend: Backend) -> Callable[..., Any]:
        """The forward op as torch knows it, for the rules of this and other operators."""
        return self._loaded(self._forward_ops, backend)

    def backward_op(self, backend: Backend) -> Callable[..., Any]:
        """The backward op as torch knows it, for the rules of this and other operators."""
        return self._loaded(self._backward_ops, backend)

    def _loaded(self, ops: dict[Backend, Callable[..., Any]], backend: Backend) -> Callable[..., Any]:
        if backend == "triton":
            backends.load_triton(self.triton_module)
        return ops[backend]

    def dtypes(self, backend: Backend, device: str) -> tuple[torch.dtype, ...]:
        """Dtypes that a backend serves; float64, for checking gradients, on the CPU alone."""
        double = backend == "eager" or (backend == "native" and device == "cpu")
        return (*FLOATS, torch.float64) if double else FLOATS

    @property
    def qualified_name(self) -> str:
        return f"{NAMESPACE}::{self.name}"

    def __init__(self) -> None:
        if self.backward_schema is not None and type(self).jvp is Operator.jvp:
            raise TypeError(f"{self.name} has a gradient and no tangent: state `jvp` next to `backward`")
        OPERATORS[self.name] = self
        backends.register(self.name, backends.Served(triton_module=self.triton_module, dtypes=self.dtypes))
        self._forward_ops: dict[Backend, Callable[..., Any]] = {}
        self._backward_ops: dict[Backend, Callable[..., Any]] = {}
        self._run: dict[str, Callable[..., Any]] = {"eager": self.reference}
        self._run_with_grad: dict[str, Callable[..., Any]] = {"eager": self.reference}
        self._run_transformed: dict[str, Callable[..., Any]] = {"eager": self.reference}
        for backend, overload in _OVERLOADS.items():
            forward_op = self._forward_ops[backend] = _define(self.qualified_name + overload, self.schema, self.fake)
            self._run[backend] = self._run_with_grad[backend] = self._visible(forward_op)
            if self.backward_schema is not None:
                name = f"{self.qualified_name}_backward{overload}"
                backward_op = self._backward_ops[backend] = _define(name, self.backward_schema, self.fake_backward)
                self._run_with_grad[backend] = self._differentiable(forward_op, backward_op)
            self._run_transformed[backend] = transforms.with_every_derivative(self, backend, forward_op)
        self.arguments = transforms.schema_of(forward_op).arguments

    def _visible(self, forward_op: Callable[..., Any]) -> Callable[..., Any]:
        if not self.schema.endswith(")"):
            return forward_op
        return lambda *arguments: self.visible(forward_op(*arguments))

    def _differentiable(self, forward_op: Callable[..., Any], backward_op: Callable[..., Any]) -> Callable[..., Any]:
        op = self

        # Not torch.library.register_autograd, which adds 6 us to a call without gradients and 25 us
        # to one with gradients, where this adds 0 and 8 (tiny tensor, torch 2.13, EPYC Zen 4).
        class Gradient(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, *arguments: Any) -> Any:
                results = forward_op(*arguments)
                if isinstance(results, Tensor):
                    results = (results,)
                op.save(ctx, arguments, results)
                return op.visible(results)

            @staticmethod
            def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
                # once_differentiable raises only if `grads` need a gradient, and drops the term
                # silently otherwise.
                again = torch.is_grad_enabled() or transforms.carry_derivatives(grads)
                if again and not torch.compiler.is_compiling():
                    raise RuntimeError(
                        f"{op.name}: its gradient cannot be differentiated (create_graph=True, or a tangent that "
                        f"enters with the gradient); run it with backend='eager' or in `with use_backend('eager')`"
                    )
                return op.backward(ctx, backward_op, *grads)

        Gradient.__name__ = Gradient.__qualname__ = type(self).__name__
        return Gradient.apply

    def __call__(self, *arguments: Any, backend: Request | None = None) -> Any:
        request = backend or backends.requested()
        try:
            self.check(*arguments)
            first = arguments[0]
            chosen = backends.choose(self.name, request, first.device.type, first.dtype)
        except Exception:
            # Here, where it costs right calls nothing.
            self._check_types(arguments)
            raise
        if transforms.active():
            return self._transformed(chosen, request, arguments)
        if torch.is_grad_enabled():
            for argument in arguments:
                if isinstance(argument, Tensor) and argument.requires_grad:
                    return self._run_with_grad[chosen](*arguments)
        return self._run[chosen](*arguments)

    def _transformed(self, chosen: Backend, request: Request, arguments: tuple[Any, ...]) -> Any:
        """Call in forward mode or under a transform of torch.func."""
        compiling = torch.compiler.is_compiling()
        if chosen == "eager" or not (compiling or transforms.vmapped()):
            return self._run_transformed[chosen](*arguments)
        if request != "auto":
            raise RuntimeError(
                f"backend {request!r} was asked for, but {self.name} runs in plain PyTorch under "
                f"{'torch.compile of a transform' if compiling else 'torch.func.vmap'}: ask for 'eager' or 'auto'"
            )
        if not compiling:
            _say_that_it_runs_in_plain_pytorch(self.name)
        return self.reference(*arguments)

    def _check_types(self, arguments: tuple[Any, ...]) -> None:
        """Raise `TypeError` naming the first argument that is no tensor of floats where the schema
        has a tensor."""
        tensors = [a for a in zip(self.arguments, arguments, strict=False) if "Tensor" in str(a[0].type)]
        for argument, value in tensors:
            check_tensor(argument.name, value, optional="Optional" in str(argument.type))
        for argument, value in tensors:
            # Optional tensors may be masks.
            if "Optional" not in str(argument.type):
                check_floats(argument.name, value)


OPERATORS: dict[str, Operator] = {}
"""Every operator by name. Constructing an operator enters it here."""


@functools.cache
def _say_that_it_runs_in_plain_pytorch(name: str) -> None:
    backends.log.info("%s runs on eager under torch.func.vmap: its kernels take no batches of batches", name)


# Overloads of the ops that torch knows, by backend.
_OVERLOADS: dict[Backend, str] = {"native": "", "triton": ".triton"}


def check_tensor(name: str, value: Any, *, optional: bool = False) -> None:
    """Raise `TypeError` unless an argument is a dense tensor, or None where it is optional."""
    if not isinstance(value, Tensor) and not (optional and value is None):
        raise TypeError(f"{name}: expected a tensor{' or None' if optional else ''}, got {kind_of(value)}")
    if isinstance(value, Tensor) and value.layout != torch.strided:
        raise TypeError(f"{name}: expected a dense tensor, got {describe(value)} of layout {value.layout}")


def check_floats(name: str, t: Tensor) -> None:
    """Raise `TypeError` unless a tensor has a dtype that some backend of the operators takes."""
    if t.dtype not in (*FLOATS, torch.float64):
        raise TypeError(f"{name}: expected float32, bfloat16, float16 or (on the CPU) float64, got {describe(t)}")


def describe(t: Tensor) -> str:
    """Shape, dtype and device of a tensor, for an error message."""
    return f"{tuple(t.shape)} {t.dtype} on {t.device}"


def kind_of(value: Any) -> str:
    """Type of a value that is no tensor, for an error message."""
    if value is None:
        return "None"
    kind = type(value)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


def accumulator_of(dtype: torch.dtype) -> torch.dtype:
    """Dtype of sums and statistics: float32, and float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _define(name: str, schema: str, fake: Callable[..., Any]) -> Callable[..., Any]:
    torch.library.define(name, schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.register_fake(name, fake)
    qualified, _, overload = name.partition(".")
    packet = getattr(torch.ops.fastdistill, qualified.removeprefix(f"{NAMESPACE}::"))
    op: Callable[..., Any] = getattr(packet, overload or "default")
    return op
