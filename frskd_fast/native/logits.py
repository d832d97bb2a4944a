"""Raw class-logit losses of the compiled library; one schema serves the CPU and CUDA kernels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from frskd_fast.reference.dtypes import accumulate_dtype

_ops = torch.ops.frskd_fast_native


def _refused(error: RuntimeError) -> Exception:
    """The kernel's error, as a ValueError where it is about a label.

    The kernel looks at the labels anyway; checking them here as well would read them twice.
    """
    _, found, sentence = str(error).partition("targets holds the label")
    return ValueError(found + sentence.splitlines()[0]) if found else error


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
    try:
        _ops.logits_forward.default(
            students, teachers, targets, targets_b, mix, label_smoothing, ignore_index, temperature,
            losses, statistics, inverse_valid,
        )  # fmt: skip
    except RuntimeError as error:
        raise _refused(error) from None
    return losses, statistics, inverse_valid


def forward_with_gradients(
    student: Tensor,  # (N, K), N >= 1, K <= 1024
    teacher: Tensor,  # (N, K)
    targets: Tensor | None,  # (N,) int64 labels
    targets_b: Tensor | None,  # second labels of a mix
    mix: float,
    label_smoothing: float,
    ignore_index: int,
    temperature: float,
    mean: bool,  # over kept rows (cross-entropies) and all rows (divergence), else sums
    weights: Sequence[float],  # upstream gradients of ce_student, ce_teacher, kd
    need_teacher: bool,
) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[Tensor, Tensor | None]]:
    """Reduced (ce_student, ce_teacher, kd), and the gradients of their weighted sum: the student's and the teacher's."""
    try:
        ce_student, ce_teacher, kd, student_gradient, teacher_gradient = _ops.logits_with_gradients.default(
            student, teacher, targets, targets_b, mix, label_smoothing, ignore_index, temperature, mean, *weights,
            need_teacher,
        )  # fmt: skip
    except RuntimeError as error:
        raise _refused(error) from None
    return (ce_student, ce_teacher, kd), (student_gradient, teacher_gradient)


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
