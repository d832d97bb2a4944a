"""Raw attention-transfer functions of the compiled library; one schema serves the CPU and CUDA kernels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from frskd_fast.native import needs_workspace
from frskd_fast.reference.attention import upstream_scale
from frskd_fast.reference.dtypes import accumulate_dtype

_ops = torch.ops.frskd_fast_native


def forward(
    students: Sequence[Tensor],  # L x (N, C_l, H_l, W_l)
    teachers: Sequence[Tensor],  # L x (N, D_l, H_l, W_l)
    exponent: float,  # p >= 1
    need_student: bool,
    need_teacher: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses (L, N) and the backward coefficients of both sides, empty where no gradient is needed."""
    first = students[0]
    dtype = accumulate_dtype(first.dtype)
    device = first.device
    batch = first.shape[0]
    numel = batch * sum(student.shape[2] * student.shape[3] for student in students)
    losses = torch.empty((len(students), batch), dtype=dtype, device=device)
    student_coefficients = torch.empty(numel if need_student else 0, dtype=dtype, device=device)
    teacher_coefficients = torch.empty(numel if need_teacher else 0, dtype=dtype, device=device)
    workspace = torch.empty(2 * numel, dtype=dtype, device=device) if needs_workspace(first) else None
    _ops.attention_forward.default(
        students,
        teachers,
        exponent,
        losses,
        student_coefficients if need_student else None,
        teacher_coefficients if need_teacher else None,
        workspace,
    )
    return losses, student_coefficients, teacher_coefficients


def backward(
    grad: Tensor,  # (L, N), may be expanded
    weight: float,
    mean_over_batch: bool,
    features: Sequence[Tensor],  # L x (N, C_l, H_l, W_l)
    coefficients: Tensor,  # (N * sum_l H_l * W_l,) in the accumulate dtype
    exponent: float,
) -> list[Tensor]:
    """Gradients of the features, in their dtype and memory format."""
    gradients = [torch.empty_like(feature) for feature in features]
    scale = upstream_scale(weight, mean_over_batch, features[0].shape[0])
    _ops.attention_backward.default(grad, scale, features, coefficients, exponent, gradients)
    return gradients


def attention_map(feature: Tensor, exponent: float) -> tuple[Tensor, Tensor]:
    """Normalised map (N, H*W) and the norm (N,) before the clamp."""
    dtype = accumulate_dtype(feature.dtype)
    batch, _, height, width = feature.shape
    attention = torch.empty((batch, height * width), dtype=dtype, device=feature.device)
    norm = torch.empty(batch, dtype=dtype, device=feature.device)
    _ops.attention_map.default(feature, exponent, attention, norm)
    return attention, norm
