"""Tests that every operator passes on every backend, without a line of its own."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdistill import ops
from fastdistill.ops.backend import why_not
from fastdistill.ops.op import FLOATS
from tests.ops.trials import Trial, as_tuple, converted, detached, gradients, leaves, trials

FAST = ("native", "triton")
# In addition to one unit in the last place.
ERROR_RATIO = 2.0
FLOAT32_RELATIVE = 2e-6


def upstream_for(outputs: Sequence[Tensor]) -> list[Tensor]:
    return [torch.randn(o.shape, device=o.device, dtype=torch.float32).to(o.dtype) for o in outputs]


def error(actual: Tensor, exact: Tensor) -> float:
    assert actual.isfinite().all(), "NaN or infinity: an element that was never written?"
    return (actual.double() - exact).abs().max().item() if exact.numel() else 0.0


def scale_of(exact: Tensor) -> float:
    return exact.abs().max().item() if exact.numel() else 0.0


def unit(actual: Tensor, exact: Tensor, upstream: Sequence[Tensor]) -> float:
    """One unit in the last place of the largest value of a result, and of the largest term of a sum
    over gradients.

    The error of a sum of terms that nearly cancel depends on the order of the terms, also in eager.
    """
    ulp = torch.finfo(actual.dtype).eps * scale_of(exact)
    if actual.numel() < max(u.numel() for u in upstream):
        ulp += torch.finfo(torch.float32).eps * max(scale_of(u) for u in upstream)
    return ulp


@trials(dtypes=FLOATS, backends=FAST, fast=FAST)
def test_forward_and_gradients_against_float64(trial: Trial) -> None:
    arguments = trial.arguments()
    with torch.no_grad():
        upstream = upstream_for(as_tuple(trial.op.reference(*arguments)))
    actual = gradients(trial.run, arguments, upstream)
    eager = gradients(lambda a: as_tuple(trial.op.reference(*a)), arguments, upstream)
    exact = gradients(lambda a: as_tuple(trial.op.reference(*a)), converted(arguments, torch.float64), upstream)

    # Two implementations of the same sums differ by the rounding of the largest value that passes
    # through them.
    conditioning = max([1.0, *(scale_of(a) for a in leaves(arguments))])
    for i, (a, e, x) in enumerate(zip(actual, eager, exact, strict=True)):
        assert a.shape == e.shape, f"result {i}: shape"
        assert a.dtype == e.dtype, f"result {i}: dtype"
        ulp = unit(a, x, upstream)
        allowed = ERROR_RATIO * error(e, x) + ulp
        assert error(a, x) <= allowed, f"result {i}: error {error(a, x):.3g}, eager {error(e, x):.3g}, ulp {ulp:.3g}"
        if trial.dtype == torch.float32:
            assert error(a, x) <= FLOAT32_RELATIVE * conditioning * max(scale_of(x), 1e-30), f"result {i}: relative"


@trials(dtypes=(torch.float64,), backends=("eager", "native"))
def test_gradcheck(trial: Trial) -> None:
    arguments = trial.arguments()
    if not leaves(arguments) or not trial.op.is_derivative:
        pytest.skip("nothing to differentiate")
    if trial.backend == "eager" and trial.case.id != trial.op.cases()[0].id:
        pytest.skip("autograd's own derivative of plain PyTorch")
    # The whole Jacobian of a small case, a random projection of a large one.
    large = sum(leaf.numel() for leaf in leaves(arguments)) > 200
    assert torch.autograd.gradcheck(lambda *a: trial.run(a), arguments, fast_mode=large)


@trials(dtypes=(torch.float32,), backends=FAST, compiles=True)
def test_opcheck(trial: Trial) -> None:
    """Schema, fake tensors and tracing of the registered ops, which define no gradient."""
    checks = ["test_schema", "test_faketensor"]
    if trial.case.id == trial.op.cases()[0].id:
        checks.append("test_aot_dispatch_dynamic")  # seconds each, and the same for every case
    for op, arguments in recorded_calls(trial):
        torch.library.opcheck(op, arguments, test_utils=checks)


def recorded_calls(trial: Trial) -> list[tuple[Any, tuple[Any, ...]]]:
    """Forward and backward op calls that one use of the operator makes, with their arguments."""
    calls: list[tuple[Any, tuple[Any, ...]]] = []

    class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.namespace == "fastdistill":
                calls.append((func, detached(args)))
            return func(*args, **(kwargs or {}))

    arguments = trial.arguments()
    with Recorder():
        outputs = trial.run(arguments)
        if leaves(arguments):
            torch.autograd.grad(outputs, leaves(arguments), upstream_for(outputs))
    assert len(calls) == (2 if trial.op.backward_schema else 1)
    return calls


@trials(dtypes=(torch.float32, torch.bfloat16), backends=FAST)
def test_noncontiguous_gradient(trial: Trial) -> None:
    if trial.interpreted and trial.dtype != torch.float32:
        pytest.skip("the interpreter treats the strides of all dtypes alike")
    arguments = trial.arguments()
    outputs = trial.run(arguments)
    if not any(o.requires_grad for o in outputs) or any(o.dim() < 2 for o in outputs):
        pytest.skip("no gradient that could be strided")
    contiguous = upstream_for(outputs)
    wide = [torch.cat([u, u], dim=-1)[..., : u.shape[-1]] for u in contiguous]
    transposed = [u.transpose(-1, -2).contiguous().transpose(-1, -2) for u in contiguous]
    expected = torch.autograd.grad(outputs, leaves(arguments), contiguous, retain_graph=True)
    for strided in (wide, transposed):
        actual = torch.autograd.grad(outputs, leaves(arguments), strided, retain_graph=True)
        for a, e in zip(actual, expected, strict=True):
            assert torch.equal(a, e)
    ones = torch.autograd.grad(outputs, leaves(arguments), [torch.ones_like(o) for o in outputs], retain_graph=True)
    for a, e in zip(torch.autograd.grad(sum(o.sum() for o in outputs), leaves(arguments)), ones, strict=True):
        assert torch.equal(a, e)


@trials(dtypes=(torch.float32, torch.bfloat16), backends=FAST)
def test_bitwise_repeatable(trial: Trial) -> None:
    if trial.interpreted and trial.case.id != trial.op.cases()[0].id:
        pytest.skip("the interpreter runs programs in one order")
    arguments = trial.arguments()
    with torch.no_grad():
        upstream = upstream_for(trial.run(arguments))
    first = gradients(trial.run, arguments, upstream)
    threads = torch.get_num_threads()
    try:
        for count in (threads, 1):
            torch.set_num_threads(count)
            for a, b in zip(first, gradients(trial.run, arguments, upstream), strict=True):
                assert torch.equal(a, b)
    finally:
        torch.set_num_threads(threads)


@trials(dtypes=(torch.float32,), backends=("eager", "native"), compiles=True)
def test_compiles_whole(trial: Trial) -> None:
    """One graph with dynamic sizes, forward and backward.

    Inductor, which takes seconds, compiles one case.
    """
    arguments = trial.arguments()
    if any(isinstance(a, Tensor) and a.numel() == 0 for a in arguments):
        pytest.skip("the compiler specialises on empty tensors")
    if trial.backend == "eager" and trial.case.id != trial.op.cases()[0].id:
        pytest.skip("plain PyTorch, a second of compiling each")
    torch._dynamo.reset()
    first = trial.case.id == trial.op.cases()[0].id
    # Inductor's code for the reference is not ours to test.
    compiler = "inductor" if first and trial.backend == "native" else "aot_eager"
    compiled = torch.compile(
        lambda *a: trial.op(*a, backend=trial.backend), fullgraph=True, dynamic=True, backend=compiler
    )
    upstream = upstream_for(trial.run(detached(arguments)))
    expected = gradients(trial.run, arguments, upstream)
    actual = gradients(lambda a: as_tuple(compiled(*a)), arguments, upstream)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "call",
    [
        lambda x, h, t: ops.modulate(x, x, x, backend="native"),
        lambda x, h, t: ops.modulate(x, x[:, 0], x[:, 0], backend="native"),
        lambda x, h, t: ops.qk_norm_rope(h, h, h[0, 0, 0], h[0, 0, 0], t, t, backend="native"),
        lambda x, h, t: ops.joint_qk_norm_rope(
            (h[:, :2],) * 3, (h[:, 2:],) * 3, (h[0, 0, 0],) * 2, (h[0, 0, 0],) * 2, t, t, backend="native"
        ),
        lambda x, h, t: ops.rope_attention(h, h, h, h[0, 0, 0], h[0, 0, 0], t, t),
        lambda x, h, t: ops.dmd_loss(x, x, x, None, 2 * x, mask=x[:, :1] > 0, backend="native"),
    ],
)
def test_sizes_that_turn_out_to_vary(call: Callable[..., Any]) -> None:
    """torch.compile without a word on what is dynamic, where tables and heads are different tensors
    of equally many tokens."""
    if reason := why_not("modulate", "native", "cpu", torch.float32):
        pytest.skip(reason)
    torch._dynamo.reset()
    compiled = torch.compile(call, backend="eager", fullgraph=True)
    for batch, tokens in ((2, 5), (2, 7), (3, 9), (4, 12)):
        x, h, t = torch.randn(batch, tokens, 6), torch.randn(batch, tokens, 2, 6), torch.randn(tokens, 6)
        for a, e in zip(as_tuple(compiled(x, h, t)), as_tuple(call(x, h, t)), strict=True):
            torch.testing.assert_close(a, e)


@trials(dtypes=(torch.float32,), backends=FAST, every_case=False)
def test_second_derivative_is_refused(trial: Trial) -> None:
    arguments = trial.arguments()
    outputs = trial.run(arguments)
    if not leaves(arguments):
        pytest.skip("nothing to differentiate")
    with pytest.raises(RuntimeError, match=f"{trial.op.name}: its gradient cannot be differentiated"):
        torch.autograd.grad(outputs, leaves(arguments), upstream_for(outputs), create_graph=True)


@trials(dtypes=(torch.float32,), backends=FAST, every_case=False)
def test_no_gradient_is_computed_in_no_grad(trial: Trial) -> None:
    with torch.no_grad():
        assert not any(o.requires_grad for o in trial.run(trial.arguments()))


def test_every_operator_has_a_public_function_of_its_name() -> None:
    assert all(inspect.isfunction(getattr(ops, name)) for name in ops.OPERATORS)
