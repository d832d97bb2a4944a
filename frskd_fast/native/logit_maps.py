"""Raw functions of ``logit_maps`` in the compiled library."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from frskd_fast.reference.dtypes import accumulate_dtype
from frskd_fast.reference.logit_maps import Maps, MapSettings, WantedGradients, gradient_terms
from frskd_fast.reference.logits import check_label_range

DEVICES = ("cpu",)

_ops = torch.ops.frskd_fast_native


def _check_labels(maps: Maps, settings: MapSettings, total: Tensor) -> None:
    """Raises where NaN is the sign of a label that is no class: the kernel finds it where it reads the label anyway."""
    if maps.targets is not None and math.isnan(total.item()):
        check_label_range(maps.targets, maps.student.shape[1], settings.ignore_index, "targets")


def sums(maps: Maps, settings: MapSettings, wanted: WantedGradients) -> tuple[Tensor, list[Tensor]]:
    """The sums (4,) and the gradients of `gradient_terms` (docs/contracts.md)."""
    dtype = accumulate_dtype(maps.student.dtype)
    totals = torch.empty(4, dtype=dtype)
    gradients: list[Tensor] = []
    given: list[Tensor | None] = [None] * 4  # of ce_student, kd_student, ce_teacher, kd_teacher
    for term in gradient_terms(maps, wanted):
        like = maps.teacher if term.of_teacher and maps.teacher is not None else maps.student
        gradients.append(torch.empty_like(like, dtype=dtype))
        given[2 * term.of_teacher + (term.loss == 2)] = gradients[-1]
    _ops.logit_maps_sums.default(*maps, *settings, totals, *given)
    _check_labels(maps, settings, totals[3])
    return totals, gradients


def pixels(maps: Maps, settings: MapSettings) -> tuple[Tensor, Tensor, Tensor]:
    """ce_student, ce_teacher and kd of each pixel."""
    shape = maps.student.shape[0], settings.height, settings.width
    dtype = accumulate_dtype(maps.student.dtype)
    ce_student, ce_teacher, kd = (torch.empty(shape, dtype=dtype) for _ in range(3))
    _ops.logit_maps_pixels.default(*maps, *settings, [ce_student, ce_teacher, kd])
    _check_labels(maps, settings, ce_student.sum())
    return ce_student, ce_teacher, kd


def pixels_backward(
    grads: Sequence[Tensor], maps: Maps, settings: MapSettings, wanted: WantedGradients
) -> list[Tensor]:
    """Gradients of the student's and of the teacher's maps, as wanted, in their dtype."""
    dtype = accumulate_dtype(maps.student.dtype)
    student = torch.empty_like(maps.student, dtype=dtype) if wanted.student_gradient else None
    teacher = (
        torch.empty_like(maps.teacher, dtype=dtype) if wanted.teacher_gradient and maps.teacher is not None else None
    )
    _ops.logit_maps_pixels_backward.default(
        [grad.contiguous() for grad in grads],
        *maps,
        *settings,
        wanted.teacher_gradient and wanted.kd_to_teacher,
        student,
        teacher,
    )
    return [gradient.to(maps.student.dtype) for gradient in (student, teacher) if gradient is not None]
