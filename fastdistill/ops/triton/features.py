"""Triton kernels of `feature_kd_loss` and `block_statistics`.

Formulas, shapes and dtypes: fastdistill/ops/feature_kd_loss.py and block_statistics.py. Distance of
unit vectors: csrc/cpu/simd/features.cpp.

Forward: grid (B, P). Each program walks one chunk of the tokens of one sample and writes the sums
of the chunk; one program adds the chunks in order. A program holds whole rows, hence D <=
MAX_CHANNELS.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdistill.ops.feature_kd_loss import KINDS, MASK_SIGMAS, MIN_NORM
from fastdistill.ops.triton.rows import batched_shape, register, row_block, row_strides, token_chunks

MSE, RELATIVE_MSE, COSINE, MASKED_MSE = (
    tl.constexpr(KINDS.index(kind)) for kind in ("mse", "relative_mse", "cosine", "masked_mse")
)
PARTIALS = tl.constexpr(6)
SMALLEST_NORM = tl.constexpr(MIN_NORM)


@triton.jit
def _row(ptr, stride_b, stride_s, b, s, d, inside):
    return tl.load(ptr + b * stride_b + s * stride_s + d, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _unit_distance(student, teacher):
    difference = student - teacher
    square = tl.sum(difference * difference, axis=0)
    student_square, teacher_square = tl.sum(student * student, axis=0), tl.sum(teacher * teacher, axis=0)
    of_student, of_teacher = tl.sqrt(student_square), tl.sqrt(teacher_square)
    a, b = tl.maximum(of_student, SMALLEST_NORM), tl.maximum(of_teacher, SMALLEST_NORM)
    normal = (a == of_student) & (b == of_teacher)
    apart = tl.where(normal, tl.sum(difference * (student + teacher), axis=0) / (a + b), a - b)
    against = tl.where(normal, -apart, teacher_square / b - student_square / a)
    squared = tl.maximum((square + apart * against) / (a * b), 0.0)
    return square, of_student, of_teacher, 1.0 / a, apart / b, squared


@triton.jit
def _moments(ptr, stride_b, stride_s, b, first, end, D, d, inside, partial_ptr):
    # The mean of the first row is near the mean of the chunk, so the squares of the rest do not
    # cancel.
    pivot = tl.sum(_row(ptr, stride_b, stride_s, b, first, d, inside), axis=0) / D
    total = tl.zeros(d.shape, dtype=tl.float32)
    square = tl.zeros(d.shape, dtype=tl.float32)
    for s in range(first, end):
        rest = tl.where(inside, _row(ptr, stride_b, stride_s, b, s, d, inside) - pivot, 0.0)
        total += rest
        square += rest * rest
    tl.store(partial_ptr, pivot)
    tl.store(partial_ptr + 1, tl.sum(total, axis=0))
    tl.store(partial_ptr + 2, tl.sum(square, axis=0))


@triton.jit
def _moments_kernel(
    student_ptr, teacher_ptr, partials_ptr, S, D, P,
    student_stride_b, student_stride_s, teacher_stride_b, teacher_stride_s, BLOCK_D: tl.constexpr,
):  # fmt: skip
    b, p = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    first, end = p * S // P, (p + 1) * S // P
    partial = partials_ptr + (b * P + p) * PARTIALS
    _moments(student_ptr, student_stride_b, student_stride_s, b, first, end, D, d, d < D, partial)
    _moments(teacher_ptr, teacher_stride_b, teacher_stride_s, b, first, end, D, d, d < D, partial + 3)


@triton.jit
def _finish_moments_kernel(partials_ptr, stats_ptr, B, S, D, P, sigmas):
    b, which = tl.program_id(0).to(tl.int64), tl.program_id(1)
    count = tl.full((), 0.0, tl.float64)
    mean = tl.full((), 0.0, tl.float64)
    square = tl.full((), 0.0, tl.float64)
    for p in range(P):
        partial = partials_ptr + (b * P + p) * PARTIALS + 3 * which
        n = (((p + 1) * S // P - p * S // P) * D).to(tl.float64)
        total = tl.load(partial + 1).to(tl.float64)
        safe = tl.maximum(n, 1.0)
        apart = tl.load(partial).to(tl.float64) + total / safe - mean
        both = tl.maximum(count + n, 1.0)
        square += tl.load(partial + 2).to(tl.float64) - total * total / safe + apart * apart * count * n / both
        mean += apart * n / both
        count += n
    tl.store(stats_ptr + 2 * which * B + b, mean.to(tl.float32))
    deviation = tl.sqrt(square / tl.maximum(count, 1.0))
    tl.store(stats_ptr + (2 * which + 1) * B + b, (sigmas * deviation).to(tl.float32))


@triton.jit
def _masked(x, stats_ptr, b, B):
    mean, limit = tl.load(stats_ptr + b), tl.load(stats_ptr + B + b)
    return tl.abs(x - mean) < limit


@triton.jit
def _reduce_kernel(
    student_ptr, teacher_ptr, stats_ptr, partials_ptr,
    B, S, D, P, student_stride_b, student_stride_s, teacher_stride_b, teacher_stride_s,
    KIND: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    b, p = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    inside = d < D
    loss = tl.full((), 0.0, tl.float64)
    teacher_square = tl.full((), 0.0, tl.float64)
    for s in range(p * S // P, (p + 1) * S // P):
        student = _row(student_ptr, student_stride_b, student_stride_s, b, s, d, inside)
        teacher = _row(teacher_ptr, teacher_stride_b, teacher_stride_s, b, s, d, inside)
        if KIND == COSINE:
            _, _, _, inverse, longer, squared = _unit_distance(student, teacher)
            row = b * S + s
            tl.store(stats_ptr + row, inverse)
            tl.store(stats_ptr + B * S + row, longer)
            tl.store(stats_ptr + 2 * B * S + row, squared)
            loss += squared
        else:
            if KIND == MASKED_MSE:
                student = tl.where(_masked(student, stats_ptr, b, B), student, 0.0)
                teacher = tl.where(_masked(teacher, stats_ptr + 2 * B, b, B), teacher, 0.0)
            if KIND == RELATIVE_MSE:
                teacher_square += tl.sum(teacher * teacher, axis=0)
            loss += tl.sum((student - teacher) * (student - teacher), axis=0)
    partial = partials_ptr + (b * P + p) * PARTIALS
    tl.store(partial, loss.to(tl.float32))
    tl.store(partial + 1, teacher_square.to(tl.float32))


@triton.jit
def _finish_kernel(partials_ptr, loss_ptr, stats_ptr, count, of, KIND: tl.constexpr):
    loss = tl.full((), 0.0, tl.float64)
    teacher_square = tl.full((), 0.0, tl.float64)
    for i in range(count):
        loss += tl.load(partials_ptr + i * PARTIALS)
        teacher_square += tl.load(partials_ptr + i * PARTIALS + 1)
    if KIND == RELATIVE_MSE:
        tl.store(stats_ptr, (2.0 / teacher_square).to(tl.float32))
        tl.store(loss_ptr, tl.where(count > 0, loss / teacher_square, 0.0).to(tl.float32))
    else:
        tl.store(loss_ptr, (loss / of).to(tl.float32))


@triton.jit
def _backward_kernel(
    grad_ptr, student_ptr, teacher_ptr, stats_ptr, out_ptr,
    B, S, D, factor, student_stride_b, student_stride_s, teacher_stride_b, teacher_stride_s,
    KIND: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    b, s = row // S, row % S
    d = tl.arange(0, BLOCK_D)
    inside = d < D
    student = _row(student_ptr, student_stride_b, student_stride_s, b, s, d, inside)
    teacher = _row(teacher_ptr, teacher_stride_b, teacher_stride_s, b, s, d, inside)
    factor = tl.load(grad_ptr) * factor
    if KIND == COSINE:
        inverse, longer = tl.load(stats_ptr + row), tl.load(stats_ptr + B * S + row)
        half = tl.load(stats_ptr + 2 * B * S + row) / 2
        out = (student - teacher - teacher * longer - student * half) * (factor * inverse * inverse)
    elif KIND == MASKED_MSE:
        kept = tl.where(_masked(teacher, stats_ptr + 2 * B, b, B), teacher, 0.0)
        out = tl.where(_masked(student, stats_ptr, b, B), (student - kept) * factor, 0.0)
    else:
        if KIND == RELATIVE_MSE:
            factor *= tl.load(stats_ptr)
        out = (student - teacher) * factor
    tl.store(out_ptr + row * D + d, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _statistics_kernel(
    before_ptr, after_ptr, out_ptr, rows, S, D,
    before_stride_b, before_stride_s, after_stride_b, after_stride_s, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    b, s = row // S, row % S
    d = tl.arange(0, BLOCK_D)
    before = _row(before_ptr, before_stride_b, before_stride_s, b, s, d, d < D)
    after = _row(after_ptr, after_stride_b, after_stride_s, b, s, d, d < D)
    square, norm_before, norm_after, _, _, squared = _unit_distance(before, after)
    tl.store(out_ptr + row, 1.0 - squared / 2)
    tl.store(out_ptr + rows + row, square / D)
    tl.store(out_ptr + 2 * rows + row, norm_before)
    tl.store(out_ptr + 3 * rows + row, norm_after)


def feature_kd_loss(student: Tensor, teacher: Tensor, kind: int) -> tuple[Tensor, Tensor]:
    B, S, D = batched_shape(student)
    loss = student.new_empty((), dtype=torch.float32)
    stats = student.new_empty(((0, 1, 3 * B * S, 4 * B)[kind],), dtype=torch.float32)
    P = token_chunks(B, S, student.device) if B * S > 0 else 0
    partials = student.new_empty((B, P, PARTIALS.value), dtype=torch.float32)
    strides = *row_strides(student, student), *row_strides(teacher, student)
    block, warps = row_block(D)
    if P > 0 and kind == MASKED_MSE.value:
        _moments_kernel[(B, P)](student, teacher, partials, S, D, P, *strides, BLOCK_D=block, num_warps=warps)
        _finish_moments_kernel[(B, 2)](partials, stats, B, S, D, P, MASK_SIGMAS)
    elif kind == MASKED_MSE.value:
        stats.zero_()
    if P > 0:
        _reduce_kernel[(B, P)](
            student, teacher, stats, partials, B, S, D, P, *strides, KIND=kind, BLOCK_D=block, num_warps=warps
        )  # fmt: skip
    _finish_kernel[(1,)](partials, loss, stats, B * P, _terms(student, kind), KIND=kind)
    return loss, stats


def feature_kd_loss_backward(grad: Tensor, student: Tensor, teacher: Tensor, stats: Tensor, kind: int) -> Tensor:
    B, S, D = batched_shape(student)
    out = student.new_empty(student.shape)
    if B * S > 0:
        block, warps = row_block(D)
        factor = 1.0 if kind == RELATIVE_MSE.value else 2.0 / _terms(student, kind)
        _backward_kernel[(B * S,)](
            grad, student, teacher, stats, out, B, S, D, factor,
            *row_strides(student, student), *row_strides(teacher, student),
            KIND=kind, BLOCK_D=block, num_warps=warps,
        )  # fmt: skip
    return out


def block_statistics(before: Tensor, after: Tensor) -> Tensor:
    B, S, D = batched_shape(before)
    out = before.new_empty((4, *before.shape[:-1]), dtype=torch.float32)
    if B * S > 0:
        block, warps = row_block(D)
        _statistics_kernel[(B * S,)](
            before, after, out, B * S, S, D, *row_strides(before, before), *row_strides(after, before),
            BLOCK_D=block, num_warps=warps,
        )  # fmt: skip
    return out


def _terms(student: Tensor, kind: int) -> int:
    """Number of terms that the loss is a mean over: tokens or elements."""
    return max(1, student.shape[:-1].numel() if kind == COSINE.value else student.numel())


register("feature_kd_loss", feature_kd_loss, feature_kd_loss_backward)
register("block_statistics", block_statistics)
