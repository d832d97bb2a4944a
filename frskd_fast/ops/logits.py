"""Operation ``logits``: cross-entropy of student and teacher and the T^2-scaled KL, from one read of the raw logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from frskd_fast import _dispatch
from frskd_fast.ops import _checks, _library
from frskd_fast.ops._autograd import once_differentiable
from frskd_fast.reference import logits as reference
from frskd_fast.reference.combine import weighted_mean
from frskd_fast.reference.dtypes import accumulate_dtype

REDUCTIONS = ("batchmean", "sum", "none")
_LABEL_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


class Settings(NamedTuple):
    """The numbers of one call; all plain Python, so that a traced graph holds them as constants."""

    mix: float
    label_smoothing: float
    ignore_index: int
    temperature: float


def kept(tensor: Tensor) -> Tensor:
    """``tensor``, or a copy of one made under ``inference_mode`` (a frozen teacher's), which autograd refuses to keep."""
    if torch.compiler.is_compiling() or not tensor.is_inference() or torch.is_inference_mode_enabled():
        return tensor
    return tensor.clone()


class Labels(NamedTuple):
    """Targets of every head: class indices or probabilities, and the second indices of a two-label mix."""

    first: tuple[Tensor, ...]
    second: tuple[Tensor, ...]
    mix: float

    def kept(self) -> Labels:
        """The same labels, as tensors that autograd keeps."""
        return Labels(tuple(map(kept, self.first)), tuple(map(kept, self.second)), self.mix)


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


# By whether there are targets, the upstream gradients of (ce_student, ce_teacher, kd) that the latest backward of a small
# call was given. They are the weights of a training objective, and those rarely change from one step to the next.
_expected_upstream = {True: (1.0, 1.0, 1.0), False: (0.0, 0.0, 1.0)}


class _SmallLogitLosses(torch.autograd.Function):
    """Scalars (ce_student, ce_teacher, kd) of one small head, with the gradients computed along with them.

    The forward kernel writes the gradients for the upstream gradients that it expects: one read of the logits and one set of
    exponentials, and in the smallest calls half of the operations. Where others come, backward runs the same kernel again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        settings: Settings,
        mean: bool,
        student: Tensor,
        teacher: Tensor,
        targets: Tensor | None,
        targets_b: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        _dispatch.record("logits", "cpu")
        ctx.settings = (*settings, mean)
        ctx.expected = _expected_upstream[targets is not None]
        ctx.need_teacher = ctx.needs_input_grad[3] and targets is not None
        parts: tuple[Tensor, Tensor, Tensor]
        parts, ctx.gradients = _dispatch.raw("logits", "cpu").forward_with_gradients(
            student, teacher, targets, targets_b, *ctx.settings, ctx.expected, ctx.need_teacher
        )
        ctx.save_for_backward(student, teacher, targets, targets_b)
        if targets is None:
            ctx.mark_non_differentiable(parts[0], parts[1])
        return parts

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        student, teacher, targets, targets_b = ctx.saved_tensors
        upstream = grads[0].item(), grads[1].item(), grads[2].item()
        # Handed out once: whoever gets a gradient may go on writing into it.
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None or upstream != ctx.expected:
            gradients = None  # not to be held beside the new ones
            _expected_upstream[targets is not None] = upstream
            _, gradients = _dispatch.raw("logits", "cpu").forward_with_gradients(
                student, teacher, targets, targets_b, *ctx.settings, upstream, ctx.need_teacher
            )
        return None, None, gradients[0], gradients[1], None, None


# Elements of the student's logits up to which gradients are computed along with the losses. Up to here that is 1.7 to 1.9 times
# as fast as two passes where the expected upstream gradients come, and little slower where others do (docs/performance.md).
_SMALL = 1 << 18
_SMALL_CLASSES = 1024  # kLargestFusedClasses of the kernels
_PLAIN = (Tensor, torch.nn.Parameter)


def _is_small(
    student: Any, teacher: Any, targets: Any, targets_b: Any, reduction: str, detach_teacher: bool, impl: str
) -> bool:
    """Whether ``_SmallLogitLosses`` serves the call. It says so of arguments not yet checked, but only of right ones."""
    if torch.compiler.is_compiling() or not (
        # No subclass: those of tracers and of autograd transforms go the general way.
        type(student) in _PLAIN
        and type(teacher) in _PLAIN
        and student.requires_grad
        and student.is_cpu
        and teacher.is_cpu
        and not teacher.is_inference()
        and student.dtype in _checks.FLOATING
        and teacher.dtype is student.dtype
        and student.layout is teacher.layout is torch.strided
    ):
        return False
    shape = student.shape
    if not (
        len(shape) == 2
        and teacher.shape == shape
        and 0 < shape[0] * shape[1] <= _SMALL
        and shape[1] <= _SMALL_CLASSES
        and student.is_contiguous()
        and teacher.is_contiguous()
        and detach_teacher
        and (reduction == "batchmean" or reduction == "sum")
        and torch.is_grad_enabled()
        and _dispatch.choose("logits", impl, "cpu", student.dtype) == "cpu"
    ):
        return False
    for labels in (targets, targets_b):
        if labels is None:
            continue
        if not (type(labels) is Tensor and labels.dtype is torch.int64 and labels.is_cpu) or labels.is_inference():
            return False
        if labels.layout is not torch.strided or labels.shape != shape[:1]:
            return False
    return True


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


def _class_indices(target: Tensor, logits: Tensor, name: str) -> Tensor:
    wanted = (logits.shape[0], *logits.shape[2:])
    if target.dtype not in _LABEL_DTYPES:
        raise TypeError(
            f"{name} has dtype {target.dtype}, but class indices (int64) or probabilities of shape {tuple(logits.shape)} "
            "were wanted; cast labels with .long()."
        )
    if tuple(target.shape) != wanted:
        raise ValueError(
            f"{name} has shape {tuple(target.shape)}, but one class index for each row, shape {wanted}, was wanted."
        )
    if target.device != logits.device:
        raise ValueError(
            f"{name} is on {target.device}, but the logits are on {logits.device}; move it with .to({str(logits.device)!r})."
        )
    return target if target.dtype == torch.int64 else target.long()


def _check_range(target: Tensor, classes: int, ignore_index: int, name: str) -> None:
    """On the CPU a label outside [0, K) is an error; on a device finding it would synchronise (the loss is NaN there)."""
    if target.device.type != "cpu" or torch.compiler.is_compiling():
        return
    wrong = (target < 0) | (target >= classes)
    wrong &= target != ignore_index
    if bool(wrong.any()):
        raise ValueError(
            f"{name} holds the label {int(target[wrong][0])}, but with {classes} classes a label from 0 to {classes - 1} "
            f"(or ignore_index={ignore_index}) was wanted."
        )


def _is_mix(targets: Any) -> bool:
    return (
        isinstance(targets, tuple | list)
        and len(targets) == 3
        and isinstance(targets[0], Tensor)
        and isinstance(targets[1], Tensor)
        and not (isinstance(targets[2], Tensor) and targets[2].dim() > 0)
    )


def checked_labels(
    targets: Any, students: Sequence[Tensor], several: bool, ignore_index: int, check_range: bool
) -> Labels:
    """Targets of every head in the raw contract's form."""
    heads = len(students)
    if targets is None:
        return Labels((), (), 1.0)
    mix = 1.0
    seconds: Any = None
    if _is_mix(targets):
        firsts, seconds, mix = targets[0], targets[1], _checks.unit_interval(targets[2], "targets[2] (lam)")
        firsts, seconds = (firsts,) * heads, (seconds,) * heads
        names = ["targets[0]"] * heads
    elif isinstance(targets, Tensor):
        firsts = (targets,) * heads
        names = ["targets"] * heads
    elif several and isinstance(targets, tuple | list) and len(targets) == heads:
        firsts = tuple(targets)
        names = [f"targets[{head}]" for head in range(heads)]
    else:
        raise TypeError(
            f"targets is a {type(targets).__name__}, but class indices, a tuple (targets_a, targets_b, lam), or "
            "probabilities of the logits' shape were wanted."
        )
    first: list[Tensor] = []
    second: list[Tensor] = []
    floating: set[bool] = set()
    for head, logits in enumerate(students):
        target = firsts[head]
        if not isinstance(target, Tensor):
            raise TypeError(f"{names[head]} is a {type(target).__name__}, but a torch.Tensor was wanted.")
        floating.add(target.dtype.is_floating_point)
        if target.dtype.is_floating_point and seconds is None:
            first.append(_probabilities(target, logits, names[head]))
            continue
        first.append(_class_indices(target, logits, names[head]))
        if check_range:
            _check_range(first[-1], logits.shape[1], ignore_index, names[head])
        if seconds is not None:
            second.append(_class_indices(seconds[head], logits, "targets[1]"))
            if check_range:
                _check_range(second[-1], logits.shape[1], ignore_index, "targets[1]")
    if len(floating) > 1:
        raise TypeError("targets mix class indices and probabilities over the heads, but one kind was wanted.")
    return Labels(tuple(first), tuple(second), mix)


def _probabilities(target: Tensor, logits: Tensor, name: str) -> Tensor:
    if target.shape != logits.shape:
        raise ValueError(
            f"{name} has dtype {target.dtype} and shape {tuple(target.shape)}, but probabilities need the logits' shape "
            f"{tuple(logits.shape)}; class indices need dtype int64."
        )
    if target.device != logits.device:
        raise ValueError(
            f"{name} is on {target.device}, but the logits are on {logits.device}; move it with .to({str(logits.device)!r})."
        )
    if target.requires_grad:
        raise ValueError(f"{name} requires grad, but no gradient flows to class probabilities; pass {name}.detach().")
    return target.to(accumulate_dtype(logits.dtype))


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
    parts: tuple[Tensor, Tensor, Tensor]
    if _is_small(student_logits, teacher_logits, targets, None, reduction, detach_teacher, impl):
        # Before the checks: with few logits, checking every argument takes as long as the kernel.
        settings = Settings(1.0, label_smoothing, _checks.whole_number(ignore_index, "ignore_index"), temperature)
        parts = _SmallLogitLosses.apply(
            settings, reduction == "batchmean", student_logits, teacher_logits, targets, None
        )
        return parts
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
    if len(students) == len(teachers) == 1:
        targets, targets_b = labels.first[0] if labels.first else None, labels.second[0] if labels.second else None
        if _is_small(students[0], teachers[0], targets, targets_b, reduction, detach_teacher, impl):
            parts = _SmallLogitLosses.apply(
                settings, reduction == "batchmean", students[0], teachers[0], targets, targets_b
            )
            return tuple(part.reshape(1) for part in parts) if several else parts  # type: ignore[return-value]
    counts = (len(teachers), len(labels.first), len(labels.second))
    parts = _LogitLosses.apply(
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
