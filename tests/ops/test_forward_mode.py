"""Tangents of every operator, and derivatives under every transform of torch.func."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, linearize, vjp, vmap

from fastdistill import ops, use_backend
from fastdistill.ops import OPERATORS, transforms
from fastdistill.ops.attention import attend
from fastdistill.ops.modulate import MODULATE, Modulate
from fastdistill.ops.op import FLOATS, Operator
from tests.ops.trials import Trial, as_tuple, converted, detached, leaves, trials

FAST = ("native", "triton")
Function = Callable[..., tuple[Tensor, ...]]


def frozen(trial: Trial) -> tuple[tuple[Any, ...], list[int]]:
    """Arguments without a gradient, as in the pass that computes a tangent, and which had one."""
    arguments = trial.arguments()
    return detached(arguments), [i for i, a in enumerate(arguments) if isinstance(a, Tensor) and a.requires_grad]


def of_chosen(run: Function, arguments: Sequence[Any], chosen: Sequence[int]) -> Function:
    def function(*values: Tensor) -> tuple[Tensor, ...]:
        given = dict(zip(chosen, values, strict=True))
        return run([given.get(i, a) for i, a in enumerate(arguments)])

    return function


def tangents_of(run: Function, arguments: Sequence[Any], tangents: dict[int, Tensor]) -> list[Tensor]:
    function = of_chosen(run, arguments, list(tangents))
    return list(jvp(function, tuple(arguments[i] for i in tangents), tuple(tangents.values()))[1])


def dual_tangents_of(run: Function, arguments: Sequence[Any], tangents: dict[int, Tensor]) -> list[Tensor | None]:
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(a, tangents[i]) if i in tangents else a for i, a in enumerate(arguments)]
        return [forward_ad.unpack_dual(o).tangent for o in run(duals)]


def reference_of(op: Operator) -> Function:
    return lambda arguments: as_tuple(op.reference(*arguments))


def assert_as_exact_as_eager(trial: Trial, actual: Tensor | None, eager: Tensor, exact: Tensor, terms: float) -> None:
    assert actual is not None
    assert (actual.shape, actual.dtype) == (eager.shape, eager.dtype)
    if not exact.numel():
        return
    assert actual.isfinite().all()
    error, eager_error = ((t.double() - exact).abs().max().item() for t in (actual, eager))
    scale = max(exact.abs().max().item(), terms if exact.dim() == 0 else 0.0)
    assert error <= 2 * eager_error + 2 * torch.finfo(actual.dtype).eps * scale, f"{error:.3g}, eager {eager_error:.3g}"


@trials(differentiable=True, dtypes=FLOATS, backends=FAST)
def test_tangents_against_float64(trial: Trial) -> None:
    arguments, chosen = frozen(trial)
    with torch.no_grad():
        tangents = {i: torch.randn_like(arguments[i]) for i in chosen}
        actual = tangents_of(trial.run, arguments, tangents)
        eager = tangents_of(reference_of(trial.op), arguments, tangents)
        wide = {i: t.double() for i, t in tangents.items()}
        exact = tangents_of(reference_of(trial.op), converted(arguments, torch.float64), wide)
    for a, e, x in zip(actual, eager, exact, strict=True):
        assert_as_exact_as_eager(trial, a, e, x, terms=1.0)


@trials(differentiable=True, dtypes=(torch.float64,), backends=("native",))
def test_tangents_of_every_argument_alone(trial: Trial) -> None:
    """Tables included; what an operator takes for a constant is one in both modes."""
    arguments, _ = frozen(trial)
    for i, argument in enumerate(arguments):
        if not isinstance(argument, Tensor) or not argument.is_floating_point():
            continue
        # A stride of zero, as `torch.ones_like(loss).expand(...)` has it.
        expanded = torch.randn_like(argument[..., :1]).expand(argument.shape)
        for tangent in (torch.randn_like(argument), expanded):
            expected = tangents_of(reference_of(trial.op), arguments, {i: tangent})
            for compute in (tangents_of, dual_tangents_of):
                for a, e in zip(compute(trial.run, arguments, {i: tangent}), expected, strict=True):
                    torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-9)


@trials(differentiable=True, dtypes=(torch.float64,), backends=("eager", "native"))
def test_both_modes_agree(trial: Trial) -> None:
    """`<u, J v> = <J^T u, v>`, also where the gradient is by definition not the derivative."""
    arguments = trial.arguments()
    wanted = leaves(arguments)
    outputs = trial.run(arguments)
    upstream = [torch.randn_like(o) for o in outputs]
    tangents = {i: torch.randn_like(a) for i, a in enumerate(arguments) if isinstance(a, Tensor) and a.requires_grad}
    gradients = torch.autograd.grad(outputs, wanted, upstream)
    forward = sum((u * t).sum() for u, t in zip(upstream, tangents_of(trial.run, arguments, tangents), strict=True))
    backward = sum((g * t).sum() for g, t in zip(gradients, tangents.values(), strict=True))
    torch.testing.assert_close(forward, backward, rtol=1e-9, atol=1e-9)


class Problem:
    """One operator as a function of what it is differentiated in, with everything that a transform
    takes."""

    def __init__(self, op: Operator, backend: str, dtype: torch.dtype) -> None:
        torch.manual_seed(3)
        arguments = op.cases()[0].make(torch.float32, torch.device("cpu"))
        chosen = [i for i, a in enumerate(arguments) if isinstance(a, Tensor) and a.requires_grad]
        values = converted(detached(arguments), dtype)

        def run(arguments: Sequence[Any]) -> tuple[Tensor, ...]:
            return as_tuple(op(*arguments, backend=backend))

        def draw(t: Tensor) -> Tensor:
            return torch.randn(t.shape).to(dtype)

        self.f = of_chosen(run, values, chosen)
        self.inputs = tuple(values[i] for i in chosen)
        self.every = tuple(range(len(chosen)))
        self.v, self.w = tuple(map(draw, self.inputs)), tuple(map(draw, self.inputs))
        self.u = tuple(draw(o) for o in self.f(*self.inputs))

    def loss(self, *inputs: Tensor) -> Tensor:
        # Not linear in the results, so that the gradient depends on them.
        return sum(((o + o.square()) * u).sum() for o, u in zip(self.f(*inputs), self.u, strict=True))  # type: ignore[return-value]

    def tangent(self, *inputs: Tensor) -> Any:
        return jvp(self.f, inputs, self.v)[1]

    def weighted_tangent(self, *inputs: Tensor) -> Tensor:
        return sum((t * u).sum() for t, u in zip(self.tangent(*inputs), self.u, strict=True))  # type: ignore[return-value]

    def trainable(self) -> list[Tensor]:
        return [i.clone().requires_grad_() for i in self.inputs]

    def batch(self) -> list[Tensor]:
        return [torch.stack((i, v, 2 * i)) for i, v in zip(self.inputs, self.v, strict=True)]

    def mean_flow(self) -> Any:
        """A loss with a value and its tangent, where the tangent is detached."""
        weights = self.trainable()
        values, tangents = jvp(self.f, tuple(weights), self.v)
        return torch.autograd.grad(
            sum((o * u + (o - t.detach()).square()).sum() for o, t, u in zip(values, tangents, self.u, strict=True)),
            weights,
        )

    def through_the_tangent(self) -> Any:
        weights = self.trainable()
        return torch.autograd.grad(self.weighted_tangent(*weights), weights, allow_unused=True, materialize_grads=True)

    def in_the_direction(self) -> Any:
        directions = [v.clone().requires_grad_() for v in self.v]
        tangents = jvp(self.f, self.inputs, tuple(directions))[1]
        return torch.autograd.grad(sum((t * u).sum() for t, u in zip(tangents, self.u, strict=True)), directions)

    def forward_over_reverse(self) -> Any:
        with forward_ad.dual_level():
            duals = [forward_ad.make_dual(i, v) for i, v in zip(self.trainable(), self.v, strict=True)]
            gradients = torch.autograd.grad(self.loss(*duals), duals)
            return [forward_ad.unpack_dual(g).tangent for g in gradients]

    def trainable_around_grad(self) -> Any:
        weights = self.trainable()
        inner = grad(lambda first: self.loss(first, *weights[1:]))(weights[0])
        return torch.autograd.grad((inner * self.v[0]).sum(), weights, allow_unused=True, materialize_grads=True)

    def without_gradients(self, mode: Callable[[], Any]) -> Any:
        with mode():
            return self.tangent(*self.inputs)


KERNELS: dict[str, Callable[[Problem], Any]] = {
    "jvp": lambda p: p.tangent(*p.inputs),
    "jvp in no_grad": lambda p: p.without_gradients(torch.no_grad),
    "jvp in inference_mode": lambda p: p.without_gradients(torch.inference_mode),
    "linearize": lambda p: linearize(p.f, *p.inputs)[1](*p.v),
    "grad": lambda p: grad(p.loss, p.every)(*p.inputs),
    "vjp": lambda p: vjp(p.f, *p.inputs)[1](p.u),
    "jacrev": lambda p: jacrev(p.f, p.every)(*p.inputs),
    "jvp of jvp": lambda p: jvp(p.tangent, p.inputs, p.w)[1],
    "jvp of grad": lambda p: jvp(grad(p.loss, p.every), p.inputs, p.v)[1],
    "grad of jvp": lambda p: grad(p.weighted_tangent, p.every)(*p.inputs),
    "grad of grad": lambda p: grad(
        lambda *i: sum((g * v).sum() for g, v in zip(grad(p.loss, p.every)(*i), p.v, strict=True)), p.every
    )(*p.inputs),
    "mean flow": Problem.mean_flow,
    "through the tangent": Problem.through_the_tangent,
    "in the direction": Problem.in_the_direction,
    "forward over reverse": Problem.forward_over_reverse,
    "trainable around grad": Problem.trainable_around_grad,
}
# The operators run in plain PyTorch.
VECTORISED: dict[str, Callable[[Problem], Any]] = {
    "vmap": lambda p: vmap(p.f)(*p.batch()),
    "vmap of grad": lambda p: vmap(grad(p.loss, p.every))(*p.batch()),
    "vmap of jvp": lambda p: vmap(p.tangent)(*p.batch()),
    "grad of vmap": lambda p: grad(lambda *b: sum(o.square().sum() for o in vmap(p.f)(*b)), p.every)(*p.batch()),
    "jacfwd": lambda p: jacfwd(p.f, p.every)(*p.inputs),
    "hessian": lambda p: hessian(p.loss, p.every)(*p.inputs),
}
DIFFERENTIABLE = [name for name, op in OPERATORS.items() if op.backward_schema is not None]


def assert_derivative(transform: Callable[[Problem], Any], op: Operator, backend: str) -> None:
    actual = torch.utils._pytree.tree_leaves(transform(Problem(op, backend, torch.float32)))
    expected = torch.utils._pytree.tree_leaves(transform(Problem(op, "eager", torch.float64)))
    assert len(actual) == len(expected) > 0
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a.double(), e, rtol=1e-4, atol=2e-5 * max(1.0, e.abs().max().item()))


@pytest.mark.parametrize("transform", KERNELS)
@pytest.mark.parametrize("name", DIFFERENTIABLE)
@pytest.mark.parametrize("backend", ["native", pytest.param("triton", marks=pytest.mark.slow)])
def test_derivatives_under_transforms(name: str, transform: str, backend: str) -> None:
    if reason := ops.backend.why_not(name, backend, "cpu", torch.float32):  # type: ignore[arg-type]
        pytest.skip(reason)
    assert_derivative(KERNELS[transform], OPERATORS[name], backend)


@pytest.mark.slow_but_first("transform")
@pytest.mark.parametrize("transform", VECTORISED)
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_derivatives_under_vmap(name: str, transform: str) -> None:
    assert_derivative(VECTORISED[transform], OPERATORS[name], "auto")
    if ops.backend.why_not(name, "native", "cpu", torch.float32) is None:
        with pytest.raises(RuntimeError, match=f"{name} runs in plain PyTorch under torch.func.vmap: ask for 'eager'"):
            VECTORISED[transform](Problem(OPERATORS[name], "native", torch.float32))


def test_the_tangent_of_a_tangent_is_that_of_the_formula() -> None:
    """PyTorch's layer norm is not enough of a reference: its own is wrong."""
    x, v, w = (torch.randn(3, 9, dtype=torch.float64) for _ in range(3))
    zero = torch.zeros(9, dtype=torch.float64)

    def formula(x: Tensor) -> Tensor:
        centred = x - x.mean(dim=-1, keepdim=True)
        return centred / torch.sqrt(centred.square().mean(dim=-1, keepdim=True) + 1e-6)

    def second(f: Callable[[Tensor], Tensor]) -> Tensor:
        return jvp(lambda x: jvp(f, (x,), (v,))[1], (x,), (w,))[1]

    torch.testing.assert_close(second(lambda x: ops.modulate(x, zero, zero)), second(formula))
    torch.testing.assert_close(second(lambda x: ops.modulate(x, zero, zero, backend="eager")), second(formula))


def test_a_tangent_that_enters_with_the_gradient() -> None:
    x = torch.randn(2, 3, 8, requires_grad=True)
    y = ops.modulate(x, torch.zeros(8), torch.zeros(8), backend="native")
    with forward_ad.dual_level():
        later = forward_ad.make_dual(y, torch.randn_like(y))
        with pytest.raises(RuntimeError, match="modulate: its gradient cannot be differentiated"):
            torch.autograd.grad(later.square().sum(), x)


def test_batches_of_gradients() -> None:
    x = torch.randn(2, 3, 8, requires_grad=True)
    upstream = torch.randn(4, 2, 3, 8)
    results = []
    for backend in ("native", "eager"):
        y = ops.modulate(x, torch.ones(8), torch.zeros(8), backend=backend)  # type: ignore[arg-type]
        results.append(torch.autograd.grad(y, x, upstream, is_grads_batched=True, retain_graph=True)[0])
        results.append(vmap(lambda u, y=y: torch.autograd.grad(y, x, u, retain_graph=True)[0])(upstream))
    for result in results[1:]:
        torch.testing.assert_close(result, results[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("size", [1e-12, 1e8])
def test_tangents_of_heads_of_any_size(size: float, dtype: torch.dtype) -> None:
    arguments = detached(OPERATORS["qk_norm_rope"].cases()[0].make(dtype, torch.device("cpu")))
    tangent = torch.randn_like(arguments[0])
    small, large = (
        tangents_of(lambda a: OPERATORS["qk_norm_rope"](*a, backend="native"), arguments, {0: t})[0].double()
        for t in (tangent, (tangent.double() * size).to(dtype))
    )
    torch.testing.assert_close(large / size, small, rtol=0, atol=4 * torch.finfo(dtype).eps * small.abs().max().item())


def test_clipped_elements_have_no_tangent() -> None:
    x = torch.tensor([[6e4, 1.0, -6e4, 2.0]]).half()
    tangents = jvp(lambda x: ops.gated_residual(x, x, torch.ones(4).half(), clip=True), (x,), (torch.ones_like(x),))[1]
    assert tangents.tolist() == [[0.0, 2.0, 0.0, 2.0]]


def test_an_operator_without_a_rule_is_refused() -> None:
    class Forgotten(Modulate):
        name = "forgotten"
        jvp = Operator.jvp

    with pytest.raises(TypeError, match="forgotten has a gradient and no tangent: state `jvp`"):
        Forgotten()
    assert "forgotten" not in OPERATORS


def test_a_tangent_of_what_has_no_gradient_is_refused() -> None:
    x = torch.randn(3, 8)
    with pytest.raises(NotImplementedError, match="block_statistics has no forward-mode derivative: run it with"):
        jvp(lambda x: OPERATORS["block_statistics"](x, x, backend="native"), (x,), (x,))
    assert not jvp(lambda x: ops.block_statistics(x, x + 1).mse, (x,), (x,))[1].any()


@pytest.mark.slow_but_first
@pytest.mark.parametrize("name", ["modulate", "qk_norm_rope", "rope_attention"])
def test_compiled_tangents(name: str) -> None:
    torch._dynamo.reset()
    problem, exact = (Problem(OPERATORS[name], *a) for a in (("auto", torch.float32), ("eager", torch.float64)))

    def dual(*inputs: Tensor) -> list[Tensor | None]:
        with forward_ad.dual_level():
            outputs = problem.f(*(forward_ad.make_dual(i, v) for i, v in zip(inputs, problem.v, strict=True)))
            return [forward_ad.unpack_dual(o).tangent for o in outputs]

    # It holds no tangents: PyTorch runs the function itself there.
    plain = torch.compile(problem.f, backend="aot_eager")
    plain(*problem.inputs)
    for function in (
        torch.compile(problem.tangent, backend="aot_eager", fullgraph=True),
        torch.compile(dual, backend="aot_eager", fullgraph=True),
        lambda *inputs: jvp(plain, inputs, problem.v)[1],
    ):
        for a, e in zip(function(*problem.inputs), exact.tangent(*exact.inputs), strict=True):
            torch.testing.assert_close(a.double(), e, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_the_tangent_of_attention_in_blocks_of_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    if reason := ops.backend.why_not("rope_attention", "triton", "cpu", torch.float32):
        pytest.skip(reason)
    import sys

    whole = Problem(OPERATORS["rope_attention"], "triton", torch.float32)
    expected = whole.tangent(*whole.inputs)
    monkeypatch.setattr(sys.modules["fastdistill.ops.rope_attention"], "MAX_SCORES", 50)
    for a, e in zip(whole.tangent(*whole.inputs), expected, strict=True):
        torch.testing.assert_close(a, e)


@pytest.mark.parametrize("attention", ["auto", "_native_math"])
def test_attention_between_operators(attention: str) -> None:
    arguments = [torch.randn(2, 5, 2, 8, dtype=torch.float64) for _ in range(3)]
    weights = [torch.randn(8, dtype=torch.float64) for _ in range(2)]
    tangents = tuple(torch.randn_like(a) for a in arguments)
    results = [
        jvp(lambda *qkv: ops.rope_attention(*qkv, *weights, None, None, **kind), tuple(arguments), tangents)[1]  # noqa: B023
        for kind in ({"attention": attention}, {"attention": "fused", "backend": "eager"})
    ]
    torch.testing.assert_close(*results)


def test_attention_that_would_drop_the_tangent_is_refused() -> None:
    q = torch.randn(1, 4, 2, 8)
    with pytest.raises(
        RuntimeError, match=r"'native' was asked for, but it has no derivatives in forward mode.*_native_math"
    ):
        jvp(lambda q: attend(q, q, q, "native"), (q,), (q,))
    assert grad(lambda q: attend(q, q, q, "native").sum())(q).shape == q.shape


def test_a_graph_compiled_without_tangents_drops_none() -> None:
    torch._dynamo.reset()
    x, v, m = torch.randn(2, 3, 8), torch.randn(2, 3, 8), torch.randn(8)
    compiled = torch.compile(lambda x: ops.modulate(x, m, m), backend="aot_eager", fullgraph=True)
    compiled(x)
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(compiled(forward_ad.make_dual(x, v))).tangent
    torch.testing.assert_close(tangent, jvp(lambda x: ops.modulate(x, m, m, backend="eager"), (x,), (v,))[1])


def test_a_transform_that_is_over_leaves_no_trace() -> None:
    x = torch.randn(2, 8)
    jvp(lambda x: ops.modulate(x, x, x), (x,), (x,))
    assert not transforms.active()
    with use_backend("native"):
        assert MODULATE(x, x, x, 1e-6).equal(MODULATE._run["native"](x, x, x, 1e-6))
