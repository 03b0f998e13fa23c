"""Input of a parallel block's output projection: attention and activated feed-forward together.

Shapes: B batch, S tokens, D and M channels.

Kernels: csrc/cpu/activation.cpp, csrc/cuda/activation.cu, ops/triton/activation_concat.py
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdistill.ops.backend import Backend, Request
from fastdistill.ops.op import Arguments, Case, Operator, Tangents, Tensors, describe
from fastdistill.ops.rows import check_contiguous, check_rows, contiguous_rows

Activation = Literal["gelu_tanh", "swiglu"]


def activation_concat(
    x: Tensor | None, y: Tensor, activation: Activation = "gelu_tanh", *, backend: Request | None = None
) -> Tensor:
    """`cat((x, act(y)), dim=-1)`, where nothing but the result is written.

    In the parallel blocks (ViT-22B, arXiv 2302.05442, section 2) that FLUX calls single blocks, one
    projection takes attention's output and the activated feed-forward together. Eager PyTorch
    writes the activation, then copies it. Differentiable in x and y, in reverse and in forward
    mode.

    | `activation` | y | value | source |
    |---|---|---|---|
    | `gelu_tanh`, as in FLUX.1 | (B, S, M) or (S, M) \
| `0.5 y (1 + tanh(sqrt(2 / pi) (y + 0.044715 y^3)))` | arXiv 1606.08415, section 2 |
    | `swiglu`, as in FLUX.2 | (B, S, 2 M) or (S, 2 M) | `silu(first half) * second half` \
| arXiv 2002.05202, equation 6 |

    Args:
        x: (B, S, D) or (S, D), or None: the activation alone.
        y: see the table. float32, bfloat16, float16 or (on CPU) float64, with x in the same dtype.
            Channels must be contiguous, the other axes may have any stride.
        activation: see the table.
        backend: `eager`, `native`, `triton` or `auto`; by default the one of `use_backend`, else
            `auto`.

    Returns:
        (B, S, D + M) or (S, D + M), contiguous. Computed in float32 (float64 for float64), rounded
        once at the end.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, device, shape or stride; the
            message says which.
        RuntimeError: `backend` was named and cannot run here; the message says why.
    """
    if activation not in ("gelu_tanh", "swiglu"):
        raise ValueError(f"activation: expected gelu_tanh or swiglu, got {activation!r}")
    return ACTIVATION_CONCAT(y, x, activation == "swiglu", backend=backend)  # type: ignore[no-any-return]


class ActivationConcat(Operator):
    name = "activation_concat"
    triton_module = "fastdistill.ops.triton.activation_concat"
    schema = "(Tensor y, Tensor? x, bool gated) -> Tensor"
    backward_schema = "(Tensor grad, Tensor y, bool gated) -> Tensor"

    def check(self, y: Tensor, x: Tensor | None, gated: bool) -> None:
        check_rows("y", y)
        if gated and y.shape[-1] % 2:
            raise ValueError(f"y: expected an even number of channels, got {describe(y)}")
        if x is None:
            return
        if x.shape[:-1] != y.shape[:-1] or x.device != y.device:
            raise ValueError(f"x: expected (..., D) for y of {describe(y)}, got {describe(x)}")
        if x.dtype != y.dtype:
            raise TypeError(f"x: expected the dtype of y, {y.dtype}, got {describe(x)}")
        check_contiguous("x", x)

    def reference(self, y: Tensor, x: Tensor | None, gated: bool) -> Tensor:
        if gated:
            gate, value = y.chunk(2, dim=-1)
            activated = F.silu(gate) * value
        else:
            activated = F.gelu(y, approximate="tanh")
        return activated if x is None else torch.cat((x, activated), dim=-1)

    def fake(self, y: Tensor, x: Tensor | None, gated: bool) -> Tensor:
        channels = (y.shape[-1] // 2 if gated else y.shape[-1]) + (0 if x is None else x.shape[-1])
        return y.new_empty((*y.shape[:-1], channels))

    def fake_backward(self, grad: Tensor, y: Tensor, gated: bool) -> Tensor:
        return y.new_empty(y.shape)

    def save(self, ctx: Any, arguments: tuple[Any, ...], results: tuple[Tensor]) -> None:
        y, x, ctx.gated = arguments
        ctx.before = 0 if x is None else x.shape[-1]
        ctx.save_for_backward(y)

    def backward(self, ctx: Any, backward_op: Callable[..., Any], *grads: Tensor) -> tuple[Tensor | None, ...]:
        # The gradient of x is a part of the incoming gradient as it is.
        dx, activated = grads[0].tensor_split((ctx.before,), dim=-1)
        dy = backward_op(contiguous_rows(activated), *ctx.saved_tensors, ctx.gated) if ctx.needs_input_grad[0] else None
        return dy, dx if ctx.needs_input_grad[1] else None, None

    def jvp(self, backend: Backend, arguments: Arguments, results: Tensors, tangents: Tangents) -> Tensors:
        y, x, gated = arguments
        dy, dx, _ = tangents
        width = y.shape[-1] // 2 if gated else y.shape[-1]
        activated = y.new_zeros((*y.shape[:-1], width))
        if dy is not None and gated:
            # Both partial derivatives, as the backward op of ones.
            slopes = self.backward_op(backend)(torch.ones_like(activated), y, gated)
            activated = (slopes * dy).unflatten(-1, (2, width)).sum(dim=-2)
        elif dy is not None:
            activated = self.backward_op(backend)(contiguous_rows(dy), y, gated)
        if x is None:
            return (activated,)
        return (torch.cat((torch.zeros_like(x) if dx is None else dx, activated), dim=-1),)

    def bytes_moved(self, y: Tensor, x: Tensor | None, gated: bool) -> tuple[int, int]:
        activated, before = y.nbytes // 2 if gated else y.nbytes, 0 if x is None else x.nbytes
        return y.nbytes + activated + 2 * before, 2 * y.nbytes + activated

    def cases(self) -> Sequence[Case]:
        return tuple(Case(id=shapes.id, make=partial(_arguments, shapes)) for shapes in SHAPES)

    def workloads(self) -> Sequence[Case]:
        return tuple(
            Case(
                id=f"B1-S{S}-D3072-M12288",
                make=partial(_arguments, ActivationShapes(id="", y=(1, S, 12288), before=3072)),
            )
            for S in (1152, 4608)
        )


@dataclass(frozen=True, kw_only=True)
class ActivationShapes:
    """Shapes of the arguments of one case."""

    id: str
    y: tuple[int, ...]
    before: int | None
    """Channels of x; None without x."""
    gated: bool = False
    strided: bool = False
    """Slices of wider tensors, like chunks of one projection."""


SHAPES = (
    ActivationShapes(id="B2-S3-D8-M32", y=(2, 3, 32), before=8),
    ActivationShapes(id="B2-S3-D8-M16-gated", y=(2, 3, 32), before=8, gated=True),
    ActivationShapes(id="B1-S5-D7-M33-strided", y=(1, 5, 33), before=7, strided=True),
    ActivationShapes(id="B2-S4-D24-M40-gated-strided", y=(2, 4, 80), before=24, gated=True, strided=True),
    ActivationShapes(id="B2-S3-M19", y=(2, 3, 19), before=None),
    ActivationShapes(id="S6-D5-M9-gated", y=(6, 18), before=5, gated=True),
    ActivationShapes(id="B1-S1-D1-M1100", y=(1, 1, 1100), before=1),
    ActivationShapes(id="B2-S0-D8-M16", y=(2, 0, 16), before=8),
)


def _arguments(shapes: ActivationShapes, dtype: torch.dtype, device: torch.device) -> tuple[Any, ...]:
    def draw(channels: int) -> Tensor:
        if not shapes.strided:
            return torch.randn(*shapes.y[:-1], channels, device=device).to(dtype)
        return torch.randn(*shapes.y[:-1], 3 * channels, device=device).to(dtype)[..., channels : 2 * channels]

    x = None if shapes.before is None else draw(shapes.before).requires_grad_()
    # Far enough out to reach the flat ends.
    return draw(shapes.y[-1]).mul(3).requires_grad_(), x, shapes.gated


ACTIVATION_CONCAT = ActivationConcat()
