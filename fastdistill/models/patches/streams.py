"""Text and image as one sequence, without a copy where both are one tensor already."""

from __future__ import annotations

import torch
from torch import Tensor


def joined(text: Tensor, image: Tensor) -> Tensor:
    """Returns `torch.cat((text, image), dim=1)`, without a copy where both come from `halves`.

    A single block returns two halves of one tensor. Where the next block receives these very
    halves, that tensor is the concatenation, and its gradient is not a sum of two padded halves
    either.
    """
    if not torch.compiler.is_compiling():
        whole = text._base
        if (
            whole is not None
            and whole is image._base
            and _are_halves(text, image, whole)
            and _lead_to(whole, text, image)
        ):
            return whole
    return torch.cat((text, image), dim=1)


def halves(both: Tensor, text_tokens: int) -> tuple[Tensor, Tensor]:
    """Text and image as a single block returns them, for `joined` to find their common tensor.

    A compiled block writes two tensors instead, at no cost: the first single block, which follows
    a double block, then sees the strides that all others see, and one graph serves all.
    """
    text, image = both[:, :text_tokens], both[:, text_tokens:]
    if not torch.compiler.is_compiling():
        return text, image
    # `contiguous()` would keep the strides of a single sample.
    fresh = torch.contiguous_format
    return text.clone(memory_format=fresh), image.clone(memory_format=fresh)


def split(both: Tensor, first_tokens: int) -> tuple[Tensor, Tensor]:
    """Both streams of a joint attention's output.

    The split is one operation, so that the backward pass writes the gradient of both once.
    """
    first, second = both.split_with_sizes((first_tokens, both.shape[1] - first_tokens), dim=1)
    return first, second


def _are_halves(text: Tensor, image: Tensor, whole: Tensor) -> bool:
    B, T, D = text.shape
    return (
        whole.shape == (B, T + image.shape[1], D)
        and text.stride() == whole.stride() == image.stride()
        and text.storage_offset() == whole.storage_offset()
        and image.storage_offset() == whole.storage_offset() + T * whole.stride(1)
    )


def _lead_to(whole: Tensor, *halves: Tensor) -> bool:
    """Whether a gradient of `whole` goes where the gradients of its halves would.

    It does not where a half is detached, is made a leaf (as reentrant checkpointing does), or is
    watched.
    """
    if not torch.is_grad_enabled():
        return True
    return all(
        half.requires_grad == whole.requires_grad
        and (
            not half.requires_grad or (half.grad_fn is not None and not half.retains_grad and not half._backward_hooks)
        )
        for half in halves
    )
