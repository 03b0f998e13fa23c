"""Attention as one call: the attention backends of diffusers, and the choice among them.

Shapes: B batch, S tokens, H heads, d head size.
"""

from __future__ import annotations

import logging
import operator
import os
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fastdistill.ops import transforms

log = logging.getLogger("fastdistill")


def attend(q: Tensor, k: Tensor, v: Tensor, attention: str = "auto", attn_mask: Tensor | None = None) -> Tensor:
    """`softmax(q k^T / sqrt(d)) v` by one of the attention backends of diffusers.

    Args:
        q, k, v: (B, S, H, d) of one dtype and device; S of q may differ from that of k and v.
        attention: the name of a backend, one of `attention_names()`, or `auto`. `auto` is the
            backend that the user of diffusers set, by DIFFUSERS_ATTN_BACKEND or in
            `with attention_backend(...)`, else the choice of `choose_attention`. diffusers does not
            tell its default from a `native` set in a `with`: name `native` here, or in the
            environment. In forward mode, and under vmap or nested transforms of torch.func, it is
            `_native_math`, the only one with all derivatives.
        attn_mask: added to the products, or False where a key is not seen; broadcasts to (B, H, S,
            S).

    Returns:
        (B, S, H, d), strided as the backend pleases.

    Raises:
        ValueError: there is no backend of this name.
        RuntimeError: the backend was named and cannot run here; the message says why, and which
            can.
    """
    from diffusers.models.attention_dispatch import dispatch_attention_fn

    needs_grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    transformed = transforms.beyond_gradients()
    asked = _asked_of_diffusers() if attention == "auto" else None
    if asked is not None and transformed:
        # Some backends would drop the tangent in silence.
        attention, asked = asked.value, None
    if asked is None:
        # Where torch.compile treats the size as dynamic, it becomes a number here, which a function
        # of constants takes.
        head_size = operator.index(q.shape[-1])
        asked = _resolved(attention, q.device, q.dtype, needs_grad, head_size, attn_mask is not None, transformed)
    return dispatch_attention_fn(q, k, v, attn_mask=attn_mask, backend=asked)  # type: ignore[no-any-return]


@torch.compiler.assume_constant_result
def attention_names() -> tuple[str, ...]:
    """Names of the attention backends of diffusers: the values of
    `diffusers.models.attention_dispatch.AttentionBackendName`."""
    from diffusers.models.attention_dispatch import AttentionBackendName

    return tuple(member.value for member in AttentionBackendName)


def choose_attention(
    device: torch.device,
    dtype: torch.dtype,
    needs_grad: bool,
    head_size: int = 128,
    masked: bool = False,
    transformed: bool = False,
) -> str:
    """Fastest attention backend of diffusers that can run here.

    `native`, PyTorch's own choice, where none is known to be faster; `_native_math` where more than
    gradients is asked for (`transforms.beyond_gradients`). Each choice is logged once.
    """
    key = device, dtype, needs_grad, head_size, masked, transformed
    chosen = _CHOICES.get(key)
    if chosen is None:
        candidates = _preferences(device)
        chosen = next(name for name in (*candidates, "native", "_native_math") if why_not_attention(name, *key) is None)
        _CHOICES[key] = chosen
        log.info(
            "attention on %s %s, head size %d%s%s%s: %s", device, dtype, head_size,
            ", with gradients" if needs_grad else "", ", masked" if masked else "",
            ", in forward mode or under a transform" if transformed else "", chosen,
        )  # fmt: skip
    return chosen


def why_not_attention(
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    needs_grad: bool,
    head_size: int = 128,
    masked: bool = False,
    transformed: bool = False,
) -> str | None:
    """Reason why the backend of this name cannot run, or None."""
    limits = LIMITS.get(name, ANYTHING)
    if limits.gpu and device.type != "cuda":
        return f"it runs on CUDA devices, not on {device.type}"
    if limits.narrow and dtype not in (torch.bfloat16, torch.float16):
        return f"it takes bfloat16 and float16, not {dtype}"
    if limits.head_sizes is not None and (head_size > limits.head_sizes or head_size % 8):
        return f"it takes head sizes that are multiples of 8 up to {limits.head_sizes}, not {head_size}"
    if needs_grad and not limits.gradient:
        return "it has no backward pass in diffusers"
    if masked and not limits.mask:
        return "it takes no mask"
    if transformed and not limits.transforms:
        return "it has no derivatives in forward mode and under vmap or nested transforms of torch.func"
    return _missing(name)


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits of a backend: of its package, or of diffusers' use of it where that is narrower."""

    gpu: bool = True
    narrow: bool = True
    """bfloat16 and float16 only."""
    head_sizes: int | None = 256
    """The largest head size; None without a limit."""
    gradient: bool = True
    mask: bool = False
    transforms: bool = False
    """Tangents, second derivatives and batches of vmap."""


ANYTHING = Limits(gpu=False, narrow=False, head_sizes=None, mask=True)
_SAGE = Limits(gradient=False)

# Backends that are not listed (flex, other vendors' devices, varlen and hub variants) report their
# limits themselves.
LIMITS: dict[str, Limits] = {
    "native": ANYTHING,
    "_native_math": replace(ANYTHING, transforms=True),
    "_native_efficient": Limits(narrow=False, head_sizes=None, mask=True),
    # PyTorch also has one for CPUs.
    "_native_flash": Limits(gpu=False),
    # On most devices the backward pass is limited to 128.
    "_native_cudnn": Limits(head_sizes=128, mask=True),
    "flash": Limits(),
    # diffusers registers its forward pass alone; its hub and varlen variants have gradients.
    "_flash_3": Limits(gradient=False),
    "xformers": Limits(head_sizes=None),
    "sage": _SAGE,
    "sage_hub": _SAGE,
    "sage_blackwell_hub": _SAGE,
    "sage_varlen": _SAGE,
    "_sage_qk_int8_pv_fp8_cuda": _SAGE,
    "_sage_qk_int8_pv_fp8_cuda_sm90": _SAGE,
    "_sage_qk_int8_pv_fp16_cuda": _SAGE,
    "_sage_qk_int8_pv_fp16_triton": _SAGE,
}

# Backends in the order of preference, by the least compute capability. TFLOP/s forward / backward
# on an H100, with head size 128, bfloat16, no mask and 4096 tokens: FlashAttention 3 638 / 542,
# cuDNN 609 / 499, FlashAttention 2 368 / 310, a plain Triton kernel 389 / -, no flash 133 / 174
# (plots of the FlashAttention repository and paper). At (1, 4096, 24, 128) on an H200:
# FlashAttention 3 708, native, which is FlashAttention 2 in PyTorch, 349 (vllm-omni #1923). On a
# B200 cuDNN was 1.24 to 1.98 times as fast as FlashAttention 4 (sglang #33655). None of these
# numbers was measured by fastdistill. A backend that is only approximate (sage) or must be
# downloaded (hub) is never chosen automatically.
PREFERENCES: tuple[tuple[tuple[int, int], tuple[str, ...]], ...] = (
    ((10, 0), ("_native_cudnn", "flash", "_native_flash")),
    ((9, 0), ("_flash_3", "_native_cudnn", "flash", "_native_flash")),
    ((8, 0), ("flash", "_native_flash", "xformers")),
)

_CHOICES: dict[tuple[torch.device, torch.dtype, bool, int, bool, bool], str] = {}

# Read once, as diffusers does, which shows only the result.
_IN_ENVIRONMENT = "DIFFUSERS_ATTN_BACKEND" in os.environ


def _preferences(device: torch.device) -> tuple[str, ...]:
    if device.type != "cuda" or torch.version.hip is not None:
        return ()
    capability = torch.cuda.get_device_capability(device)
    return next((names for least, names in PREFERENCES if capability >= least), ())


def _missing(name: str) -> str | None:
    """Reason why the package of a backend cannot be used, in the words of diffusers, or None."""
    from diffusers.models import attention_dispatch

    if name == "_native_cudnn" and not torch.backends.cudnn.is_available():
        return "this PyTorch has no cuDNN"
    try:
        attention_dispatch._check_attention_backend_requirements(attention_dispatch.AttentionBackendName(name))
    except RuntimeError as error:
        return str(error)
    return None


def _asked_of_diffusers() -> Any:
    """Backend that the user of diffusers set, as far as diffusers shows it, or None.

    A member of diffusers' enumeration.
    """
    from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

    active, _ = _AttentionBackendRegistry.get_active_backend()
    return active if _IN_ENVIRONMENT or active != AttentionBackendName.NATIVE else None


@torch.compiler.assume_constant_result
def _resolved(
    attention: str,
    device: torch.device,
    dtype: torch.dtype,
    needs_grad: bool,
    head_size: int,
    masked: bool,
    transformed: bool,
) -> Any:
    """Member of diffusers' enumeration, with its kernel downloaded if the kernel is on the hub."""
    from diffusers.models import attention_dispatch
    from diffusers.models.attention_dispatch import AttentionBackendName

    key = device, dtype, needs_grad, head_size, masked, transformed
    if attention == "auto":
        return AttentionBackendName(choose_attention(*key))
    if attention not in attention_names():
        raise ValueError(f"attention: expected auto or one of {', '.join(attention_names())}, got {attention!r}")
    reason = why_not_attention(attention, *key)
    if reason is not None:
        able = [name for name in LIMITS if why_not_attention(name, *key) is None]
        raise RuntimeError(f"attention {attention!r} was asked for, but {reason}; here run {', '.join(able)}")
    backend = AttentionBackendName(attention)
    attention_dispatch._maybe_download_kernel_for_backend(backend)
    return backend
