"""Reasons for which a call runs as its module's class does, as far as several families share them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

from torch import Tensor, nn

from fastdistill.models.patches.contract import is_patch
from fastdistill.ops.heads import MAX_HEAD_SIZE


def norms_stay(*names: str) -> Callable[..., str | None]:
    """Returns the `why_not` of a module that fuses its layer norms `names` and asks for no more than that."""

    def why_not(module: Any, /, *_: Any, **__: Any) -> str | None:
        return why_norms_stay(*[getattr(module, name) for name in names])

    return why_not


def why_norms_stay(*norms: Any) -> str | None:
    """Why a block has to call these layer norms, where an operator would norm and modulate in their place, or None."""
    if all(_plain_layer_norm(norm) for norm in norms) and not hooked(*norms):
        return None
    return "a norm is hooked or has an affine"


def why_attention_stays(attn: Any, norms: Sequence[Any], head_size: int, tables: Any, x: Tensor, processors: Collection[str]) -> str | None:
    """Why this call of an attention module cannot run fused, or None.

    Args:
        norms: the norms of its queries and keys.
        tables: its rotary tables, or None.
        x: a stream that comes in.
        processors: names of the processors' classes whose formula is the fused one.
    """
    processor = attn.processor
    if type(processor).__name__ not in processors:
        return f"its processor is {type(processor).__name__}"
    if getattr(processor, "_parallel_config", None) is not None:
        return "context parallelism splits its tokens"
    if any(not _plain_rms_norm(norm, x) for norm in norms):
        return "a query-key norm is no plain RMS norm, is hooked or is offloaded"
    if len({(norm.eps, norm.weight.dtype) for norm in norms}) > 1:
        return "its query-key norms differ"
    if any(norm.weight.shape != (head_size,) for norm in norms):
        return "its query-key norms are not over heads"
    if head_size % 2 or head_size > MAX_HEAD_SIZE:
        return f"its head size is {head_size}"
    if tables is not None and any(t.dim() != 2 for t in tables):
        return "every sample has rotary tables of its own"
    return None


def called_with(unknown: Collection[str]) -> str | None:
    """Why a call with keyword arguments that the fused form does not know cannot run fused, or None without any."""
    return f"it was called with {', '.join(sorted(unknown))}" if unknown else None


def hooked(*modules: nn.Module) -> bool:
    """Whether somebody wants to see, or to change, a call of one of these modules that a fused block would not make."""
    return any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks or _wrapped(m) for m in modules)


def _wrapped(module: nn.Module) -> bool:
    forward = module.__dict__.get("forward")
    return forward is not None and not is_patch(forward)


def _plain_layer_norm(module: Any) -> bool:
    """Whether an operator's norm is this one. diffusers' `FP32LayerNorm` computes in float32, as the operators do anyway."""
    return type(module).__name__ in ("LayerNorm", "FP32LayerNorm") and isinstance(module, nn.LayerNorm) and not module.elementwise_affine


def _plain_rms_norm(norm: Any, x: Tensor) -> bool:
    if norm is None or type(norm).__name__ != "RMSNorm" or hooked(norm):
        return False
    return norm.eps is not None and norm.weight is not None and getattr(norm, "bias", None) is None and norm.weight.device == x.device
