"""The FRSKD objective from unreduced losses in Triton: CE(student) + CE(teacher) + alpha * KD + beta * feature."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import launch, triton_accumulate_dtype

# Rows one program sums; of longer losses, a launch before first sums every slice of this length.
_SLICE = 16384
_STEP = 2048
_NUM_WARPS = 8


@triton.jit(do_not_specialize=["rows", "slices"])
def _slice_sums_kernel(
    losses,  # (4, R)
    sums,  # (4, slices)
    rows,  # R
    slices,
    SLICE: tl.constexpr,
    BLOCK: tl.constexpr,
    ACCUMULATE: tl.constexpr,
):
    """One program for each (part, slice of rows)."""
    program = tl.program_id(0)
    first = (program % slices).to(tl.int64) * SLICE
    losses += (program // slices).to(tl.int64) * rows
    total = tl.zeros([BLOCK], ACCUMULATE)
    for begin in tl.static_range(0, SLICE, BLOCK):
        row = first + begin + tl.arange(0, BLOCK)
        total += tl.load(losses + row, mask=row < rows, other=0.0)
    tl.store(sums + program, tl.sum(total, axis=0))


@triton.jit(do_not_specialize=["count", "batch", "columns", "rows"])
def _combine_kernel(
    attention_losses,  # (L, N)
    logits_losses,  # (4, columns)
    parts,  # (5,)
    first_scalar,  # the total; with SPLIT ce_student
    second_scalar,  # with SPLIT ce_teacher
    third_scalar,  # with SPLIT kd
    count,  # L * N
    batch,  # N
    columns,
    rows,  # R: how many rows the columns stand for
    alpha: tl.float64,
    beta: tl.float64,
    HAS_TARGETS: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK: tl.constexpr,
    ACCUMULATE: tl.constexpr,
):
    """One program: total, ce_student, ce_teacher, kd, feature."""
    feature_sums = tl.zeros([BLOCK], ACCUMULATE)
    for begin in range(0, count, BLOCK):
        column = begin + tl.arange(0, BLOCK)
        feature_sums += tl.load(attention_losses + column, mask=column < count, other=0.0)
    student_sums = tl.zeros([BLOCK], ACCUMULATE)
    teacher_sums = tl.zeros([BLOCK], ACCUMULATE)
    kd_sums = tl.zeros([BLOCK], ACCUMULATE)
    weights = tl.zeros([BLOCK], ACCUMULATE)
    for begin in range(0, columns, BLOCK):
        column = begin + tl.arange(0, BLOCK)
        mask = column < columns
        kd_sums += tl.load(logits_losses + 2 * columns + column, mask=mask, other=0.0)
        if HAS_TARGETS:
            student_sums += tl.load(logits_losses + column, mask=mask, other=0.0)
            teacher_sums += tl.load(logits_losses + columns + column, mask=mask, other=0.0)
            weights += tl.load(logits_losses + 3 * columns + column, mask=mask, other=0.0)
    feature = tl.sum(feature_sums, axis=0) / tl.maximum(batch, 1)
    kd = tl.sum(kd_sums, axis=0) / tl.maximum(rows, 1)
    valid = tl.sum(weights, axis=0)
    divisor = tl.where(valid == 0.0, 1.0, valid)
    ce_student = tl.sum(student_sums, axis=0) / divisor
    ce_teacher = tl.sum(teacher_sums, axis=0) / divisor
    weighted_kd = kd * tl.full([], alpha, ACCUMULATE)
    weighted_feature = feature * tl.full([], beta, ACCUMULATE)
    total = (ce_student + ce_teacher) + (weighted_kd + weighted_feature)
    if SPLIT:
        tl.store(first_scalar, ce_student)
        tl.store(second_scalar, ce_teacher)
        tl.store(third_scalar, kd)
    else:
        tl.store(first_scalar, total)
    tl.store(parts, total)
    tl.store(parts + 1, ce_student)
    tl.store(parts + 2, ce_teacher)
    tl.store(parts + 3, kd)
    tl.store(parts + 4, feature)


def forward(
    attention_losses: Tensor,  # (L, N)
    logits_losses: Tensor,  # (4, R)
    alpha: float,
    beta: float,
    has_targets: bool,
    split: bool,
) -> tuple[Tensor, list[Tensor]]:
    """(total, ce_student, ce_teacher, kd, feature), and the total or the three of the logits as scalars.

    One launch, two above 16384 rows.
    """
    attention_losses, logits_losses = attention_losses.contiguous(), logits_losses.contiguous()
    device = logits_losses.device
    accumulate = triton_accumulate_dtype(logits_losses.dtype)
    parts = torch.empty(5, dtype=logits_losses.dtype, device=device)
    scalars = [torch.empty((), dtype=parts.dtype, device=device) for _ in range(3 if split else 1)]
    rows = logits_losses.shape[1]
    if rows > _SLICE:
        slices = triton.cdiv(rows, _SLICE)
        sums = torch.empty((4, slices), dtype=logits_losses.dtype, device=device)
        launch(
            _slice_sums_kernel, 4 * slices, device,
            logits_losses, sums, rows, slices,
            SLICE=_SLICE, BLOCK=_STEP, ACCUMULATE=accumulate, num_warps=_NUM_WARPS,
        )  # fmt: skip
        logits_losses = sums
    columns = logits_losses.shape[1]
    launch(
        _combine_kernel, 1, device,
        attention_losses, logits_losses, parts, *(scalars if split else 3 * scalars),
        attention_losses.numel(), attention_losses.shape[1], columns, rows, alpha, beta,
        HAS_TARGETS=has_targets, SPLIT=split, BLOCK=_STEP, ACCUMULATE=accumulate, num_warps=_NUM_WARPS,
    )  # fmt: skip
    return parts, scalars
