"""The whole FRSKD objective, CE(student) + CE(teacher) + alpha * KD + beta * sum_l AT_l, of three operations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from frskd_fast import _dispatch
from frskd_fast.ops import attention, combine, logits
from frskd_fast.ops._autograd import once_differentiable
from frskd_fast.ops.labels import Labels, kept
from frskd_fast.reference import attention as attention_reference
from frskd_fast.reference import combine as reference
from frskd_fast.reference.logits import Heads, Saved, Settings, Upstream, Wanted


class Objective(NamedTuple):
    """The numbers of one FRSKD loss; all plain Python, so that a traced graph holds them as constants."""

    alpha: float
    beta: float
    exponent: float
    logits: Settings


class _Objective(torch.autograd.Function):
    """Three kernels forward (attention, logits, combine), two backward; nothing else touches the features."""

    @staticmethod
    def forward(
        ctx: Any,
        levels: int,
        objective: Objective,
        impl: str,
        label_counts: tuple[int, int],  # how many targets and second targets follow the logits
        student_logits: Tensor,
        teacher_logits: Tensor,
        *tensors: Tensor,  # targets, second targets, student features, teacher features
    ) -> tuple[Tensor, Tensor]:
        target_end = label_counts[0] + label_counts[1]
        targets, targets_b = list(tensors[: label_counts[0]]), list(tensors[label_counts[0] : target_end])
        student_end = target_end + levels
        students, teachers = list(tensors[target_end:student_end]), list(tensors[student_end:])
        heads = Heads([student_logits], [teacher_logits], targets, targets_b)
        losses, statistics, inverse_valid = logits.forward(heads, objective.logits, impl)
        need_features = any(ctx.needs_input_grad[6 + target_end : 6 + student_end])
        if levels:
            attention_losses, coefficients, _ = attention.forward(
                students, teachers, objective.exponent, need_features, False, impl
            )
        else:
            attention_losses, coefficients = losses.new_empty((0, 1)), losses.new_empty(0)
        parts, (total,) = combine.combine(
            attention_losses, losses, objective.alpha, objective.beta, label_counts[0] > 0, False, impl
        )
        ctx.save_for_backward(
            losses, statistics, inverse_valid, coefficients, student_logits, teacher_logits, *targets, *targets_b,
            *(students if need_features else ()),
        )  # fmt: skip
        ctx.settings = (levels, objective, impl, label_counts, need_features)
        ctx.batch = attention_losses.shape[1]
        ctx.mark_non_differentiable(parts)
        return total, parts

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Any, ...]:
        levels, objective, impl, label_counts, need_features = ctx.settings
        losses, statistics, inverse_valid, coefficients, student_logits, teacher_logits, *tensors = ctx.saved_tensors
        target_end = label_counts[0] + label_counts[1]
        need_student, need_teacher = ctx.needs_input_grad[4], ctx.needs_input_grad[5] and label_counts[0] > 0
        student_gradient = teacher_gradient = None
        if need_student or need_teacher:
            has_targets = float(label_counts[0] > 0)
            upstream = Upstream([grad] * 3, 0, 0, [has_targets, has_targets, objective.alpha], True)
            heads = Heads(
                [student_logits], [teacher_logits], tensors[: label_counts[0]], tensors[label_counts[0] : target_end]
            )
            gradients = logits.backward(
                upstream, heads, objective.logits, Saved(losses, statistics, inverse_valid),
                Wanted(need_student, need_teacher, False), impl,
            )  # fmt: skip
            student_gradient = gradients[0] if need_student else None
            teacher_gradient = gradients[-1] if need_teacher else None
        students: list[Any] = [None] * levels
        if need_features:
            students = attention.backward(
                grad.expand(levels, ctx.batch), objective.beta, True, tensors[target_end:], coefficients,
                objective.exponent, impl,
            )  # fmt: skip
        labels = [None] * target_end
        return (None, None, None, None, student_gradient, teacher_gradient, *labels, *students, *([None] * levels))


def objective(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Labels,
    students: Sequence[Tensor],
    teachers: Sequence[Tensor],
    settings: Objective,
    impl: str,
) -> tuple[Tensor, Tensor]:
    """The FRSKD loss (scalar) and its detached parts (total, ce_student, ce_teacher, kd, feature).

    The arguments are already checked. KD and the feature term are detached from the self-teacher, its CE is not.
    """
    teachers = [teacher.detach() for teacher in teachers]
    if not labels.first:
        teacher_logits = teacher_logits.detach()
    if not _dispatch.is_plain(impl):
        teacher_logits, labels = kept(teacher_logits), labels.kept()
        counts = (len(labels.first), len(labels.second))
        total, parts = _Objective.apply(
            len(students), settings, impl, counts, student_logits, teacher_logits, *labels.first, *labels.second,
            *students, *teachers,
        )  # fmt: skip
        return total, parts
    for operation in ("logits", "combine", *(["attention"] if students else [])):
        _dispatch.record(operation, impl)
    ce_student, ce_teacher, kd_rows, weight = logits.reference_rows(
        student_logits,
        teacher_logits,
        labels.first[0] if labels.first else None,
        labels.second[0] if labels.second else None,
        settings.logits,
        detach_teacher=True,
    )
    ce_student = reference.weighted_mean(ce_student, weight)
    ce_teacher = reference.weighted_mean(ce_teacher, weight)
    kd = kd_rows.sum() / max(kd_rows.numel(), 1)
    feature = kd.new_zeros(())
    if students:
        rows = attention_reference.attention_transfer(students, teachers, settings.exponent)
        feature = rows.sum().to(kd.dtype) / max(rows.shape[1], 1)
    total = reference.combine(ce_student, ce_teacher, kd, feature, settings.alpha, settings.beta)
    return total, torch.stack([total, ce_student, ce_teacher, kd, feature]).detach()
