"""Loss of distribution matching distillation: the student moves along the difference of two scores.

Shapes: B batch, ... any axes of a sample.

Kernels: csrc/cpu/dmd_loss.cpp, csrc/cuda/dmd_loss.cu, ops/triton/dmd_loss.py
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from fastdistill.ops.backend import Backend, Request
from fastdistill.ops.op import (
    Arguments,
    Case,
    Operator,
    Tangents,
    Tensors,
    accumulator_of,
    check_floats,
    check_tensor,
    describe,
)

Prediction = Literal["velocity", "x0", "eps", "v"]
Normaliser = Literal["sample", "batch", "none"]
GuidanceForm = Literal["uncond", "cond"]

# target = a * x + b * noise, and the sign with which real - critic points from real to critic in
# x0.
_TARGETS: dict[str, tuple[float, float, float]] = {
    "velocity": (-1, 1, 1),
    "x0": (1, 0, -1),
    "eps": (0, 1, 1),
    "v": (0, 0, 1),
}
_NORMALISERS: tuple[Normaliser, ...] = ("sample", "batch", "none")


def dmd_loss(
    x: Tensor,
    noise: Tensor,
    cond: Tensor,
    uncond: Tensor | None,
    critic: Tensor,
    *,
    guidance: float = 1.0,
    guidance_form: GuidanceForm = "uncond",
    prediction: Prediction = "velocity",
    alpha: Tensor | None = None,
    sigma: Tensor | None = None,
    normaliser: Normaliser = "sample",
    eps: float = 0.0,
    weight: Tensor | None = None,
    mask: Tensor | None = None,
    nan_to_zero: bool = True,
    backend: Request | None = None,
) -> Tensor:
    """`0.5 * mean(g^2)` with the gradient `g / numel` in x, where
    `g = (real - critic) / mean |real - target|` up to sign.

    The distribution matching gradient of DMD (arXiv 2311.18828, equations 7 and 8) and DMD2 (arXiv
    2405.14867). x are the student's samples and `x_t = alpha x + sigma noise`. At x_t, `real` is
    the guided prediction of the frozen teacher and `critic` the prediction of the critic (the
    paper's fake score), the network that follows the student. In the teacher's own parameterisation
    the time cancels: `target` is the prediction at x_t that gives x, and both differences carry the
    same factor.

    The gradient is by definition not the derivative of the value. In forward mode a tangent v gives
    `sum(g v) / numel`, its product with that gradient, so that both modes agree.

    | `prediction` | target | g points along |
    |---|---|---|
    | `velocity` | noise - x | real - critic |
    | `x0` | x | critic - real |
    | `eps` | noise | real - critic |
    | `v` | alpha noise - sigma x | real - critic |

    Args:
        x: (B, ...), float32, bfloat16, float16 or (on CPU) float64. The only argument with a
            gradient and a tangent; all others are constants. A sample that is not contiguous is
            copied, here and in the tensors like x.
        noise: like x.
        cond: the teacher's prediction with the prompt, like x.
        uncond: the teacher's prediction without the prompt, like x; None where the teacher is
            guided already.
        critic: the critic's prediction, like x.
        guidance: classifier-free guidance w, unused without uncond.
        guidance_form: `uncond`: real = u + w (c - u), as FastVideo; `cond`: real = c + w (c - u),
            as Self-Forcing.
        prediction: what cond, uncond and critic predict.
        alpha, sigma: (B), for `v` only.
        normaliser: the mean of |real - target| over each sample (DMD, DMD2, FastGen), over the
            batch (FastVideo), or none.
        eps: added to the normaliser's mean, in the units of the prediction (FastGen: 1e-6).
        weight: (B), multiplies g.
        mask: bool, broadcasts to x. g is zero outside the mask, and means are taken inside it; the
            normaliser ignores the mask (Self-Forcing).
        nan_to_zero: elements of g that are not finite count as zero, so that one bad prediction
            does not end a training run.
        backend: `eager`, `native`, `triton` or `auto`; by default the one of `use_backend`, else
            `auto`.

    Returns:
        A scalar, float32 (float64 for float64). Sums are float32 within chunks and float64 across
        chunks, in an order given by the shape alone, so the loss is bitwise repeatable. The host
        reads no value back.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, device or shape, or options do
            not go together; the message says which.
        RuntimeError: `backend` was named and cannot run here; the message says why.
    """
    if prediction not in _TARGETS:
        raise ValueError(f"prediction: expected one of {', '.join(_TARGETS)}, got {prediction!r}")
    if normaliser not in _NORMALISERS:
        raise ValueError(f"normaliser: expected one of {', '.join(_NORMALISERS)}, got {normaliser!r}")
    if guidance_form not in ("uncond", "cond"):
        raise ValueError(f"guidance_form: expected uncond or cond, got {guidance_form!r}")
    if (alpha is not None or sigma is not None) != (prediction == "v") or (alpha is None) != (sigma is None):
        raise ValueError("alpha, sigma: expected both with prediction='v', and neither otherwise")
    given = {"x": x, "noise": noise, "cond": cond, "uncond": uncond, "critic": critic}
    given |= {"alpha": alpha, "sigma": sigma, "weight": weight, "mask": mask}
    for name, t in given.items():
        check_tensor(name, t, optional=name not in ("x", "noise", "cond", "critic"))
        if t is not None and t.is_complex():
            raise TypeError(f"{name}: expected real numbers, got {describe(t)}")
    check_floats("x", x)
    if x.dim() < 1:
        raise ValueError(f"x: expected (B, ...), got {describe(x)}")
    a, b, sign = _TARGETS[prediction]
    coefficients = None
    if alpha is not None and sigma is not None:
        for name, t in (("alpha", alpha), ("sigma", sigma)):
            if t.shape != x.shape[:1]:
                raise ValueError(f"{name}: expected ({x.shape[0]},), one for each sample, got {describe(t)}")
        coefficients = torch.stack((-sigma, alpha), dim=1).to(x.device, accumulator_of(x.dtype))
    if weight is not None:
        if weight.shape != x.shape[:1]:
            raise ValueError(f"weight: expected ({x.shape[0]},), one for each sample, got {describe(weight)}")
        weight = weight.detach().to(x.device, accumulator_of(x.dtype)).contiguous()
    if mask is not None:
        if mask.dtype != torch.bool:
            raise TypeError(f"mask: expected bool, got {describe(mask)}")
        if mask.device != x.device or not _broadcasts(mask, x):
            raise ValueError(f"mask: expected a shape that broadcasts to x, {describe(x)}, got {describe(mask)}")
        mask = _contiguous_samples(mask.expand_as(x))
    return DMD_LOSS(  # type: ignore[no-any-return]
        _contiguous_samples(x),
        *(t if t is None else _contiguous_samples(t.detach()) for t in (noise, cond, uncond, critic)),
        coefficients,
        weight,
        mask,
        guidance + (guidance_form == "cond"),
        a,
        b,
        sign,
        _NORMALISERS.index(normaliser),
        eps,
        nan_to_zero,
        backend=backend,
    )


def _broadcasts(t: Tensor, x: Tensor) -> bool:
    sizes = zip(reversed(t.shape), reversed(x.shape), strict=False)
    return t.dim() <= x.dim() and all(size == 1 or size == of_x for size, of_x in sizes)


def _contiguous_samples(t: Tensor) -> Tensor:
    return t if t.dim() == 0 or t.shape[0] == 0 or t[0].is_contiguous() else t.contiguous()


class DmdLoss(Operator):
    name = "dmd_loss"
    triton_module = "fastdistill.ops.triton.dmd_loss"
    schema = (
        "(Tensor x, Tensor noise, Tensor cond, Tensor? uncond, Tensor critic, "
        "Tensor? coefficients, Tensor? weight, Tensor? mask, float guidance, float a, float b, float sign, "
        "int normaliser, float eps, bool finite) -> (Tensor loss, Tensor factors)"
    )
    backward_schema = (
        "(Tensor grad, Tensor cond, Tensor? uncond, Tensor critic, Tensor? mask, Tensor factors, float guidance, "
        "bool finite) -> Tensor"
    )
    # The normaliser is a constant of the gradient, and so is real - critic.
    is_derivative = False

    def check(
        self, x: Tensor, noise: Tensor, cond: Tensor, uncond: Tensor | None, critic: Tensor, *options: Any
    ) -> None:
        for name, t in (("noise", noise), ("cond", cond), ("uncond", uncond), ("critic", critic)):
            if t is None:
                continue
            if t.shape != x.shape or t.device != x.device:
                raise ValueError(f"{name}: expected the shape and device of x, {describe(x)}, got {describe(t)}")
            if t.dtype != x.dtype:
                raise TypeError(f"{name}: expected the dtype of x, {x.dtype}, got {describe(t)}")

    def reference(
        self,
        x: Tensor,
        noise: Tensor,
        cond: Tensor,
        uncond: Tensor | None,
        critic: Tensor,
        coefficients: Tensor | None,
        weight: Tensor | None,
        mask: Tensor | None,
        guidance: float,
        a: float,
        b: float,
        sign: float,
        normaliser: int,
        eps: float,
        finite: bool,
    ) -> Tensor:
        wide = accumulator_of(x.dtype)
        x = x.to(wide)
        # Constants. torch.no_grad would leave them their tangents.
        at, noise, cond, critic = (t.detach().to(wide) for t in (x, noise, cond, critic))
        uncond, coefficients, weight = (t if t is None else t.detach().to(wide) for t in (uncond, coefficients, weight))
        per_sample = (-1, *[1] * (x.dim() - 1))
        real = cond if uncond is None else uncond + guidance * (cond - uncond)
        if coefficients is None:
            target = a * at + b * noise
        else:
            of_x, of_noise = (c.reshape(per_sample) for c in coefficients.unbind(1))
            target = of_x * at + of_noise * noise
        distance = (real - target).abs()
        factor = torch.full((x.shape[0],), sign, dtype=wide, device=x.device)
        if normaliser == 0:
            factor = factor / (distance.unsqueeze(-1).flatten(1).mean(dim=1) + eps)
        if normaliser == 1:
            factor = factor / (distance.mean() + eps)
        if weight is not None:
            factor = factor * weight
        difference = real - critic
        if finite:
            factor, difference = (torch.where(t.isfinite(), t, 0.0) for t in (factor, difference))
        g = factor.reshape(per_sample) * difference
        if mask is not None:
            g = torch.where(mask, g, 0.0)
        count = x.numel() if mask is None else mask.sum()
        g_over_count = g / torch.clamp(torch.as_tensor(count, device=x.device), min=1)
        value = 0.5 * (g * g_over_count).sum()
        # The value without rounding it against x, and g / count as its gradient.
        return value + ((x - at) * g_over_count).sum()

    def fake(self, x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
        dtype = accumulator_of(x.dtype)
        return x.new_empty((), dtype=dtype), x.new_empty(x.shape[:1], dtype=dtype)

    def fake_backward(self, grad: Tensor, cond: Tensor, *arguments: Any) -> Tensor:
        return cond.new_empty(cond.shape)

    def save(self, ctx: Any, arguments: tuple[Any, ...], results: tuple[Tensor, Tensor]) -> None:
        _, _, cond, uncond, critic, _, _, mask, ctx.guidance, *_, ctx.finite = arguments
        ctx.save_for_backward(cond, uncond, critic, mask, results[1])

    def backward(self, ctx: Any, backward_op: Callable[..., Any], *grads: Tensor) -> tuple[Tensor | None, ...]:
        return backward_op(grads[0], *ctx.saved_tensors, ctx.guidance, ctx.finite), *(None,) * 14

    def jvp(self, backend: Backend, arguments: Arguments, results: Tensors, tangents: Tangents) -> Tensors:
        _, _, cond, uncond, critic, _, _, mask, guidance, *_, finite = arguments
        loss, factors = results
        if tangents[0] is None:
            return (torch.zeros_like(loss),)
        # A gradient rounded to 16 bits would lose what the loss, which is wide, keeps.
        predictions = (t if t is None else t.to(loss.dtype) for t in (cond, uncond, critic))
        gradient = self.backward_op(backend)(torch.ones_like(loss), *predictions, mask, factors, guidance, finite)
        return ((gradient * tangents[0]).sum(),)

    def bytes_moved(
        self, x: Tensor, noise: Tensor, cond: Tensor, uncond: Tensor | None, *options: Any
    ) -> tuple[int, int]:
        predictions = 2 if uncond is None else 3
        return (2 + predictions) * x.nbytes, (1 + predictions) * x.nbytes

    def cases(self) -> Sequence[Case]:
        options: dict[str, dict[str, Any]] = {
            "velocity": {},
            "unguided-eps": {"guided": False, "prediction": "eps"},
            "x0-batch": {"prediction": "x0", "normaliser": 1},
            "v-weighted": {"prediction": "v", "weighted": True, "eps": 1e-3},
            "unnormalised": {"normaliser": 2},
            "masked": {"masked": True, "shape": (3, 40)},
            "masked-unguided": {"masked": True, "guided": False, "shape": (2, 3, 5)},
            "strided": {"strided": True},
            # A single difference may cancel, which says nothing of the implementation; hence eps,
            # and a mean over four.
            "one-element": {"shape": (1, 1), "eps": 1.0},
            "no-axes": {"shape": (4,), "normaliser": 1},
            "empty-batch": {"shape": (0, 3)},
            "many-chunks": {"shape": (2, 3, 11003), "weighted": True},
        }
        return tuple(Case(id=id, make=partial(_arguments, **changes)) for id, changes in options.items())

    def workloads(self) -> Sequence[Case]:
        return (Case(id="B8-16x128x128", make=partial(_arguments, shape=(8, 16, 128, 128))),)


def _arguments(
    dtype: torch.dtype,
    device: torch.device,
    *,
    shape: tuple[int, ...] = (3, 4, 5, 7),
    prediction: Prediction = "velocity",
    normaliser: int = 0,
    guided: bool = True,
    weighted: bool = False,
    masked: bool = False,
    strided: bool = False,
    eps: float = 0.0,
) -> tuple[Any, ...]:
    def draw() -> Tensor:
        if strided:
            return torch.randn(shape[0], 2, *shape[1:], device=device).to(dtype)[:, 1]
        return torch.randn(shape, device=device).to(dtype)

    wide = accumulator_of(dtype)
    coefficients = torch.randn(shape[0], 2, device=device).to(wide) if prediction == "v" else None
    weight = torch.rand(shape[0], device=device).to(wide) if weighted else None
    mask = torch.rand(shape, device=device) < 0.7 if masked else None
    uncond = draw() if guided else None
    options = coefficients, weight, mask, 3.5, *_TARGETS[prediction], normaliser, eps, True
    return draw().requires_grad_(), draw(), draw(), uncond, draw(), *options


DMD_LOSS = DmdLoss()
