"""Fused operators as a patched block calls them.

A block's tensors and the operators meet here. Autocast leaves a modulation or a branch in another
dtype than its stream; torch.compile fuses some things as well by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastdistill import ops
from fastdistill.ops.activation_concat import ACTIVATION_CONCAT, Activation
from fastdistill.ops.backend import Request
from fastdistill.ops.gated_residual import GATED_RESIDUAL, clip_limit
from fastdistill.ops.modulate import MODULATE
from fastdistill.ops.op import FLOATS, accumulator_of

RotaryTables = tuple[Tensor, Tensor] | None
Heads = Tensor | tuple[Tensor, Tensor, Tensor]


class Fusions:
    """Operators of one patched model, each a method of that name, and its attention backend.

    Args:
        backend: of the operators; None leaves the choice to `use_backend`.
        attention: an attention backend of diffusers by name, or `auto`.

    Attributes:
        seen: device and dtype of the latest stream; None before the first call, and under
            torch.compile.
    """

    def __init__(self, backend: Request | None, attention: str) -> None:
        self.backend = backend
        self.attention = attention
        self.seen: tuple[torch.device, torch.dtype] | None = None

    def copy(self) -> Fusions:
        """Operators of another model, with the same backends."""
        return Fusions(self.backend, self.attention)

    def modulate(self, x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
        x = _repeated(x, scale)
        scale, shift = _fitting(x, scale, shift)
        if torch.compiler.is_compiling():
            # Inductor fuses a norm alone with its neighbours; an operator would stand in the way.
            return MODULATE.reference(x, scale, shift, eps)
        return ops.modulate(x, scale, shift, eps, backend=self.backend)

    def modulate_for_two(self, x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            out = self.modulate(x, scale, shift, eps)
            return out, out
        x = _repeated(x, scale)
        scale, shift = _fitting(x, scale, shift)
        return ops.modulate_for_two(x, scale, shift, eps, backend=self.backend)

    def gated_residual(self, x: Tensor, y: Tensor, gate: Tensor, *, clip: bool) -> Tensor:
        """`clip` keeps float16 finite where diffusers' block does; no other dtype is clipped."""
        x, y = _promoted(_repeated(x, y), y)
        clip = clip and x.dtype == torch.float16
        (gate,) = _fitting(x, gate)
        if torch.compiler.is_compiling():
            return GATED_RESIDUAL.reference(x, y, gate, clip_limit(clip))
        # Every block of every family comes by here.
        self.seen = x.device, x.dtype
        return ops.gated_residual(x, y, gate, clip=clip, backend=self.backend)

    def gated_residual_modulate(
        self, x: Tensor, y: Tensor, gate: Tensor, scale: Tensor, shift: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        """Chain between attention and feed-forward.

        It stays fused under torch.compile: the compiler's own is no faster.
        """
        x, y = _promoted(_repeated(x, y), y)
        gate, scale, shift = _fitting(x, gate, scale, shift)
        return ops.gated_residual_modulate(x, y, gate, scale, shift, eps, backend=self.backend)

    def qk_norm_rope(self, q: Tensor, k: Tensor, norms: Sequence[Any], tables: RotaryTables) -> tuple[Tensor, Tensor]:
        """`norms` are the modules that norm q and k."""
        q_weight, k_weight = _weights(norms, q)
        cos, sin = _cos_sin(tables, q)
        return ops.qk_norm_rope(q, k, q_weight, k_weight, cos, sin, norms[0].eps, backend=self.backend)

    def joint_qk_norm_rope(
        self, first: Heads, second: Heads, norms: Sequence[Any], tables: RotaryTables
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`norms` are the modules that norm q and k of the first stream, then of the second."""
        like = second if isinstance(second, Tensor) else second[0]
        first_q, first_k, second_q, second_k = _weights(norms, like)
        cos, sin = _cos_sin(tables, like)
        return ops.joint_qk_norm_rope(
            first, second, (first_q, first_k), (second_q, second_k), cos, sin, norms[0].eps, backend=self.backend
        )

    def activation_concat(self, x: Tensor | None, y: Tensor, activation: Activation) -> Tensor:
        if x is not None:
            x, y = _promoted(x, y)
        if torch.compiler.is_compiling():
            return ACTIVATION_CONCAT.reference(y, x, activation == "swiglu")
        return ops.activation_concat(x, y, activation, backend=self.backend)


# In the order of the operators' table.
FUSED_OPERATORS = tuple(name for name in ops.OPERATORS if hasattr(Fusions, name))


def _fitting(x: Tensor, *modulations: Tensor) -> list[Tensor]:
    """Modulations as the operators take them.

    They have the dtype of `x`, or a wider one: autocast computes modulations in 16 bits while the
    stream is float32. Where each token has a modulation of its own, each sample has, too.
    """
    if modulations[0].dim() == 3 and modulations[0].shape[1] != 1:
        modulations = tuple(m.expand(x.shape) for m in modulations)
    dtype = x.dtype
    return [
        m if m.dtype == dtype or (m.dtype == torch.float32 and x.itemsize == 2) else m.to(dtype) for m in modulations
    ]


def _repeated(x: Tensor, other: Tensor) -> Tensor:
    """A stream of one sample, repeated for all samples of `other`, as plain PyTorch broadcasts it.

    `other` is a modulation of the stream, or the branch that is added to it.
    """
    x = _rows(x)
    return x if other.dim() == 1 or x.shape[0] != 1 or other.shape[0] == 1 else x.expand(other.shape[0], *x.shape[1:])


def _rows(x: Tensor) -> Tensor:
    """`x` with tokens as the operators read them: the channels of a token next to each other.

    An image that was only transposed into tokens has them far apart.
    """
    return x if x.stride(-1) == 1 else x.contiguous()


def _promoted(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """A stream and what is added to it, in the dtype of their sum."""
    y = _rows(y)
    if x.dtype == y.dtype:
        return x, y
    dtype = torch.promote_types(x.dtype, y.dtype)
    return x.to(dtype), y.to(dtype)


def _weights(norms: Sequence[Any], x: Tensor) -> list[Tensor]:
    """Weights of the norms in the dtype of the heads `x`, or in float32 where `x` has 16 bits."""
    weights = [norm.weight for norm in norms]
    if weights[0].dtype in (x.dtype, torch.float32) and x.dtype in FLOATS:
        return weights
    return [weight.to(x.dtype) for weight in weights]


def _cos_sin(tables: RotaryTables, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
    if tables is None:
        return None, None
    cos, sin = tables
    dtype = accumulator_of(x.dtype)
    return cos.to(x.device, dtype), sin.to(x.device, dtype)
