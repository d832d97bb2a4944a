"""Operation ``logits``: cross-entropy of student and teacher and the T^2-scaled KL, from one read of the raw logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from frskd_fast import _dispatch
from frskd_fast.ops import _checks, _table
from frskd_fast.ops._autograd import once_differentiable
from frskd_fast.ops.combine import combine
from frskd_fast.ops.labels import Labels, checked_labels, kept
from frskd_fast.reference import logits as reference
from frskd_fast.reference.combine import weighted_mean
from frskd_fast.reference.dtypes import accumulate_dtype
from frskd_fast.reference.logits import Heads, Saved, Settings, Upstream, Wanted, row_count

REDUCTIONS = ("batchmean", "sum", "none")


@_table.register("logits")
def forward(heads: Heads, settings: Settings, impl: str) -> tuple[Tensor, Tensor, Tensor]:
    """Unreduced losses (4, R), statistics and 1 / valid rows of each head, the fields of `Saved`."""
    first = heads.students[0]
    dtype = accumulate_dtype(first.dtype)
    rows = sum(map(row_count, heads.students))
    return (
        first.new_empty((4, rows), dtype=dtype),
        first.new_empty((_dispatch.raw("logits", impl).STATISTICS, rows), dtype=dtype),
        first.new_empty((len(heads.students),), dtype=dtype),
    )


@_table.register("logits")
def backward(
    upstream: Upstream, heads: Heads, settings: Settings, saved: Saved, wanted: Wanted, impl: str
) -> list[Tensor]:
    """Gradients of the students' logits, then of the teachers', as wanted."""
    inputs = (*(heads.students if wanted.student else ()), *(heads.teachers if wanted.teacher else ()))
    return [torch.empty_like(logits) for logits in inputs]


class _Call(NamedTuple):
    """Everything of a call that is no tensor."""

    settings: Settings
    reduction: str
    detach_teacher: bool
    impl: str
    counts: tuple[int, int, int, int]  # of students, teachers, targets and second targets, in this order

    def heads(self, tensors: Sequence[Tensor]) -> Heads:
        students, teachers, targets, _ = self.counts
        teacher_end = students + teachers
        target_end = teacher_end + targets
        return Heads(
            list(tensors[:students]),
            list(tensors[students:teacher_end]),
            list(tensors[teacher_end:target_end]),
            list(tensors[target_end:]),
        )


def _reduced(saved: Saved, heads: Heads, call: _Call) -> tuple[Tensor, Tensor, Tensor]:
    losses = saved.losses
    if call.reduction == "none":
        return losses[0].clone(), losses[1].clone(), losses[2].clone()
    one_mean = call.reduction == "batchmean" and len(heads.students) == 1
    if one_mean and not _dispatch.left_to_compiler("logits_means"):
        no_attention = losses.new_empty((0, 1))
        _, (ce_student, ce_teacher, kd) = combine(no_attention, losses, 1.0, 0.0, bool(heads.targets), True, call.impl)
        return ce_student, ce_teacher, kd
    parts = []
    begin = 0
    for head, student in enumerate(heads.students):
        rows = row_count(student)
        sums = losses[:3, begin : begin + rows].sum(1)
        begin = begin + rows
        if call.reduction == "batchmean":
            inverse_valid = saved.inverse_valid[head]
            parts.append((sums[0] * inverse_valid, sums[1] * inverse_valid, sums[2] / max(rows, 1)))
        else:
            parts.append((sums[0].clone(), sums[1].clone(), sums[2].clone()))
    if len(parts) == 1:
        return parts[0]
    ce_student, ce_teacher, kd = (torch.stack(column) for column in zip(*parts, strict=True))
    return ce_student, ce_teacher, kd


class _LogitLosses(torch.autograd.Function):
    """(ce_student, ce_teacher, kd): scalars for one head, (heads,) for several, flat (R,) when unreduced."""

    @staticmethod
    def forward(ctx: Any, call: _Call, *tensors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        heads = call.heads(tensors)
        saved = Saved(*forward(heads, call.settings, call.impl))
        ctx.save_for_backward(*saved, *tensors)
        ctx.call = call
        parts = _reduced(saved, heads, call)
        has_targets, has_teacher = bool(heads.targets), bool(heads.teachers)
        present = (has_targets, has_targets and has_teacher, has_teacher)
        ctx.mark_non_differentiable(*(part for part, there in zip(parts, present, strict=True) if not there))
        return parts

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        call: _Call = ctx.call
        losses, statistics, inverse_valid, *tensors = ctx.saved_tensors
        heads = call.heads(tensors)
        students, teachers = len(heads.students), len(heads.teachers)
        has_targets, has_teacher = bool(heads.targets), bool(heads.teachers)
        by_row, by_head = call.reduction == "none", call.reduction != "none" and students > 1
        upstream = Upstream(
            grads,
            int(by_head),
            int(by_row),
            [float(has_targets), float(has_targets and has_teacher), float(has_teacher)],
            call.reduction == "batchmean",
        )
        wanted = Wanted(
            any(ctx.needs_input_grad[1 : 1 + students]),
            any(ctx.needs_input_grad[1 + students : 1 + students + teachers]),
            not call.detach_teacher,
        )
        saved = Saved(losses, statistics, inverse_valid)
        gradients: list[Any] = backward(upstream, heads, call.settings, saved, wanted, call.impl)
        if not wanted.student:
            gradients = [None] * students + gradients
        return (None, *gradients, *([None] * (len(tensors) - len(gradients))))


def checked_logits(
    student: Any, teacher: Any, suffix: str, names: tuple[str, str] = ("student_logits", "teacher_logits")
) -> None:
    """Raise unless ``student`` is (N, K), (N, K, W) or (N, K, H, W) and ``teacher`` (or None) is alike."""
    student_name, teacher_name = f"{names[0]}{suffix}", f"{names[1]}{suffix}"
    _checks.floating_tensor(student, student_name)
    if not 2 <= student.dim() <= 4:
        raise ValueError(
            f"{student_name} has shape {tuple(student.shape)}, but (N, K), (N, K, W) or (N, K, H, W) with the classes on "
            "axis 1 was wanted; flatten further axes into one."
        )
    if student.shape[1] == 0:
        raise ValueError(f"{student_name} has shape {tuple(student.shape)}, but at least one class was wanted.")
    if teacher is None:
        return
    _checks.floating_tensor(teacher, teacher_name)
    if teacher.shape != student.shape:
        hint = (
            "the two heads must score the same classes"
            if teacher.dim() == student.dim() and teacher.shape[1] != student.shape[1]
            else "student and teacher must see the same batch"
        )
        raise ValueError(
            f"{teacher_name} has shape {tuple(teacher.shape)}, but {student_name} has {tuple(student.shape)} and equal "
            f"shapes were wanted; {hint}."
        )
    _checks.same(student, student_name, teacher, teacher_name)


def logit_losses(
    student_logits: Any,
    teacher_logits: Any,
    targets: Any,
    temperature: float,
    label_smoothing: float,
    ignore_index: int,
    reduction: str,
    detach_teacher: bool,
    impl: str,
) -> tuple[Any, Any, Any]:
    """Checks, choice of implementation and autograd; (ce_student, ce_teacher, kd)."""
    temperature = _checks.positive_number(temperature, "temperature")
    label_smoothing = _checks.unit_interval(label_smoothing, "label_smoothing")
    if reduction not in REDUCTIONS:
        hint = " ('batchmean' is the mean over rows)" if reduction == "mean" else ""
        raise ValueError(f"reduction is {reduction!r}, but one of {', '.join(map(repr, REDUCTIONS))} was wanted{hint}.")
    several = isinstance(student_logits, tuple | list)
    students = tuple(student_logits) if several else (student_logits,)
    teachers: tuple[Any, ...] = ()
    if teacher_logits is not None:
        teachers = tuple(teacher_logits) if isinstance(teacher_logits, tuple | list) else (teacher_logits,)
        if len(teachers) != len(students):
            raise ValueError(
                f"teacher_logits has {len(teachers)} heads, but student_logits has {len(students)} and the same number "
                "was wanted."
            )
    if not students:
        raise ValueError("student_logits is empty, but at least one head of shape (N, K) was wanted.")
    for head, student in enumerate(students):
        suffix = f"[{head}]" if several else ""
        checked_logits(student, teachers[head] if teachers else None, suffix)
        if head:
            _checks.same(students[0], "student_logits[0]", student, f"student_logits{suffix}")
    first = students[0]
    name = _dispatch.choose_for("logits", impl, first)
    plain = _dispatch.is_plain(name)
    labels = checked_labels(targets, students, several, ignore_index, check_range=plain)
    settings = Settings(labels.mix, label_smoothing, _checks.whole_number(ignore_index, "ignore_index"), temperature)
    if plain:
        _dispatch.record("logits", name)
        return _reference(students, teachers, labels, settings, reduction, detach_teacher, several)
    if detach_teacher and not labels.first:
        teachers = tuple(teacher.detach() for teacher in teachers)
    teachers, labels = tuple(map(kept, teachers)), labels.kept()
    call = _Call(
        settings,
        reduction,
        detach_teacher,
        name,
        (len(students), len(teachers), len(labels.first), len(labels.second)),
    )
    parts: tuple[Tensor, Tensor, Tensor] = _LogitLosses.apply(call, *students, *teachers, *labels.first, *labels.second)
    if reduction == "none":
        return tuple(_unflatten(part, students, several) for part in parts)
    if several and len(students) == 1:
        return tuple(part.reshape(1) for part in parts)  # type: ignore[return-value]
    return parts


def _unflatten(rows: Tensor, students: Sequence[Tensor], several: bool) -> Any:
    pieces = []
    begin = 0
    for student in students:
        count = row_count(student)
        pieces.append(rows[begin : begin + count].view(student.shape[0], *student.shape[2:]))
        begin += count
    return pieces if several else pieces[0]


def reference_rows(
    student: Tensor,
    teacher: Tensor | None,
    target: Tensor | None,
    target_b: Tensor | None,
    settings: Settings,
    detach_teacher: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Unreduced (ce_student, ce_teacher, kd, weight) of one head by the plain formulas, each (N, ...)."""
    dtype = accumulate_dtype(student.dtype)
    zeros = torch.zeros((student.shape[0], *student.shape[2:]), dtype=dtype, device=student.device)
    kd = zeros
    if teacher is not None:
        kd = reference.tempered_divergence(
            student, teacher.detach() if detach_teacher else teacher, settings.temperature
        )
    if target is None:
        return zeros, zeros, kd, zeros + 1.0

    def cross_entropy(logits: Tensor) -> tuple[Tensor, Tensor]:
        if target.dtype.is_floating_point:
            return reference.probability_cross_entropy(logits, target, settings.label_smoothing), zeros + 1.0
        smoothing, ignored = settings.label_smoothing, settings.ignore_index
        loss, weight = reference.index_cross_entropy(logits, target, smoothing, ignored)
        if target_b is None:
            return loss, weight
        loss_b, weight_b = reference.index_cross_entropy(logits, target_b, smoothing, ignored)
        mix = settings.mix
        return mix * loss + (1.0 - mix) * loss_b, mix * weight + (1.0 - mix) * weight_b

    ce_student, weight = cross_entropy(student)
    ce_teacher = zeros if teacher is None else cross_entropy(teacher)[0]
    return ce_student, ce_teacher, kd, weight


def _reference(
    students: Sequence[Tensor],
    teachers: Sequence[Tensor],
    labels: Labels,
    settings: Settings,
    reduction: str,
    detach_teacher: bool,
    several: bool,
) -> tuple[Any, Any, Any]:
    heads = []
    for head, student in enumerate(students):
        ce_student, ce_teacher, kd, weight = reference_rows(
            student,
            teachers[head] if teachers else None,
            labels.first[head] if labels.first else None,
            labels.second[head] if labels.second else None,
            settings,
            detach_teacher,
        )
        if reduction == "none":
            heads.append((ce_student, ce_teacher, kd))
        elif reduction == "sum":
            heads.append((ce_student.sum(), ce_teacher.sum(), kd.sum()))
        else:
            heads.append(
                (weighted_mean(ce_student, weight), weighted_mean(ce_teacher, weight), kd.sum() / max(kd.numel(), 1))
            )
    if not several:
        return heads[0]
    columns = [[head[part] for head in heads] for part in range(3)]
    if reduction == "none":
        return columns[0], columns[1], columns[2]
    return torch.stack(columns[0]), torch.stack(columns[1]), torch.stack(columns[2])
