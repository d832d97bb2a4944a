"""Raw class-logit losses of the compiled library; one schema serves the CPU and CUDA kernels."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from frskd_fast.reference.dtypes import accumulate_dtype
from frskd_fast.reference.logits import check_label_range

_ops = torch.ops.frskd_fast_native


def forward(
    students: Sequence[Tensor],  # heads x (N, K[, H[, W]])
    teachers: Sequence[Tensor],  # the same shapes, or empty
    targets: Sequence[Tensor],  # heads x (N[, H[, W]]) int64, or probabilities of the logits' shape, or empty
    targets_b: Sequence[Tensor],  # second labels of a mix, or empty
    mix: float,  # weight of the first labels
    label_smoothing: float,
    ignore_index: int,
    temperature: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses (4, R), statistics (6, R) and 1 / valid rows of each head."""
    first = students[0]
    dtype = accumulate_dtype(first.dtype)
    rows = sum(student.numel() // student.shape[1] for student in students)
    losses = torch.empty((4, rows), dtype=dtype, device=first.device)
    statistics = torch.empty((6, rows), dtype=dtype, device=first.device)
    inverse_valid = torch.empty(len(students), dtype=dtype, device=first.device)
    _ops.logits_forward.default(
        students, teachers, targets, targets_b, mix, label_smoothing, ignore_index, temperature,
        losses, statistics, inverse_valid,
    )  # fmt: skip
    if first.is_cpu and any(map(math.isnan, inverse_valid.tolist())):
        # The CPU's sign of a label that is no class, found by the kernel, which reads the labels anyway.
        for student, labels in [*zip(students, targets, strict=True), *zip(students, targets_b, strict=False)]:
            check_label_range(labels, student.shape[1], ignore_index, "targets")
    return losses, statistics, inverse_valid


def backward(
    grads: Sequence[Tensor],  # three 1-D tensors: upstream gradients of ce_student, ce_teacher, kd
    grad_head_stride: int,  # elements
    grad_row_stride: int,  # elements
    scales: Sequence[float],  # (3 * heads,), 0 where a term is absent
    inverse_valid: Tensor | None,  # (heads,)
    students: Sequence[Tensor],
    teachers: Sequence[Tensor],
    targets: Sequence[Tensor],
    targets_b: Sequence[Tensor],
    mix: float,
    label_smoothing: float,
    ignore_index: int,
    temperature: float,
    statistics: Tensor,  # (6, R)
    losses: Tensor,  # (4, R)
    kd_to_teacher: bool,
    need_student: bool,
    need_teacher: bool,
) -> tuple[list[Tensor] | None, list[Tensor] | None]:
    """Gradients of the student and teacher logits, in their dtype and memory format."""
    student_gradients = [torch.empty_like(student) for student in students] if need_student else None
    teacher_gradients = [torch.empty_like(teacher) for teacher in teachers] if need_teacher else None
    _ops.logits_backward.default(
        grads, grad_head_stride, grad_row_stride, scales, inverse_valid, students, teachers, targets, targets_b,
        mix, label_smoothing, ignore_index, temperature, statistics, losses, kd_to_teacher,
        student_gradients or [], teacher_gradients or [],
    )  # fmt: skip
    return student_gradients, teacher_gradients
