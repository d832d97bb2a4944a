"""Operation ``logits``: cross-entropy of student and teacher and the T^2-scaled KL, from one read of the raw logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from frskd_fast import _dispatch
from frskd_fast.ops import _checks, _library
from frskd_fast.ops._autograd import once_differentiable
from frskd_fast.ops.labels import Labels, checked_labels, kept
from frskd_fast.reference import logits as reference
from frskd_fast.reference.combine import weighted_mean
from frskd_fast.reference.dtypes import accumulate_dtype

REDUCTIONS = ("batchmean", "sum", "none")


class Settings(NamedTuple):
    """The numbers of one call; all plain Python, so that a traced graph holds them as constants."""

    mix: float
    label_smoothing: float
    ignore_index: int
    temperature: float


def raw_forward(
    students: Sequence[Tensor],
    teachers: Sequence[Tensor],
    targets: Sequence[Tensor],
    targets_b: Sequence[Tensor],
    mix: float,
    label_smoothing: float,
    ignore_index: int,
    temperature: float,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Raw forward of implementation ``impl``: losses (4, R), statistics, inverse_valid (heads,)."""
    _dispatch.record("logits", impl)
    losses, statistics, inverse_valid = _dispatch.raw("logits", impl).forward(
        students, teachers, targets, targets_b, mix, label_smoothing, ignore_index, temperature
    )
    return losses, statistics, inverse_valid


def raw_backward(
    grads: Sequence[Tensor],
    grad_head_stride: int,
    grad_row_stride: int,
    weights: Sequence[float],
    mean_over_rows: bool,
    inverse_valid: Tensor,
    students: Sequence[Tensor],
    teachers: Sequence[Tensor],
    targets: Sequence[Tensor],
    targets_b: Sequence[Tensor],
    mix: float,
    label_smoothing: float,
    ignore_index: int,
    temperature: float,
    statistics: Tensor,
    losses: Tensor,
    kd_to_teacher: bool,
    need_student: bool,
    need_teacher: bool,
    impl: str,
) -> list[Tensor]:
    """Gradients of the students (if needed), then of the teachers (if needed).

    ``weights`` are those of (ce_student, ce_teacher, kd); means are over kept rows (CE) and all rows (KD) of a head.
    """
    scales: list[float] = []
    for student in students:
        rows = student.numel() // student.shape[1]
        scales += [weights[0], weights[1], weights[2] / max(rows, 1) if mean_over_rows else weights[2]]
    student_gradients, teacher_gradients = _dispatch.raw("logits", impl).backward(
        grads, grad_head_stride, grad_row_stride, scales, inverse_valid if mean_over_rows else None,
        students, teachers, targets, targets_b, mix, label_smoothing, ignore_index, temperature,
        statistics, losses, kd_to_teacher, need_student, need_teacher,
    )  # fmt: skip
    return (student_gradients or []) + (teacher_gradients or [])


def _fake_forward(
    students: Sequence[Tensor],
    teachers: Sequence[Tensor],
    targets: Sequence[Tensor],
    targets_b: Sequence[Tensor],
    mix: float,
    label_smoothing: float,
    ignore_index: int,
    temperature: float,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    first = students[0]
    dtype = accumulate_dtype(first.dtype)
    rows = sum(_rows(student) for student in students)
    saved = 4 if impl == "triton" else 6  # what an implementation saves for its backward is its own business
    return (
        first.new_empty((4, rows), dtype=dtype),
        first.new_empty((saved, rows), dtype=dtype),
        first.new_empty((len(students),), dtype=dtype),
    )


def _fake_backward(
    grads: Sequence[Tensor],
    grad_head_stride: int,
    grad_row_stride: int,
    weights: Sequence[float],
    mean_over_rows: bool,
    inverse_valid: Tensor,
    students: Sequence[Tensor],
    teachers: Sequence[Tensor],
    targets: Sequence[Tensor],
    targets_b: Sequence[Tensor],
    mix: float,
    label_smoothing: float,
    ignore_index: int,
    temperature: float,
    statistics: Tensor,
    losses: Tensor,
    kd_to_teacher: bool,
    need_student: bool,
    need_teacher: bool,
    impl: str,
) -> list[Tensor]:
    wanted = (list(students) if need_student else []) + (list(teachers) if need_teacher else [])
    return [torch.empty_like(logits) for logits in wanted]


_forward_operator = _library.register(
    "logits_forward(Tensor[] students, Tensor[] teachers, Tensor[] targets, Tensor[] targets_b, float mix, "
    "float label_smoothing, int ignore_index, float temperature, str impl) -> (Tensor, Tensor, Tensor)",
    raw_forward,
    _fake_forward,
)
_backward_operator = _library.register(
    "logits_backward(Tensor[] grads, int grad_head_stride, int grad_row_stride, float[] weights, bool mean_over_rows, "
    "Tensor inverse_valid, Tensor[] students, Tensor[] teachers, Tensor[] targets, Tensor[] targets_b, float mix, "
    "float label_smoothing, int ignore_index, float temperature, Tensor statistics, Tensor losses, bool kd_to_teacher, "
    "bool need_student, bool need_teacher, str impl) -> Tensor[]",
    raw_backward,
    _fake_backward,
)


def forward_call(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """``raw_forward``, through the registered operator while tracing."""
    result: tuple[Tensor, Tensor, Tensor] = (
        _forward_operator(*args) if torch.compiler.is_compiling() else raw_forward(*args)
    )
    return result


def backward_call(*args: Any) -> list[Tensor]:
    """``raw_backward``, through the registered operator while tracing."""
    result: list[Tensor] = _backward_operator(*args) if torch.compiler.is_compiling() else raw_backward(*args)
    return result


def _rows(logits: Tensor) -> int:
    rows = logits.shape[0]
    for size in logits.shape[2:]:
        rows = rows * size
    return rows


class _LogitLosses(torch.autograd.Function):
    """(ce_student, ce_teacher, kd): scalars for one head, (heads,) for several, flat (R,) when unreduced."""

    @staticmethod
    def forward(
        ctx: Any,
        heads: int,
        settings: Settings,
        reduction: str,
        detach_teacher: bool,
        impl: str,
        counts: tuple[int, int, int],  # how many teachers, targets and second targets follow the students
        *tensors: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        teacher_end = heads + counts[0]
        target_end = teacher_end + counts[1]
        students, teachers = list(tensors[:heads]), list(tensors[heads:teacher_end])
        targets, targets_b = list(tensors[teacher_end:target_end]), list(tensors[target_end:])
        losses, statistics, inverse_valid = forward_call(students, teachers, targets, targets_b, *settings, impl)
        ctx.save_for_backward(losses, statistics, inverse_valid, *tensors)
        ctx.settings = (heads, settings, reduction, detach_teacher, impl, counts)
        absent = (not targets, not targets or not teachers, not teachers)
        if reduction == "none":
            rows_of_parts = losses[0].clone(), losses[1].clone(), losses[2].clone()
            ctx.mark_non_differentiable(*(part for part, gone in zip(rows_of_parts, absent, strict=True) if gone))
            return rows_of_parts
        if heads == 1 and reduction == "batchmean" and not torch.compiler.is_compiling():
            # One kernel instead of ten small operations; a compiler fuses those by itself.
            none = losses.new_empty((0, 1))
            _, (ce_student, ce_teacher, kd) = _dispatch.raw("combine", impl).forward(
                none, losses, 1.0, 0.0, bool(targets), split=True
            )
            means: tuple[Tensor, Tensor, Tensor] = ce_student, ce_teacher, kd
            ctx.mark_non_differentiable(*(part for part, gone in zip(means, absent, strict=True) if gone))
            return means
        parts = []
        begin = 0
        for head, student in enumerate(students):
            rows = _rows(student)
            sums = losses[:3, begin : begin + rows].sum(1)
            begin = begin + rows
            if reduction == "batchmean":
                divisor = inverse_valid[head]
                parts.append((sums[0] * divisor, sums[1] * divisor, sums[2] / max(rows, 1)))
            else:
                parts.append((sums[0].clone(), sums[1].clone(), sums[2].clone()))
        result = parts[0]
        if heads > 1:
            result = (
                torch.stack([part[0] for part in parts]),
                torch.stack([part[1] for part in parts]),
                torch.stack([part[2] for part in parts]),
            )
        ctx.mark_non_differentiable(*(part for part, gone in zip(result, absent, strict=True) if gone))
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        heads, settings, reduction, detach_teacher, impl, counts = ctx.settings
        losses, statistics, inverse_valid, *tensors = ctx.saved_tensors
        teacher_end = heads + counts[0]
        target_end = teacher_end + counts[1]
        need_student = any(ctx.needs_input_grad[6 : 6 + heads])
        need_teacher = any(ctx.needs_input_grad[6 + heads : 6 + teacher_end])
        has_teacher, has_targets = counts[0] > 0, counts[1] > 0
        weights = [float(has_targets), float(has_targets and has_teacher), float(has_teacher)]
        upstream = [grad.reshape(-1) for grad in grads]
        strides = (0, 1) if reduction == "none" else (0, 0) if heads == 1 else (1, 0)
        gradients = backward_call(
            upstream, *strides, weights, reduction == "batchmean", inverse_valid,
            tensors[:heads], tensors[heads:teacher_end], tensors[teacher_end:target_end], tensors[target_end:],
            *settings, statistics, losses, not detach_teacher, need_student, need_teacher, impl,
        )  # fmt: skip
        students: list[Any] = gradients[:heads] if need_student else [None] * heads
        teachers: list[Any] = gradients[heads if need_student else 0 :] if need_teacher else [None] * counts[0]
        labels = [None] * (len(tensors) - teacher_end)
        return (None, None, None, None, None, None, *students, *teachers, *labels)


def checked_logits(student: Any, teacher: Any, suffix: str) -> None:
    """Raise unless ``student`` is (N, K), (N, K, W) or (N, K, H, W) and ``teacher`` (or None) is alike."""
    student_name, teacher_name = f"student_logits{suffix}", f"teacher_logits{suffix}"
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
    labels = checked_labels(targets, students, several, ignore_index, check_range=name == "reference")
    settings = Settings(labels.mix, label_smoothing, _checks.whole_number(ignore_index, "ignore_index"), temperature)
    if name == "reference":
        if not torch.compiler.is_compiling():
            _dispatch.record("logits", name)
        return _reference(students, teachers, labels, settings, reduction, detach_teacher, several)
    if detach_teacher and not labels.first:
        teachers = tuple(teacher.detach() for teacher in teachers)
    teachers, labels = tuple(map(kept, teachers)), labels.kept()
    counts = (len(teachers), len(labels.first), len(labels.second))
    parts: tuple[Tensor, Tensor, Tensor] = _LogitLosses.apply(
        len(students),
        settings,
        reduction,
        detach_teacher,
        name,
        counts,
        *students,
        *teachers,
        *labels.first,
        *labels.second,
    )
    if reduction == "none":
        return tuple(_unflatten(part, students, several) for part in parts)
    if several and len(students) == 1:
        return tuple(part.reshape(1) for part in parts)  # type: ignore[return-value]
    return parts


def _unflatten(rows: Tensor, students: Sequence[Tensor], several: bool) -> Any:
    pieces = []
    begin = 0
    for student in students:
        count = _rows(student)
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
