"""Derivatives of a patched model under `torch.func` and forward-mode differentiation are those of
the stock model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.models.attention_dispatch import attention_backend
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jvp, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastdistill.models.patch import patched
from tests.tiny_families import FUSED, run, seeded

Function = Callable[..., Tensor]


def along_the_stream(
    name: str, cast: Callable[[Any], Any] = lambda inputs: inputs
) -> tuple[Any, Function, tuple[Tensor, ...], tuple[Tensor, ...]]:
    """A model as a function of its latents, with a point and a direction."""
    make, make_inputs = FUSED[name]
    model, inputs = seeded(make), cast(make_inputs())
    if name == "z_image":
        samples = tuple(inputs["x"])
        return model, lambda *x: run(model, {**inputs, "x": list(x)}), samples, directions(samples)
    samples = (inputs["hidden_states"],)
    return model, lambda x: run(model, {**inputs, "hidden_states": x}), samples, directions(samples)


def directions(samples: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(torch.randn_like(x) for x in samples)


def by_dual_numbers(model: Function, x: tuple[Tensor, ...], v: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    with forward_ad.dual_level():
        out = model(*(forward_ad.make_dual(*pair) for pair in zip(x, v, strict=True)))
        primal, tangent = forward_ad.unpack_dual(out)
    assert tangent is not None
    return primal, tangent


def assert_same(actual: Tensor, expected: Tensor, relative: float = 2e-5) -> None:
    assert float(expected.norm()) > 1e-3
    torch.testing.assert_close(actual, expected, rtol=0, atol=relative * float(expected.abs().max()))


@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize("how", [jvp, by_dual_numbers], ids=["func", "dual"])
@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
@pytest.mark.parametrize("gradients", [True, False], ids=["grad", "no-grad"])
def test_tangent_of_the_latents(name: str, how: Any, trained: bool, gradients: bool) -> None:
    model, function, x, v = along_the_stream(name)
    model.requires_grad_(trained)
    with torch.set_grad_enabled(gradients):
        with attention_backend("_native_math"), sdpa_kernel(SDPBackend.MATH):
            value, tangent = how(function, x, v)
        for backend in ("native", "eager"):
            with patched(model, backend=backend) as report:
                fast_value, fast_tangent = how(function, x, v)
            assert not report.stepped_aside
            assert_same(fast_value.detach(), value.detach())
            assert_same(fast_tangent.detach(), tangent.detach())


@pytest.mark.parametrize("name", FUSED)
@torch.no_grad()
def test_tangent_is_the_difference_quotient(name: str) -> None:
    # Z-Image rotates in float32 whatever its dtype: the step has to be a large one.
    model, function, x, v = along_the_stream(name, in_float64)
    model.double()
    step = 1e-3
    with patched(model, backend="native"):
        _, tangent = jvp(function, x, v)
        after = function(*(a + step * b for a, b in zip(x, v, strict=True)))
        before = function(*(a - step * b for a, b in zip(x, v, strict=True)))
    assert_same(tangent, (after - before) / (2 * step), 1e-3)


def in_float64(inputs: Any) -> Any:
    if isinstance(inputs, dict):
        return {name: t if name.endswith("_ids") else in_float64(t) for name, t in inputs.items()}
    if isinstance(inputs, list):
        return [in_float64(t) for t in inputs]
    return inputs.double() if isinstance(inputs, Tensor) and inputs.is_floating_point() else inputs


def losses(name: str) -> tuple[Any, Function, dict[str, Tensor]]:
    """A loss as a function of the parameters, which `functional_call` puts into the model."""
    make, make_inputs = FUSED[name]
    model, inputs = seeded(make), make_inputs()

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        out = functional_call(model, parameters, kwargs={**inputs, "return_dict": False})[0]
        return (torch.cat([t.flatten() for t in out]) if isinstance(out, list) else out).square().mean()

    return model, loss, {key: 1.1 * p.detach() for key, p in model.named_parameters()}


@pytest.mark.parametrize("name", FUSED)
def test_gradients_of_parameters_that_are_given(name: str) -> None:
    model, loss, parameters = losses(name)
    direction = {key: torch.randn_like(p) for key, p in parameters.items()}
    with attention_backend("_native_math"), sdpa_kernel(SDPBackend.MATH):
        stock, (_, tangent) = grad(loss)(parameters), jvp(loss, (parameters,), (direction,))
    with patched(model):
        fast, (_, fast_tangent) = grad(loss)(parameters), jvp(loss, (parameters,), (direction,))
        _, pull = vjp(loss, parameters)
        (pulled,) = pull(torch.tensor(1.0))
    floor = 1e-3 * max(float(g.abs().max()) for g in stock.values())
    for key, gradient in stock.items():
        atol = 1e-4 * max(float(gradient.abs().max()), floor)
        torch.testing.assert_close(fast[key], gradient, rtol=0, atol=atol, msg=key)
        torch.testing.assert_close(pulled[key], gradient, rtol=0, atol=atol, msg=key)
    assert_same(fast_tangent, tangent, 1e-4)


@pytest.mark.parametrize("name", [name for name in FUSED if name != "z_image"])
def test_directions_in_a_batch(name: str) -> None:
    """Several directions at one point by `vmap` over `jvp`, as estimates of a trace take them."""
    model, function, (x,), _ = along_the_stream(name)
    several = torch.randn(3, *x.shape)

    def tangents() -> Tensor:
        return vmap(lambda v: jvp(function, (x,), (v,))[1])(several)

    with torch.no_grad():
        with attention_backend("_native_math"), sdpa_kernel(SDPBackend.MATH):
            one_by_one = torch.stack([jvp(function, (x,), (v,))[1] for v in several])
        with patched(model):
            assert_same(tangents(), one_by_one)
