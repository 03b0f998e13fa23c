"""The fused operators as a patched block calls them.

A block's tensors meet the operators here: autocast leaves a modulation or a branch in another dtype than its stream, torch.compile fuses
some things better by itself, and what a block cannot do fused it runs as it always did, with the reason on record.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastdistill import ops
from fastdistill.ops.activation_concat import ACTIVATION_CONCAT, Activation
from fastdistill.ops.backend import Request
from fastdistill.ops.gated_residual import GATED_RESIDUAL, clip_limit
from fastdistill.ops.modulate import MODULATE

Forward = Callable[..., Any]

log = logging.getLogger("fastdistill")

# Set on every forward that `patched` gives to a module.
PATCH_MARK = "_fastdistill_patch"


class Fusions:
    """What the patches of one model share: the backend and the attention they were asked for, and why they stepped aside."""

    def __init__(self, backend: Request | None, attention: str) -> None:
        self.backend = backend
        self.attention = attention
        self.stepped_aside: Counter[str] = Counter()

    def step_aside(self, module: nn.Module, reason: str, *arguments: Any, **keywords: Any) -> Any:
        """Runs this call as the module's class does."""
        if not torch.compiler.is_compiling():
            self.record(module, reason)
        return type(module).forward(module, *arguments, **keywords)

    def record(self, module: nn.Module, reason: str) -> None:
        entry = f"{type(module).__name__}: {reason}"
        if entry not in self.stepped_aside:
            log.info("patched: %s runs as it always did", entry)
        self.stepped_aside[entry] += 1

    def modulate(self, x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
        x = _repeated(x, scale)
        scale, shift = _like(x, scale, shift)
        if torch.compiler.is_compiling():
            # Inductor fuses a norm alone with its neighbours; an operator would stand in the way.
            return MODULATE.reference(x, scale, shift, eps)
        return ops.modulate(x, scale, shift, eps, backend=self.backend)

    def modulate_for_two(self, x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            out = self.modulate(x, scale, shift, eps)
            return out, out
        x = _repeated(x, scale)
        scale, shift = _like(x, scale, shift)
        return ops.modulate_for_two(x, scale, shift, eps, backend=self.backend)

    def gated_residual(self, x: Tensor, y: Tensor, gate: Tensor, *, clip: bool) -> Tensor:
        """`clip` keeps float16 finite where diffusers' block does; no other dtype is clipped."""
        x, y = _promoted(_repeated(x, y), y)
        clip = clip and x.dtype == torch.float16
        (gate,) = _like(x, gate)
        if torch.compiler.is_compiling():
            return GATED_RESIDUAL.reference(x, y, gate, clip_limit(clip))
        return ops.gated_residual(x, y, gate, clip=clip, backend=self.backend)

    def gated_residual_modulate(
        self, x: Tensor, y: Tensor, gate: Tensor, scale: Tensor, shift: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        """The chain between attention and feed-forward, which stays fused under torch.compile: there it is no slower."""
        x, y = _promoted(_repeated(x, y), y)
        gate, scale, shift = _like(x, gate, scale, shift)
        return ops.gated_residual_modulate(x, y, gate, scale, shift, eps, backend=self.backend)

    def activation_concat(self, x: Tensor | None, y: Tensor, activation: Activation) -> Tensor:
        if x is not None:
            x, y = _promoted(x, y)
        if torch.compiler.is_compiling():
            return ACTIVATION_CONCAT.reference(y, x, activation == "swiglu")
        return ops.activation_concat(x, y, activation, backend=self.backend)


def hooked(*modules: nn.Module) -> bool:
    """Whether somebody wants to see, or to change, a call of one of these modules that a fused block would not make."""
    return any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks or _wrapped(m) for m in modules)


def _wrapped(module: nn.Module) -> bool:
    forward = module.__dict__.get("forward")
    return forward is not None and not hasattr(forward, PATCH_MARK)


def plain_layer_norm(module: Any) -> bool:
    """Whether an operator's norm is this one. diffusers' FP32LayerNorm computes in float32, as the operators do anyway."""
    return type(module).__name__ in ("LayerNorm", "FP32LayerNorm") and isinstance(module, nn.LayerNorm) and not module.elementwise_affine


def _like(x: Tensor, *modulations: Tensor) -> tuple[Tensor, ...]:
    """Autocast computes modulations in 16 bits beside a float32 stream; the operators take them in the stream's dtype or wider. And they
    take those of tokens for every sample."""
    if modulations[0].dim() == 3 and modulations[0].shape[1] != 1:
        modulations = tuple(m.expand(x.shape) for m in modulations)
    return tuple(m if m.dtype == x.dtype or (m.dtype == torch.float32 and x.itemsize == 2) else m.to(x.dtype) for m in modulations)


def _repeated(x: Tensor, beside: Tensor) -> Tensor:
    """A stream of one sample beside the modulations or the branch of several, over which plain PyTorch broadcasts it."""
    return x if beside.dim() == 1 or x.shape[0] != 1 or beside.shape[0] == 1 else x.expand(beside.shape[0], *x.shape[1:])


def _promoted(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """A stream and what is added to it, in the dtype of their sum."""
    if x.dtype == y.dtype:
        return x, y
    dtype = torch.promote_types(x.dtype, y.dtype)
    return x.to(dtype), y.to(dtype)
