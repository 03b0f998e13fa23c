"""What a block does to what flows through it, for pruning scores.

Shapes: B batch, S tokens, D channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdistill.ops import row_cases
from fastdistill.ops.backend import Request
from fastdistill.ops.feature_kd_loss import FEATURE_CASES, MIN_NORM
from fastdistill.ops.op import Operator, Sample, accumulator_of
from fastdistill.ops.row_cases import RowCase
from fastdistill.ops.rows import check_like, check_rows


class BlockStatistics(NamedTuple):
    """Means over the tokens of each sample: (B), or scalars for (S, D); float32, or float64 for float64."""

    cosine: Tensor
    """Of a token before and after. One minus it is the block influence of ShortGPT (arXiv 2403.03853, equation 1)."""
    mse: Tensor
    """Mean squared difference of a token before and after."""
    norm_before: Tensor
    """Euclidean norm of a token."""
    norm_after: Tensor


def block_statistics(before: Tensor, after: Tensor, *, backend: Request | None = None) -> BlockStatistics:
    """Cosine, mean squared difference and norms of the tokens that go into a block and come out of it, in one pass over both.

    Args:
        before: (B, S, D) or (S, D), float32, bfloat16, float16 or (on CPU) float64. D must be contiguous, the other axes may have any
            stride.
        after: like before. Neither has a gradient.
        backend: `eager`, `native`, `triton` or `auto`; the default is that of `use_backend`, else `auto`.

    The cosine is `1 - |b / |b| - a / |a||^2 / 2`, summed over the differences, so that of a block which does almost nothing is exact to
    the last place; norms below 1e-6 count as 1e-6 in it.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, device, shape or stride; the message says which.
        RuntimeError: `backend` was named and cannot run here; the message says why.
    """
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

    def samples(self) -> Sequence[Sample]:
        return row_cases.samples(_arguments, FEATURE_CASES)

    def workloads(self) -> Sequence[Sample]:
        return row_cases.samples(_arguments, row_cases.FLUX)


def _arguments(case: RowCase, dtype: torch.dtype, device: torch.device) -> tuple[Any, ...]:
    return case.rows(dtype, device).detach(), case.rows(dtype, device).detach()


BLOCK_STATISTICS = BlockStatisticsOp()
