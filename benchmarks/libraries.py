"""Best library at hand for an operator, where a library has both its forward and its backward.

`LIBRARIES[name]` is the package and a function of the operator's arguments. No library was found
for the other operators in autumn 2026: the fused adaptive layer norms of sglang, flashinfer and
TensorRT-LLM have no backward, Liger's is an RMS norm, and nobody has the distillation losses.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor


def quack_norm_and_rotary(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, eps: float, adjacent: bool
) -> tuple[Tensor, Tensor]:
    """RMS norm of every head, then rotation: two kernels for each of q and k.

    quack takes one table entry for each pair, which is cut out of the tables of diffusers here: a
    hundredth of the bytes.
    """
    from quack.rmsnorm import rmsnorm
    from quack.rotary import apply_rotary_emb

    cos, sin = (t[:, ::2].contiguous() for t in (cos, sin))

    def of(x: Tensor, weight: Tensor) -> Tensor:
        out: Tensor = apply_rotary_emb(rmsnorm(x, weight, eps=eps), cos, sin, interleaved=adjacent)
        return out

    return of(q, q_weight), of(k, k_weight)


LIBRARIES: dict[str, tuple[str, Callable[..., Any]]] = {"qk_norm_rope": ("quack", quack_norm_and_rotary)}
