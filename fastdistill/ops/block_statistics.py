"""Statistics of the change that a block makes to its input, for pruning scores.

Shapes: B batch, S tokens, D channels.

Kernels: csrc/cpu/features.cpp, csrc/cuda/features.cu, ops/triton/features.py
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdistill.ops import row_shapes
from fastdistill.ops.backend import Request
from fastdistill.ops.feature_kd_loss import FEATURE_SHAPES, MIN_NORM
from fastdistill.ops.op import Case, Operator, accumulator_of, check_tensor
from fastdistill.ops.row_shapes import RowShapes
from fastdistill.ops.rows import check_like, check_rows


class BlockStatistics(NamedTuple):
    """Means over the tokens of each sample: (B), or scalars for (S, D).

    float32, or float64 for float64.
    """

    cosine: Tensor
    """Cosine of a token before and after the block. One minus the cosine is the block influence of
    ShortGPT (arXiv 2403.03853, equation 1)."""
    mse: Tensor
    """Mean squared difference of a token before and after the block."""
    norm_before: Tensor
    """Euclidean norm of a token before the block."""
    norm_after: Tensor
    """Euclidean norm of a token after the block."""


def block_statistics(before: Tensor, after: Tensor, *, backend: Request | None = None) -> BlockStatistics:
    """Cosine, mean squared difference and norms of the tokens before and after a block, in one
    pass.

    Args:
        before: (B, S, D) or (S, D), float32, bfloat16, float16 or (on CPU) float64. D must be
            contiguous, the other axes may have any stride.
        after: like before. Both are constants, without gradient and tangent.
        backend: `eager`, `native`, `triton` or `auto`; by default the one of `use_backend`, else
            `auto`.

    Returns:
        Means over the tokens of each sample. The cosine is `1 - |b / |b| - a / |a||^2 / 2`, summed
        over the differences, so the cosine of a block which does almost nothing is exact to the
        last place; norms below 1e-6 count as 1e-6 in it.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, device, shape or stride; the
            message says which.
        RuntimeError: `backend` was named and cannot run here; the message says why.
    """
    for name, t in (("before", before), ("after", after)):
        check_tensor(name, t)
    return BlockStatistics(*BLOCK_STATISTICS(before.detach(), after.detach(), backend=backend).mean(dim=-1).unbind())


class BlockStatisticsOp(Operator):
    name = "block_statistics"
    triton_module = "fastdistill.ops.triton.features"
    # (4, B, S) or (4, S): the fields of BlockStatistics for every token.
    schema = "(Tensor before, Tensor after) -> Tensor"

    def check(self, before: Tensor, after: Tensor) -> None:
        check_rows("before", before)
        check_like("after", after, before, "before")

    def reference(self, before: Tensor, after: Tensor) -> Tensor:
        b, a = (f.to(accumulator_of(before.dtype)) for f in (before, after))
        unit_b, unit_a = (F.normalize(f, dim=-1, eps=MIN_NORM) for f in (b, a))
        cosine = 1 - (unit_b - unit_a).square().sum(dim=-1) / 2
        return torch.stack((cosine, (b - a).square().mean(dim=-1), b.norm(dim=-1), a.norm(dim=-1)))

    def fake(self, before: Tensor, after: Tensor) -> Tensor:
        return before.new_empty((4, *before.shape[:-1]), dtype=accumulator_of(before.dtype))

    def bytes_moved(self, before: Tensor, after: Tensor) -> tuple[int, int]:
        return before.nbytes + after.nbytes, 0

    def cases(self) -> Sequence[Case]:
        return row_shapes.cases(_arguments, FEATURE_SHAPES)

    def workloads(self) -> Sequence[Case]:
        return row_shapes.cases(_arguments, row_shapes.FLUX)


def _arguments(shapes: RowShapes, dtype: torch.dtype, device: torch.device) -> tuple[Any, ...]:
    return shapes.rows(dtype, device).detach(), shapes.rows(dtype, device).detach()


BLOCK_STATISTICS = BlockStatisticsOp()
