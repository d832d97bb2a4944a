"""Losses of class maps that are predicted at low resolution and labelled at full resolution, as formulas.

Maps are interpolated bilinearly to the labels' size (align_corners=False), and every pixel there has a cross-entropy for each
network and the T^2-scaled divergence. Here are also the groups of arguments that the raw functions take.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from frskd_fast.reference.dtypes import accumulate_dtype
from frskd_fast.reference.logits import tempered_divergence


class MapSettings(NamedTuple):
    """The numbers of one call; all plain Python, so that a traced graph holds them as constants."""

    height: int  # of the labels and losses, at least that of the maps
    width: int
    label_smoothing: float
    ignore_index: int
    temperature: float


class Maps(NamedTuple):
    """The tensors of one call."""

    student: Tensor  # (N, K, h, w)
    teacher: Tensor | None  # the same
    targets: Tensor | None  # (N, H, W) int64
    class_weights: Tensor | None  # (K,), contiguous, in the accumulate dtype


class WantedGradients(NamedTuple):
    """Which gradients are computed. Absent terms have none: those of a cross-entropy need labels."""

    student_gradient: bool
    teacher_gradient: bool
    kd_to_teacher: bool  # whether the divergence reaches the teacher; only where that has a gradient


class GradientTerm(NamedTuple):
    """One of the gradient maps that a pass over the pixels yields."""

    loss: int  # 0 ce_student, 1 ce_teacher, 2 kd
    of_teacher: bool  # whether it is the gradient of the teacher's maps


def gradient_terms(maps: Maps, wanted: WantedGradients) -> list[GradientTerm]:
    """The gradient maps of one call, in the order in which raw functions return them."""
    terms = []
    if wanted.student_gradient and maps.targets is not None:
        terms.append(GradientTerm(0, False))
    if wanted.student_gradient and maps.teacher is not None:
        terms.append(GradientTerm(2, False))
    if wanted.teacher_gradient and maps.targets is not None:
        terms.append(GradientTerm(1, True))
    if wanted.teacher_gradient and wanted.kd_to_teacher:
        terms.append(GradientTerm(2, True))
    return terms


def interpolated(maps: Tensor, height: int, width: int) -> Tensor:
    """(N, K, h, w) -> (N, K, height, width), bilinear, align_corners=False, in the accumulate dtype."""
    wide = maps.to(accumulate_dtype(maps.dtype))
    if wide.shape[0] == 0:
        return wide.sum((2, 3), keepdim=True).expand(-1, -1, height, width)
    return F.interpolate(wide, size=(height, width), mode="bilinear", align_corners=False)


def weighted_cross_entropy(
    logits: Tensor, labels: Tensor, class_weights: Tensor | None, label_smoothing: float, ignore_index: int
) -> tuple[Tensor, Tensor]:
    """CE = -(1 - s) w_y log p_y - s / K sum_k w_k log p_k of each pixel, and what it counts in a mean: w_y, 0 where ignored.

    A label outside [0, K) that is not ignored gives NaN: on a device it must not end the process.
    """
    log_probability = torch.log_softmax(logits, 1)
    weights = class_weights if class_weights is not None else logits.new_ones(logits.shape[1])
    kept = labels != ignore_index
    known = (labels >= 0) & (labels < logits.shape[1])
    label = labels.where(known, 0)
    weight = weights[label].masked_fill(~known & kept, float("nan"))
    loss = -(1.0 - label_smoothing) * weight * log_probability.gather(1, label.unsqueeze(1)).squeeze(1)
    if label_smoothing > 0.0:
        uniform = (weights.view(1, -1, 1, 1) * log_probability).sum(1)
        loss = loss - label_smoothing / logits.shape[1] * uniform
    return loss.masked_fill(~kept, 0.0), weight.masked_fill(~kept, 0.0)


def pixel_losses(maps: Maps, settings: MapSettings, detach_teacher: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(ce_student, ce_teacher, kd) of each pixel and what it counts in the cross-entropies' means, each (N, H, W)."""
    size = settings.height, settings.width
    student = interpolated(maps.student, *size)
    teacher = None if maps.teacher is None else interpolated(maps.teacher, *size)
    ce_student = ce_teacher = kd = weight = student.new_zeros((student.shape[0], *size))
    if teacher is not None:
        kd = tempered_divergence(student, teacher.detach() if detach_teacher else teacher, settings.temperature)
    if maps.targets is not None:
        rule = maps.targets, maps.class_weights, settings.label_smoothing, settings.ignore_index
        ce_student, weight = weighted_cross_entropy(student, *rule)
        if teacher is not None:
            ce_teacher, _ = weighted_cross_entropy(teacher, *rule)
    return ce_student, ce_teacher, kd, weight


def inverse_of(weight: Tensor) -> Tensor:
    """1 / weight, 0 where that is 0: no pixel counts then."""
    return torch.where(weight == 0, 0.0, 1.0 / weight)


def reduced(losses: Sequence[Tensor], weight: Tensor, reduction: str) -> tuple[Tensor, Tensor, Tensor]:
    """The three terms by "mean" (cross-entropies: sum / sum of weights; divergence: over all pixels), "sum" or "none"."""
    ce_student, ce_teacher, kd = losses
    if reduction == "none":
        return ce_student, ce_teacher, kd
    if reduction == "sum":
        return ce_student.sum(), ce_teacher.sum(), kd.sum()
    inverse = inverse_of(weight.sum())
    return ce_student.sum() * inverse, ce_teacher.sum() * inverse, kd.sum() / max(kd.numel(), 1)
