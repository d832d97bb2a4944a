"""Operation ``logit_maps``: cross-entropies and divergence of low-resolution class maps under full-resolution labels.

No map of K channels at full resolution is ever in memory. Means and sums are linear in the losses of the pixels, so the pass
that computes them also yields the low-resolution gradient of each term: every exponential is taken once, and backward is a
weighted sum. With losses per pixel the upstream gradient is unknown until backward, which therefore recomputes them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from frskd_fast import _dispatch
from frskd_fast.ops import _checks, _table
from frskd_fast.ops._autograd import anchor, once_differentiable
from frskd_fast.ops.labels import LABEL_DTYPES, kept
from frskd_fast.reference import logit_maps as reference
from frskd_fast.reference.dtypes import accumulate_dtype
from frskd_fast.reference.logit_maps import Maps, MapSettings, WantedGradients, gradient_terms
from frskd_fast.reference.logits import check_label_range

REDUCTIONS = ("mean", "sum", "none")


@_table.register("logit_maps")
def sums(maps: Maps, settings: MapSettings, wanted: WantedGradients, impl: str) -> tuple[Tensor, list[Tensor]]:
    """The sums over all pixels (4,) of ce_student, ce_teacher, kd and the pixels' weights, and their gradients.

    The gradients are those of `gradient_terms`, like the maps but in the accumulate dtype.
    """
    dtype = accumulate_dtype(maps.student.dtype)
    gradients = [
        torch.empty_like(maps.teacher if term.of_teacher and maps.teacher is not None else maps.student, dtype=dtype)
        for term in gradient_terms(maps, wanted)
    ]
    return maps.student.new_empty((4,), dtype=dtype), gradients


@_table.register("logit_maps")
def pixels(maps: Maps, settings: MapSettings, impl: str) -> tuple[Tensor, Tensor, Tensor]:
    """ce_student, ce_teacher and kd of each pixel, (N, H, W); 0 where a term is absent."""
    student = maps.student
    shape = student.shape[0], settings.height, settings.width
    dtype = accumulate_dtype(student.dtype)
    return (
        student.new_empty(shape, dtype=dtype),
        student.new_empty(shape, dtype=dtype),
        student.new_empty(shape, dtype=dtype),
    )


@_table.register("logit_maps")
def pixels_backward(
    grads: Sequence[Tensor], maps: Maps, settings: MapSettings, wanted: WantedGradients, impl: str
) -> list[Tensor]:
    """Gradients of the student's and of the teacher's maps, as wanted, given those of the three losses, (N, H, W) each."""
    inputs = [
        *([maps.student] if wanted.student_gradient else []),
        *([maps.teacher] if wanted.teacher_gradient else []),
    ]
    return [torch.empty_like(one) for one in inputs if one is not None]


class _Call(NamedTuple):
    """Everything of a call that is no tensor."""

    settings: MapSettings
    wanted: WantedGradients
    reduction: str
    impl: str


def _mark_absent(ctx: Any, parts: Sequence[Tensor], maps: Maps) -> None:
    has_targets, has_teacher = maps.targets is not None, maps.teacher is not None
    present = (has_targets, has_targets and has_teacher, has_teacher)
    ctx.mark_non_differentiable(*(part for part, there in zip(parts, present, strict=True) if not there))


class _ReducedLosses(torch.autograd.Function):
    """(ce_student, ce_teacher, kd), scalars."""

    @staticmethod
    def forward(ctx: Any, call: _Call, *tensors: Any) -> tuple[Tensor, Tensor, Tensor]:
        maps, anchors = Maps(*tensors[:4]), tensors[4:]
        totals, gradients = sums(maps, call.settings, call.wanted, call.impl)
        ce_student, ce_teacher, kd, weight = totals.unbind()
        pixel_count = maps.student.shape[0] * call.settings.height * call.settings.width
        if call.reduction == "mean":
            inverse_weight = reference.inverse_of(weight)
            parts = ce_student * inverse_weight, ce_teacher * inverse_weight, kd / max(pixel_count, 1)
        else:
            inverse_weight = torch.ones_like(weight)
            parts = ce_student.clone(), ce_teacher.clone(), kd.clone()
        ctx.save_for_backward(inverse_weight, *gradients, *anchors)
        ctx.terms = gradient_terms(maps, call.wanted)
        ctx.kd_scale = 1.0 / max(pixel_count, 1) if call.reduction == "mean" else 1.0
        ctx.dtype = maps.student.dtype
        ctx.set_materialize_grads(False)  # the gradient of a term that nothing depends on may be NaN, and 0 times it
        _mark_absent(ctx, parts, maps)
        return parts

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        inverse_weight, *gradients = ctx.saved_tensors
        totals: list[Tensor | None] = [None, None]  # of the student, of the teacher
        for term, gradient in zip(ctx.terms, gradients, strict=False):
            grad = grads[term.loss]
            if grad is None:
                continue
            scale = grad * (ctx.kd_scale if term.loss == 2 else inverse_weight)
            total = totals[term.of_teacher]
            totals[term.of_teacher] = gradient * scale if total is None else total.addcmul_(gradient, scale)
        student, teacher = (None if total is None else total.to(ctx.dtype) for total in totals)
        return None, student, teacher, *([None] * (len(ctx.needs_input_grad) - 3))


class _PixelLosses(torch.autograd.Function):
    """(ce_student, ce_teacher, kd), each (N, H, W)."""

    @staticmethod
    def forward(ctx: Any, call: _Call, *tensors: Any) -> tuple[Tensor, Tensor, Tensor]:
        maps = Maps(*tensors)
        parts = pixels(maps, call.settings, call.impl)
        ctx.save_for_backward(*tensors)
        ctx.call = call
        ctx.set_materialize_grads(False)
        _mark_absent(ctx, parts, maps)
        return parts

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        call: _Call = ctx.call
        maps, wanted = Maps(*ctx.saved_tensors), call.wanted
        # Terms that nothing depends on are left out: NaN of theirs would spoil the others' gradients, times 0, too.
        teacher_alone = maps.teacher is not None and grads[0] is None and grads[2] is None
        if teacher_alone:
            assert maps.teacher is not None
            maps = maps._replace(student=maps.teacher)
            grads, wanted = (grads[1], None, None), WantedGradients(wanted.teacher_gradient, False, False)
        if grads[1] is None and grads[2] is None:
            maps, wanted = maps._replace(teacher=None), WantedGradients(wanted.student_gradient, False, False)
        if grads[0] is None and grads[1] is None:
            maps = maps._replace(targets=None)
        shape = maps.student.shape[0], call.settings.height, call.settings.width
        dtype = accumulate_dtype(maps.student.dtype)
        upstream = [maps.student.new_zeros(shape, dtype=dtype) if grad is None else grad for grad in grads]
        rest = iter(pixels_backward(upstream, maps, call.settings, wanted, call.impl))
        student = next(rest) if wanted.student_gradient else None
        teacher = next(rest) if wanted.teacher_gradient else None
        if teacher_alone:
            student, teacher = None, student
        return None, student, teacher, None, None


def checked_maps(student: Any, teacher: Any) -> None:
    """Raise unless ``student`` is a map (N, K, h, w) and ``teacher`` (or None) is alike."""
    _checks.feature_map(student, "student_maps")
    if teacher is None:
        return
    _checks.feature_map(teacher, "teacher_maps")
    if teacher.shape != student.shape:
        hint = (
            "both networks must score the same classes"
            if teacher.shape[1] != student.shape[1]
            else "both networks must see the same batch at the same resolution"
        )
        raise ValueError(
            f"teacher_maps has shape {tuple(teacher.shape)}, but student_maps has {tuple(student.shape)} and equal shapes "
            f"were wanted; {hint}."
        )
    _checks.same(student, "student_maps", teacher, "teacher_maps")


def _checked_size(size: Any) -> tuple[int, int]:
    if not isinstance(size, tuple | list) or len(size) != 2:
        raise TypeError(f"size is {size!r}, but (height, width) was wanted.")
    return _checks.whole_number(size[0], "size[0]"), _checks.whole_number(size[1], "size[1]")


def _checked_targets(targets: Any, student: Tensor, size: tuple[int, int] | None) -> Tensor:
    wanted = "class indices (int64) of shape (N, H, W)"
    if not isinstance(targets, Tensor):
        raise TypeError(f"targets is a {type(targets).__name__}, but {wanted} were wanted.")
    if targets.dtype not in LABEL_DTYPES:
        raise TypeError(f"targets has dtype {targets.dtype}, but {wanted} were wanted; cast labels with .long().")
    if targets.dim() != 3:
        raise ValueError(
            f"targets has shape {tuple(targets.shape)}, but {wanted} were wanted; a mask of one channel loses it by "
            ".squeeze(1), and one of colours must first be turned into class indices."
        )
    if targets.shape[0] != student.shape[0]:
        raise ValueError(
            f"targets has {targets.shape[0]} masks, but student_maps has {student.shape[0]} images and one mask for each "
            "was wanted."
        )
    if size is not None and tuple(targets.shape[1:]) != size:
        raise ValueError(
            f"size is {size}, but targets has shape {tuple(targets.shape)} and the size of its masks was wanted; leave "
            "size out where there are targets."
        )
    if targets.device != student.device:
        raise ValueError(
            f"targets is on {targets.device}, but student_maps is on {student.device}; move it with "
            f".to({str(student.device)!r})."
        )
    labels: Tensor = targets if targets.dtype == torch.int64 else targets.long()
    return labels


def _checked_class_weights(weights: Any, student: Tensor) -> Tensor:
    _checks.floating_tensor(weights, "class_weights")
    classes = student.shape[1]
    if tuple(weights.shape) != (classes,):
        raise ValueError(
            f"class_weights has shape {tuple(weights.shape)}, but one weight for each of the {classes} classes was wanted."
        )
    if weights.device != student.device:
        raise ValueError(
            f"class_weights is on {weights.device}, but student_maps is on {student.device}; move it with "
            f".to({str(student.device)!r})."
        )
    if weights.requires_grad:
        raise ValueError(
            "class_weights requires grad, but no gradient flows to class weights; pass class_weights.detach()."
        )
    numbers: Tensor = weights.to(accumulate_dtype(student.dtype))
    return numbers.contiguous()


def logit_map_losses(
    student_maps: Any,
    teacher_maps: Any,
    targets: Any,
    size: Any,
    temperature: float,
    class_weights: Any,
    label_smoothing: float,
    ignore_index: int,
    reduction: str,
    detach_teacher: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Checks, choice of implementation and autograd; (ce_student, ce_teacher, kd)."""
    temperature = _checks.positive_number(temperature, "temperature")
    label_smoothing = _checks.unit_interval(label_smoothing, "label_smoothing")
    ignore_index = _checks.whole_number(ignore_index, "ignore_index")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction is {reduction!r}, but one of {', '.join(map(repr, REDUCTIONS))} was wanted.")
    checked_maps(student_maps, teacher_maps)
    student: Tensor = student_maps
    teacher: Tensor | None = teacher_maps
    extent = None if size is None else _checked_size(size)
    labels = None if targets is None else _checked_targets(targets, student, extent)
    if labels is not None:
        height, width = labels.shape[1:]
    elif extent is not None:
        height, width = extent
    else:
        raise ValueError(
            "Neither targets nor size is given, but one of them must say to which size the maps are brought."
        )
    if height < student.shape[2] or width < student.shape[3]:
        raise ValueError(
            f"student_maps has shape {tuple(student.shape)}, but the labels are of {height} x {width} pixels, and maps that "
            "are not larger than the labels were wanted; resize the labels or predict at a lower resolution."
        )
    weights = None if class_weights is None else _checked_class_weights(class_weights, student)
    settings = MapSettings(height, width, label_smoothing, ignore_index, temperature)
    name = _dispatch.choose_for("logit_maps", impl, student)
    if _dispatch.is_plain(name):
        _dispatch.record("logit_maps", name)
        if labels is not None:
            check_label_range(labels, student.shape[1], ignore_index, "targets")
        *losses, weight = reference.pixel_losses(Maps(student, teacher, labels, weights), settings, detach_teacher)
        return reference.reduced(losses, weight, reduction)
    grad_enabled = torch.is_grad_enabled()
    kd_to_teacher = teacher is not None and not detach_teacher
    wanted = WantedGradients(
        grad_enabled and student.requires_grad,
        grad_enabled and teacher is not None and teacher.requires_grad and (labels is not None or kd_to_teacher),
        kd_to_teacher,
    )
    call = _Call(settings, wanted, reduction, name)
    function = _PixelLosses if reduction == "none" else _ReducedLosses
    if teacher is not None and not wanted.teacher_gradient:
        teacher = teacher.detach()
    tensors = [None if one is None else kept(one) for one in (student, teacher, labels, weights)]
    if reduction != "none" and grad_enabled:
        tensors += [anchor(one) for one in tensors[:2] if one is not None and one.requires_grad]
    parts: tuple[Tensor, Tensor, Tensor] = function.apply(call, *tensors)
    return parts
