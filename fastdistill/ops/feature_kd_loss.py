"""Distance between a student's features and a teacher's, for feature distillation.

Shapes: B batch, S tokens, D channels.

Kernels: csrc/cpu/features.cpp, csrc/cuda/features.cu, ops/triton/features.py
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdistill.ops.backend import Backend, Request
from fastdistill.ops.op import Arguments, Case, Operator, Tangents, Tensors, accumulator_of
from fastdistill.ops.row_shapes import FLUX, RowShapes
from fastdistill.ops.rows import check_like, check_rows

FeatureKdKind = Literal["mse", "relative_mse", "cosine", "masked_mse"]
KINDS: tuple[FeatureKdKind, ...] = get_args(FeatureKdKind)

MIN_NORM = 1e-6
MASK_SIGMAS = 2.0


def feature_kd_loss(
    student: Tensor, teacher: Tensor, *, kind: FeatureKdKind = "relative_mse", backend: Request | None = None
) -> Tensor:
    """Distance of two sets of features, differentiable in the student's features, in reverse and in
    forward mode.

    | `kind` | value | source |
    |---|---|---|
    | `mse` | `mean (s - t)^2` | BK-SDM, arXiv 2305.15798, equation 3; KOALA, arXiv 2312.04005 |
    | `relative_mse` | `sum (s - t)^2 / sum t^2` \
| divided by the teacher's norm as in LAPTOP-Diff, arXiv 2404.11098, section 3.3 |
    | `cosine` | mean over tokens of `\\|s / \\|s\\| - t / \\|t\\| \\|^2 = 2 - 2 cos` | PPCL's distillation loss |
    | `masked_mse` | `mean (m_s s - m_t t)^2`, m one within two standard deviations of the sample's mean, else zero \
| TinyFusion, arXiv 2412.01199, section 3.3 |

    Features of diffusion transformers differ by orders of magnitude between blocks and between
    channels. `relative_mse` makes blocks comparable, and `cosine` makes tokens comparable.
    `masked_mse` leaves out the few massive activations that otherwise make up most of the distance.

    Args:
        student: (B, S, D), or (S, D) for one sample; float32, bfloat16, float16 or (on CPU)
            float64. D must be contiguous, the other axes may have any stride.
        teacher: like student; a constant without gradient and tangent.
        kind: see the table. Norms below 1e-6 count as 1e-6. Means and standard deviations are taken
            over each sample.
        backend: `eager`, `native`, `triton` or `auto`; by default the one of `use_backend`, else
            `auto`.

    Returns:
        A scalar, float32 (float64 for float64); zero for empty features. Both tensors are read once
        each way (`masked_mse`: once more for the mean and deviation). Nothing of their size is
        written but the gradient. Sums are float32 within rows and float64 across rows (on GPUs
        float32 within blocks), in an order given by the shape alone, so the loss is bitwise
        repeatable.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, device, shape or stride; the
            message says which.
        RuntimeError: `backend` was named and cannot run here; the message says why.
    """
    if kind not in KINDS:
        raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {kind!r}")
    return FEATURE_KD_LOSS(student, teacher, KINDS.index(kind), backend=backend)  # type: ignore[no-any-return]


class FeatureKdLoss(Operator):
    name = "feature_kd_loss"
    triton_module = "fastdistill.ops.triton.features"
    schema = "(Tensor student, Tensor teacher, int kind) -> (Tensor loss, Tensor stats)"
    backward_schema = "(Tensor grad, Tensor student, Tensor teacher, Tensor stats, int kind) -> Tensor"

    def check(self, student: Tensor, teacher: Tensor, kind: int) -> None:
        check_rows("student", student)
        check_like("teacher", teacher, student, "student")

    def reference(self, student: Tensor, teacher: Tensor, kind: int) -> Tensor:
        wide = accumulator_of(student.dtype)
        s, t = student.to(wide), teacher.detach().to(wide)
        if student.numel() == 0:
            return s.sum()
        if KINDS[kind] == "cosine":
            unit_s, unit_t = (F.normalize(f, dim=-1, eps=MIN_NORM) for f in (s, t))
            return (unit_s - unit_t).square().sum(dim=-1).mean()
        if KINDS[kind] == "masked_mse":
            s, t = (torch.where(_near_the_mean(f), f, 0.0) for f in (s, t))
        distance = (s - t).square()
        return distance.sum() / t.square().sum() if KINDS[kind] == "relative_mse" else distance.mean()

    def fake(self, student: Tensor, teacher: Tensor, kind: int) -> tuple[Tensor, Tensor]:
        wide = accumulator_of(student.dtype)
        return student.new_empty((), dtype=wide), student.new_empty((_kept(student, kind),), dtype=wide)

    def fake_backward(self, grad: Tensor, student: Tensor, *arguments: Any) -> Tensor:
        return student.new_empty(student.shape)

    def save(self, ctx: Any, arguments: tuple[Any, ...], results: tuple[Tensor, Tensor]) -> None:
        student, teacher, ctx.kind = arguments
        ctx.save_for_backward(student, teacher, results[1])

    def backward(self, ctx: Any, backward_op: Callable[..., Any], *grads: Tensor) -> tuple[Tensor | None, ...]:
        return backward_op(grads[0], *ctx.saved_tensors, ctx.kind), None, None

    def jvp(self, backend: Backend, arguments: Arguments, results: Tensors, tangents: Tangents) -> Tensors:
        student, teacher, kind = arguments
        loss, stats = results
        if tangents[0] is None:
            return (torch.zeros_like(loss),)
        # A gradient rounded to 16 bits would lose what the loss, which is wide, keeps.
        s, t = (f.to(loss.dtype) for f in (student, teacher))
        gradient = self.backward_op(backend)(torch.ones_like(loss), s, t, stats, kind)
        return ((gradient * tangents[0]).sum(),)

    def bytes_moved(self, student: Tensor, teacher: Tensor, kind: int) -> tuple[int, int]:
        return 2 * student.nbytes, 3 * student.nbytes

    def cases(self) -> Sequence[Case]:
        return tuple(
            Case(id=f"{kind}-{shapes.id}", make=partial(_arguments, shapes, kind))
            for kind in KINDS
            for shapes in FEATURE_SHAPES
        )

    def workloads(self) -> Sequence[Case]:
        return tuple(Case(id=f"{kind}-{FLUX[-1].id}", make=partial(_arguments, FLUX[-1], kind)) for kind in KINDS)


def _near_the_mean(f: Tensor) -> Tensor:
    with torch.no_grad():
        deviation = f.std(dim=(-2, -1), correction=0, keepdim=True)
        return (f - f.mean(dim=(-2, -1), keepdim=True)).abs() < MASK_SIGMAS * deviation


def _kept(student: Tensor, kind: int) -> int:
    """Number of accumulators that the forward op keeps for the backward op, as in
    `csrc/common/feature_arguments.h`."""
    B, S = student.shape[:2] if student.dim() == 3 else (1, student.shape[0])
    return (0, 1, 3 * B * S, 4 * B)[kind]


FEATURE_SHAPES = (
    RowShapes(id="B2-S5-D7", x=(2, 5, 7)),
    RowShapes(id="B3-S37-D33", x=(3, 37, 33)),
    RowShapes(id="S6-D48", x=(6, 48)),
    RowShapes(id="B2-S21-D96-strided", x=(2, 21, 96), strided=True),
    RowShapes(id="B1-S5-D64-offset100", x=(1, 5, 64), offset=100.0),
    RowShapes(id="B1-S1-D2", x=(1, 1, 2)),
    RowShapes(id="B2-S0-D8", x=(2, 0, 8)),
    RowShapes(id="B0-S4-D8", x=(0, 4, 8)),
)


def _arguments(shapes: RowShapes, kind: FeatureKdKind, dtype: torch.dtype, device: torch.device) -> tuple[Any, ...]:
    return shapes.rows(dtype, device), shapes.rows(dtype, device).detach(), KINDS.index(kind)


FEATURE_KD_LOSS = FeatureKdLoss()
