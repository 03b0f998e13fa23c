"""Reasons to run a call as its module's class does, as far as several families share them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

from torch import Tensor, nn

from fastdistill.models.patches.forwards import wrapped
from fastdistill.ops.heads import MAX_HEAD_SIZE

_LIBRARIES = ("torch.", "diffusers.")


def norms_stay(*names: str) -> Callable[..., str | None]:
    """Returns the `why_not` of a module that depends on nothing but its layer norms `names`."""

    def why_not(module: Any, /, *_: Any, **__: Any) -> str | None:
        return why_norms_stay(*[getattr(module, name) for name in names])

    return why_not


def why_norms_stay(*norms: Any) -> str | None:
    """Why a block has to call these layer norms; None where an operator may norm in their place."""
    for norm in norms:
        if not _plain_layer_norm(norm) or hooked(norm):
            return "a norm is hooked or has an affine"
    return None


def why_attention_stays(
    attn: Any,
    norms: Sequence[Any],
    head_size: int,
    tables: Any,
    x: Tensor,
    *,
    processors: Collection[str],
    unknown: Collection[str],
) -> str | None:
    """Why this call of an attention module cannot run fused, or None.

    Args:
        norms: the norms of its queries and keys.
        tables: its rotary tables, or None.
        x: a stream that comes in.
        processors: names of the processors' classes whose formula is the fused one.
        unknown: names of the call's keyword arguments that the fused form does not know.
    """
    processor = attn.processor
    if not stock(processor, *processors):
        return f"its processor is {_spelled(type(processor))}"
    if getattr(processor, "_parallel_config", None) is not None:
        return "context parallelism splits its tokens"
    for norm in norms:
        if not _plain_rms_norm(norm, x):
            return "a query-key norm is no plain RMS norm, is hooked or is offloaded"
    weights = [norm.weight for norm in norms]
    eps, dtype = norms[0].eps, weights[0].dtype
    for norm, weight in zip(norms, weights, strict=True):
        if norm.eps != eps or weight.dtype != dtype:
            return "its query-key norms differ"
    for weight in weights:
        if weight.shape != (head_size,):
            return "its query-key norms are not over heads"
    if head_size % 2 or head_size > MAX_HEAD_SIZE:
        return f"its head size is {head_size}"
    if tables is not None and any(table.dim() != 2 for table in tables):
        return "every sample has rotary tables of its own"
    if unknown:
        return f"it was called with {', '.join(sorted(unknown))}"
    return None


def stock(part: object, *names: str) -> bool:
    """Whether the class of `part` is the one of torch or diffusers that one of `names` means.

    A class of that name from elsewhere, and a class derived from it, may compute something else.
    """
    cls = type(part)
    return cls.__name__ in names and cls.__module__.startswith(_LIBRARIES)


def hooked(*modules: nn.Module) -> bool:
    """Whether somebody wants to see, or to change, calls that a fused block does not make."""
    for module in modules:
        if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
            return True
        if wrapped(module):
            return True
    return False


def _plain_layer_norm(module: Any) -> bool:
    """Whether the norm of `modulate` is this one.

    diffusers' `FP32LayerNorm` computes in float32, as the operators do anyway.
    """
    return stock(module, "LayerNorm", "FP32LayerNorm") and not module.elementwise_affine


def _plain_rms_norm(norm: Any, x: Tensor) -> bool:
    if not stock(norm, "RMSNorm") or hooked(norm) or norm.eps is None or getattr(norm, "bias", None) is not None:
        return False
    weight = norm.weight
    return weight is not None and weight.device == x.device


def _spelled(cls: type) -> str:
    """Name of a class, with its module where the name alone could be that of a library's class."""
    return cls.__name__ if cls.__module__.startswith(_LIBRARIES) else f"{cls.__module__}.{cls.__qualname__}"
