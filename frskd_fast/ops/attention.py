"""Operation ``attention``: attention-transfer loss over all pyramid levels in one call, and the attention map."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from frskd_fast import _dispatch
from frskd_fast.ops import _checks, _table
from frskd_fast.ops._autograd import once_differentiable
from frskd_fast.reference import attention as reference
from frskd_fast.reference.dtypes import accumulate_dtype

REDUCTIONS = ("mean", "sum", "levels", "none")


@_table.register("attention")
def forward(
    students: Sequence[Tensor],
    teachers: Sequence[Tensor],
    exponent: float,
    need_student: bool,
    need_teacher: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses (L, N) and the coefficients of both sides' gradients; those that are not needed come back empty."""
    first = students[0]
    losses = first.new_empty((len(students), first.shape[0]), dtype=accumulate_dtype(first.dtype))
    numel = first.shape[0] * sum(student.shape[2] * student.shape[3] for student in students)
    return (
        losses,
        losses.new_empty((numel if need_student else 0,)),
        losses.new_empty((numel if need_teacher else 0,)),
    )


@_table.register("attention")
def backward(
    grad: Tensor,
    weight: float,
    mean_over_batch: bool,
    features: Sequence[Tensor],
    coefficients: Tensor,
    exponent: float,
    impl: str,
) -> list[Tensor]:
    """Gradients of the features for upstream gradients ``grad * weight`` (``/ N`` when averaged over the batch)."""
    return [torch.empty_like(feature) for feature in features]


@_table.register("attention", "attention_map")
def normalised_map(feature: Tensor, exponent: float, impl: str) -> tuple[Tensor, Tensor]:
    """Normalised map (N, H*W) and its norm (N,)."""
    batch, _, height, width = feature.shape
    norm = feature.new_empty((batch,), dtype=accumulate_dtype(feature.dtype))
    return norm.new_empty((batch, height * width)), norm


def _reduced(losses: Tensor, reduction: str) -> Tensor:
    """One of `REDUCTIONS` of the losses (L, N); the means are over the batch, the sum over the levels."""
    if reduction == "none":
        return losses
    if reduction == "sum":
        return losses.sum()
    total = losses.sum() if reduction == "mean" else losses.sum(1)
    return total / max(losses.shape[1], 1)


class _AttentionTransfer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        levels: int,
        exponent: float,
        reduction: str,
        impl: str,
        *features: Tensor,  # students, then teachers
    ) -> Tensor:
        students, teachers = list(features[:levels]), list(features[levels:])
        need_student = any(ctx.needs_input_grad[4 : 4 + levels])
        need_teacher = any(ctx.needs_input_grad[4 + levels :])
        losses, student_coefficients, teacher_coefficients = forward(
            students, teachers, exponent, need_student, need_teacher, impl
        )
        saved = (students if need_student else []) + (teachers if need_teacher else [])
        ctx.save_for_backward(student_coefficients, teacher_coefficients, *saved)
        ctx.settings = (levels, exponent, reduction, impl, need_student, need_teacher)
        ctx.batch = losses.shape[1]
        return _reduced(losses, reduction)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        levels, exponent, reduction, impl, need_student, need_teacher = ctx.settings
        student_coefficients, teacher_coefficients, *saved = ctx.saved_tensors
        mean_over_batch = reduction in ("mean", "levels")
        if reduction == "levels":
            grad = grad.unsqueeze(1)
        grad = grad.expand(levels, ctx.batch)
        students: list[Any] = [None] * levels
        teachers: list[Any] = [None] * levels
        if need_student:
            students = backward(grad, 1.0, mean_over_batch, saved[:levels], student_coefficients, exponent, impl)
        if need_teacher:
            teachers = backward(grad, 1.0, mean_over_batch, saved[-levels:], teacher_coefficients, exponent, impl)
        return (None, None, None, None, *students, *teachers)


def _resized(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Both maps at the smaller height and width of the two, by average pooling."""
    size = (min(student.shape[2], teacher.shape[2]), min(student.shape[3], teacher.shape[3]))
    pool = torch.nn.functional.adaptive_avg_pool2d
    if tuple(student.shape[2:]) != size:
        student = pool(student, size)
    if tuple(teacher.shape[2:]) != size:
        teacher = pool(teacher, size)
    return student, teacher


def checked_pyramids(
    student_feats: Any,
    teacher_feats: Any,
    resize: str | None,
    names: tuple[str, str] = ("student_feats", "teacher_feats"),
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """The two pyramids, checked, with equal map sizes on every level."""
    if resize not in (None, "pool"):
        raise ValueError(f"resize is {resize!r}, but None or 'pool' was wanted.")
    students, teachers = _checks.feature_pyramids(student_feats, teacher_feats, names)
    pairs = []
    for level, (student, teacher) in enumerate(zip(students, teachers, strict=True)):
        height, width = student.shape[2:]
        if teacher.shape[2:] != (height, width):
            if resize is None:
                raise ValueError(
                    f"{names[1]}[{level}] has maps of {tuple(teacher.shape[2:])} pixels, but {names[0]}[{level}] has "
                    f"{tuple(student.shape[2:])} and equal sizes were wanted; pass resize='pool' to average-pool the "
                    "larger one."
                )
            student, teacher = _resized(student, teacher)
        pairs.append((student, teacher))
    return tuple(pair[0] for pair in pairs), tuple(pair[1] for pair in pairs)


def attention_transfer(
    student_feats: Any,
    teacher_feats: Any,
    exponent: float,
    reduction: str,
    resize: str | None,
    detach_teacher: bool,
    impl: str,
) -> Tensor:
    """Checks, choice of implementation and autograd of ``functional.attention_transfer``."""
    exponent = _checks.attention_exponent(exponent)
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction is {reduction!r}, but one of {', '.join(map(repr, REDUCTIONS))} was wanted.")
    students, teachers = checked_pyramids(student_feats, teacher_feats, resize)
    if detach_teacher:
        teachers = tuple(teacher.detach() for teacher in teachers)
    name = _dispatch.choose_for("attention", impl, students[0])
    if not _dispatch.is_plain(name):
        result: Tensor = _AttentionTransfer.apply(len(students), exponent, reduction, name, *students, *teachers)
        return result
    _dispatch.record("attention", name)
    return _reduced(reference.attention_transfer(students, teachers, exponent), reduction)


class _AttentionMap(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, feature: Tensor, exponent: float, impl: str) -> Tensor:
        attention: Tensor
        attention, norm = normalised_map(feature, exponent, impl)
        ctx.save_for_backward(feature, attention, norm)
        ctx.settings = (exponent, impl)
        return attention

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None]:
        feature, attention, norm = ctx.saved_tensors
        exponent, impl = ctx.settings
        projection = (attention * grad).sum(1, keepdim=True)
        clamped = (norm < reference.NORM_FLOOR).unsqueeze(1)
        radial = (attention * projection).masked_fill(clamped, 0.0)
        divisor = norm.clamp_min(reference.NORM_FLOOR).unsqueeze(1)
        coefficients = (grad - radial) / divisor * (exponent / feature.shape[1])
        ones = coefficients.new_ones(()).expand(1, feature.shape[0])
        gradients = backward(ones, 1.0, False, [feature], coefficients.flatten(), exponent, impl)
        return gradients[0], None, None


def attention_map(feature: Any, exponent: float, impl: str) -> Tensor:
    """Checks, choice of implementation and autograd of ``functional.attention_map``."""
    feature = _checks.feature_map(feature, "feature")
    exponent = _checks.attention_exponent(exponent)
    name = _dispatch.choose_for("attention", impl, feature)
    if not _dispatch.is_plain(name):
        result: Tensor = _AttentionMap.apply(feature, exponent, name)
        return result
    _dispatch.record("attention", name)
    return reference.attention_map(feature, exponent)
