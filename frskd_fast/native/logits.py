"""Raw class-logit losses of the compiled library; one schema serves the CPU and CUDA kernels."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from frskd_fast.reference.dtypes import accumulate_dtype
from frskd_fast.reference.logits import (
    Heads,
    Saved,
    Settings,
    Upstream,
    Wanted,
    check_label_range,
    head_scales,
    row_count,
)

# Of each row: both maxima, then the logarithms of both sums of exponentials, then the same of the tempered ones.
STATISTICS = 6

_ops = torch.ops.frskd_fast_native


def forward(heads: Heads, settings: Settings) -> Saved:
    """Losses (4, R), statistics (6, R) and 1 / valid rows of each head (docs/contracts.md)."""
    first = heads.students[0]
    dtype, device = accumulate_dtype(first.dtype), first.device
    rows = sum(map(row_count, heads.students))
    losses = torch.empty((4, rows), dtype=dtype, device=device)
    statistics = torch.empty((STATISTICS, rows), dtype=dtype, device=device)
    inverse_valid = torch.empty(len(heads.students), dtype=dtype, device=device)
    _ops.logits_forward.default(*heads, *settings, losses, statistics, inverse_valid)
    if first.is_cpu and any(map(math.isnan, inverse_valid.tolist())):
        # The sign of a label that is no class: the kernel finds it where it reads the label anyway.
        for targets in (heads.targets, heads.targets_b):
            for student, labels in zip(heads.students, targets, strict=False):
                check_label_range(labels, student.shape[1], settings.ignore_index, "targets")
    return Saved(losses, statistics, inverse_valid)


def backward(upstream: Upstream, heads: Heads, settings: Settings, saved: Saved, wanted: Wanted) -> list[Tensor]:
    """Gradients of the students' and of the teachers' logits, as wanted, in their dtype and memory format."""
    student_gradients = [torch.empty_like(student) for student in heads.students] if wanted.student else []
    teacher_gradients = [torch.empty_like(teacher) for teacher in heads.teachers] if wanted.teacher else []
    _ops.logits_backward.default(
        upstream.grads, upstream.head_stride, upstream.row_stride, head_scales(upstream, heads.students),
        *heads, *settings, saved.losses, saved.statistics, saved.inverse_valid if upstream.mean else None,
        wanted.kd_to_teacher, student_gradients, teacher_gradients,
    )  # fmt: skip
    return student_gradients + teacher_gradients
