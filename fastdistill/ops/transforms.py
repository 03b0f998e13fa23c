"""Derivatives of kernels in forward mode and under the transforms of torch.func.

Torch takes the result of a kernel for a constant unless it is told otherwise: without the rules of
this file a tangent would end at the first kernel, and be zero from there. A rule that has a kernel
runs it. Every derivative beyond the rules (the gradient of a tangent, the tangent of a gradient, a
Hessian) is that of the operator's reference in plain PyTorch, to any order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._C._functorch import (
    TransformType,
    get_interpreter_stack,
    get_unwrapped,
    is_batchedtensor,
    is_gradtrackingtensor,
)
from torch.autograd import forward_ad

if TYPE_CHECKING:
    from fastdistill.ops.backend import Backend
    from fastdistill.ops.op import Operator

Formula = Callable[..., tuple[Tensor, ...]]


def active() -> bool:
    """Whether a level of forward-mode differentiation or a transform of torch.func is active.

    torch.compile guards on both.
    """
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


def beyond_gradients() -> bool:
    """Whether more is asked for than gradients: tangents, second derivatives or batches of vmap."""
    return forward_ad._current_level >= 0 or _nested()


@torch.compiler.assume_constant_result
def _nested() -> bool:
    levels = get_interpreter_stack() or ()
    return len(levels) > 1 or any(level.key() != TransformType.Grad for level in levels)


def vmapped() -> bool:
    """Whether one of the active transforms is vmap."""
    return any(level.key() == TransformType.Vmap for level in get_interpreter_stack() or ())


def carry_derivatives(tensors: Sequence[Tensor]) -> bool:
    """Whether one of the tensors has a tangent or is differentiated by a transform."""
    return active() and any(map(_carries_derivative, tensors))


def _carries_derivative(t: Tensor) -> bool:
    while is_batchedtensor(t):
        t = get_unwrapped(t)
    return is_gradtrackingtensor(t) or forward_ad.unpack_dual(t).tangent is not None


def with_every_derivative(op: Operator, backend: Backend, forward_op: Callable[..., Any]) -> Callable[..., Any]:
    """The forward op of an operator as a function that torch differentiates in both modes, to any
    order.

    It costs more on the host than the gradient alone, and keeps all arguments.
    """
    schema = schema_of(forward_op)
    count, hidden = len(schema.arguments), len(schema.returns) - op.visible_results

    def split(inputs: Sequence[Any]) -> tuple[tuple[Any, ...], tuple[Tensor, ...], tuple[Any, ...]]:
        """Arguments, results, and the gradients or tangents after them."""
        end = count + op.visible_results + hidden
        return tuple(inputs[:count]), tuple(inputs[count:end]), tuple(inputs[end:])

    def reference(*arguments: Any) -> tuple[Tensor, ...]:
        return as_tuple(op.reference(*arguments))

    def gradient(needed: tuple[bool, ...], *inputs: Any) -> tuple[Tensor, ...]:
        arguments, results, grads = split(inputs)
        record = _Record(needed)
        op.save(record, arguments, results)
        computed = op.backward(record, op.backward_op(backend), *grads)
        return tuple(
            # A function of torch that returns its input as it is cannot save it.
            torch.zeros_like(argument) if grad is None else grad.clone() if any(grad is g for g in grads) else grad
            for argument, grad, need in zip(arguments, computed, needed, strict=True)
            if need
        )

    def gradient_formula(needed: tuple[bool, ...], *inputs: Any) -> tuple[Tensor, ...]:
        arguments, _, grads = split(inputs)
        run, chosen = _function_of(reference, arguments, needed)
        return tuple(_vjp(run, *chosen)[1](grads))

    def tangent(*inputs: Any) -> tuple[Tensor, ...]:
        return op.jvp(backend, *split(inputs))

    def tangent_formula(*inputs: Any) -> tuple[Tensor, ...]:
        arguments, _, tangents = split(inputs)
        run, chosen = _function_of(reference, arguments, [t is not None for t in tangents])
        return _product(run, chosen, [t for t in tangents if t is not None])

    gradients = _with_derivatives_of(gradient_formula, gradient)
    tangents_of = _with_derivatives_of(tangent_formula, tangent)

    class Transformed(torch.autograd.Function):
        @staticmethod
        def forward(*arguments: Any) -> tuple[Tensor, ...]:
            results = as_tuple(forward_op(*arguments))
            return *as_tuple(op.visible(results)), *results[op.visible_results :]

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
            ctx.shown = len(output) - hidden
            _save(ctx, (*inputs, *output[: op.visible_results], *output[ctx.shown :]))
            ctx.mark_non_differentiable(*output[ctx.shown :])

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
            needed = tuple(ctx.needs_input_grad)
            computed = iter(gradients(needed, *_saved(ctx), *grads[: ctx.shown]))
            return tuple(next(computed) if need else None for need in needed)

        @staticmethod
        def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
            return *tangents_of(*_saved(ctx), *tangents), *(None,) * hidden

    Transformed.__name__ = Transformed.__qualname__ = type(op).__name__

    def run(*arguments: Any) -> Any:
        outputs = Transformed.apply(*arguments)
        shown = len(outputs) - hidden
        return outputs[0] if shown == 1 else outputs[:shown]

    return run


def schema_of(op: Any) -> torch.FunctionSchema:
    """Schema of an op that torch knows."""
    schema: torch.FunctionSchema = op._schema
    return schema


def as_tuple(results: Any) -> tuple[Tensor, ...]:
    return (results,) if isinstance(results, Tensor) else tuple(results)


@dataclass
class _Record:
    """Stand-in for the context of autograd where a gradient is computed in one go."""

    needs_input_grad: tuple[bool, ...]
    saved_tensors: tuple[Tensor | None, ...] = ()

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        self.saved_tensors = tensors


def _with_derivatives_of(formula: Formula, kernel: Formula) -> Callable[..., tuple[Tensor, ...]]:
    """A kernel that is differentiated and vectorised as the formula that it computes."""

    class Derived(torch.autograd.Function):
        @staticmethod
        def forward(*inputs: Any) -> tuple[Tensor, ...]:
            return kernel(*inputs)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            _save(ctx, inputs)

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
            run, chosen = _function_of(formula, _saved(ctx), ctx.needs_input_grad)
            computed = iter(_vjp(run, *chosen)[1](grads))
            return tuple(next(computed) if need else None for need in ctx.needs_input_grad)

        @staticmethod
        def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor, ...]:
            run, chosen = _function_of(formula, _saved(ctx), [t is not None for t in tangents])
            return _product(run, chosen, [t for t in tangents if t is not None])

        @staticmethod
        def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[tuple[Tensor, ...], Any]:
            outputs = torch.func.vmap(formula, in_dims, randomness=info.randomness)(*inputs)
            return outputs, (0,) * len(outputs)

    apply: Callable[..., tuple[Tensor, ...]] = Derived.apply
    return apply


def _save(ctx: Any, inputs: Sequence[Any]) -> None:
    tensors = [i if isinstance(i, Tensor) else None for i in inputs]
    ctx.save_for_backward(*tensors)
    ctx.save_for_forward(*tensors)
    ctx.constants = tuple(None if isinstance(i, Tensor) else i for i in inputs)


def _saved(ctx: Any) -> tuple[Any, ...]:
    return tuple(c if t is None else t for t, c in zip(ctx.saved_tensors, ctx.constants, strict=True))


def _function_of(formula: Formula, inputs: Sequence[Any], chosen: Sequence[bool]) -> tuple[Formula, list[Tensor]]:
    """A formula as a function of the chosen inputs alone, and these inputs."""

    def run(*values: Tensor) -> tuple[Tensor, ...]:
        remaining = iter(values)
        return formula(*(next(remaining) if c else i for i, c in zip(inputs, chosen, strict=True)))

    return run, [i for i, c in zip(inputs, chosen, strict=True) if c]


def _product(run: Formula, inputs: Sequence[Tensor], tangents: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Product of the Jacobian of `run` with tangents, without forward mode, which does not nest
    outside of torch.func: the transpose of the transposed product, which is linear."""
    outputs, transposed = _vjp(run, *inputs)
    zeros = tuple(torch.zeros_like(o) for o in outputs)
    (product,) = _vjp(transposed, zeros)[1](tuple(tangents))
    return tuple(product)


def _vjp(run: Formula, *inputs: Any) -> tuple[tuple[Tensor, ...], Callable[..., Any]]:
    outputs, transposed, *_ = torch.func.vjp(run, *inputs)
    return outputs, transposed
