"""Sizes and strides of (B, S, D) and ordered sums over tokens, for all Triton kernels on rows."""

import functools
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

# Above a few thousand channels registers spill, which is slow but correct; no model is near this
# limit.
MAX_CHANNELS = 65536


@triton.jit
def sum_partials_kernel(partials_ptr, out_ptr, count, stride, D, BLOCK_D: tl.constexpr):
    group = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = d < D
    total = tl.zeros((BLOCK_D,), dtype=tl.float32)
    for i in range(count):
        total += tl.load(partials_ptr + (group * count + i) * stride + d, mask=inside, other=0.0)
    tl.store(out_ptr + group * D + d, total.to(out_ptr.dtype.element_ty), mask=inside)


def sum_partials(partials: Tensor, outs: list[Tensor]) -> None:
    """Add partials (B, P, outs, D) in the order of P.

    The sum is over P for modulations of a batch element, and over B and P for shared modulations.
    """
    B, P, kinds, D = partials.shape
    for kind, out in enumerate(outs):
        groups = out.numel() // D
        sum_partials_kernel[(groups, triton.cdiv(D, 128))](
            partials[0, 0, kind], out, B * P // groups, kinds * D, D, BLOCK_D=128
        )


def batched_shape(x: Tensor) -> tuple[int, int, int]:
    return (1, *x.shape) if x.dim() == 2 else tuple(x.shape)  # type: ignore[return-value]


def is_per_token(modulation: Tensor, x: Tensor) -> bool:
    return modulation.dim() == x.dim() and modulation.shape[-2] > 1


def row_strides(t: Tensor, x: Tensor) -> tuple[int, int]:
    """Strides over batch and tokens, 0 where t is broadcast along x."""
    dim = t.dim()
    token_axis = dim - 2 if dim == 3 or (dim == 2 and x.dim() == 2) else None
    batch_axis = 0 if dim == 3 or (dim == 2 and x.dim() == 3) else None
    return tuple(0 if axis is None or t.shape[axis] == 1 else t.stride(axis) for axis in (batch_axis, token_axis))  # type: ignore[return-value]


def row_block(D: int) -> tuple[int, int]:
    """A block that holds a whole row, and the warps for it."""
    if D > MAX_CHANNELS:
        raise ValueError(f"x: the triton backend holds a row in registers, expected D <= {MAX_CHANNELS}, got {D}")
    block = triton.next_power_of_2(D)
    return block, min(16, max(1, block // 256))


def token_chunks(B: int, S: int, device: torch.device) -> int:
    """Number of chunks of a batch element's tokens, each summed apart.

    Two programs for every multiprocessor.
    """
    return max(1, min(-(-S // 4), 2 * _multiprocessors(device) // B))


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    # Under TRITON_INTERPRET=1 there is no device to fill; two chunks exercise the second stage.
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def register(name: str, forward: Callable[..., object], backward: Callable[..., object] | None = None) -> None:
    """Implement the `triton` overloads of an operator."""
    # CompositeExplicitAutograd rather than CUDA: the interpreter runs the same functions on CPU
    # tensors.
    torch.library.impl(f"fastdistill::{name}.triton", "CompositeExplicitAutograd")(forward)
    if backward is not None:
        torch.library.impl(f"fastdistill::{name}_backward.triton", "CompositeExplicitAutograd")(backward)
