"""FRSKD's objective for semantic segmentation (Ji et al., CVPR 2021, arXiv 2103.08273)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from frskd_fast import _dispatch
from frskd_fast.losses.base import Loss, check_beside_logits, weight_tensor
from frskd_fast.ops import _checks, attention, logit_maps

__all__ = ["SegmentationLoss", "SegmentationLossParts"]


class SegmentationLossParts(NamedTuple):
    """What ``SegmentationLoss(..., return_parts=True)`` returns: scalars, all but ``loss`` detached and unweighted."""

    loss: Tensor
    ce_student: Tensor
    ce_teacher: Tensor
    kd: Tensor
    attention: Tensor


class SegmentationLoss(Loss[SegmentationLossParts]):
    """CE(o_s) + CE(o_t) + ramp * (alpha * KD + beta * sum_l AT_l), o_s and o_t the maps at the labels' size (H, W).

    The maps come at low resolution and are upsampled bilinearly (``align_corners=False``) as part of the computation; nothing
    of K channels at full resolution is ever stored.
    ``alpha`` multiplies KD = T^2 / (N * H * W) * sum over all pixels and classes of p_t (log p_t - log p_s),
    p = softmax(o / temperature). Pixels of label ``ignore_index`` count in KD, and not in the cross-entropies, which are means
    over the other pixels (0 where there are none).
    ``beta`` multiplies the attention transfer of `FRSKDLoss`, summed over the levels.
    KD and AT are detached from the self-teacher; its cross-entropy is not.

    Args:
        alpha: weight of KD, finite; 0 skips it.
        beta: weight of the summed attention terms, finite; 0 skips them.
        temperature: T > 0 of both softmaxes of KD.
        ignore_index: class index whose pixels do not count in the cross-entropies.
        class_weights: K weights of the classes in both cross-entropies, as in `torch.nn.functional.cross_entropy`; None for 1.
        label_smoothing: in [0, 1], of both cross-entropies.
        impl: ``"auto"``, ``"reference"``, ``"cpu"`` or ``"triton"``.

    Raises:
        TypeError, ValueError: a sentence naming the argument, what came and what was wanted.
        RuntimeError: when ``impl`` cannot run here.

    Example:
        >>> import torch
        >>> from frskd_fast.losses import SegmentationLoss
        >>> maps = [torch.zeros(2, 21, 8, 8, requires_grad=True), torch.zeros(2, 21, 8, 8)]
        >>> feats = [torch.ones(2, 64, 8, 8, requires_grad=True)], [torch.ones(2, 64, 8, 8)]
        >>> loss = SegmentationLoss()(*maps, *feats, torch.zeros(2, 32, 32).long(), ramp=0.5)
        >>> round(loss.item(), 4)  # two cross-entropies of ln(21)
        6.089
        >>> loss.backward()

    Source: FRSKD's released segmentation losses.
    """

    shown = ("alpha", "beta", "temperature", "ignore_index", "impl")
    class_weights: Tensor | None

    def __init__(
        self,
        alpha: float = 1.0,
        beta: float = 50.0,
        temperature: float = 1.0,
        ignore_index: int = 255,
        *,
        class_weights: Tensor | Sequence[float] | None = None,
        label_smoothing: float = 0.0,
        impl: str = "auto",
    ) -> None:
        super().__init__()
        self.alpha = _checks.finite_number(alpha, "alpha")
        self.beta = _checks.finite_number(beta, "beta")
        self.temperature = _checks.positive_number(temperature, "temperature")
        self.ignore_index = _checks.whole_number(ignore_index, "ignore_index")
        self.label_smoothing = _checks.unit_interval(label_smoothing, "label_smoothing")
        self.impl = _dispatch.check_name(impl, "the argument impl")
        # A setting and not a state, so not in checkpoints.
        self.register_buffer("class_weights", _weights_of_classes(class_weights), persistent=False)

    def forward(
        self,
        student_maps: Tensor,
        teacher_maps: Tensor | None,
        student_feats: Any,
        teacher_feats: Any,
        targets: Tensor,
        *,
        ramp: float | Tensor = 1.0,
        return_parts: bool = False,
    ) -> Tensor | SegmentationLossParts:
        """Return the loss as a float32 (float64) scalar, or its parts; those of weight 0 are 0.

        Args:
            student_maps: (N, K, h, w) raw class scores of the student; float32, bfloat16, float16 or float64, any strides.
            teacher_maps: (N, K, h, w) of the self-teacher, same dtype and device. None: there is none, and the loss is
                CE(o_s).
            student_feats: list, tuple or dict of L feature maps (N, C_l, H_l, W_l); one dtype, any strides.
            teacher_feats: L maps (N, D_l, H_l, W_l) of the self-teacher; channels may differ, pixels may not.
            targets: class indices (N, H, W) with H >= h and W >= w.
            ramp: weight of both distillation terms, a number (0 skips them) or a tensor of one element that gets no gradient,
                for example one that is written in place as training goes on.
            return_parts: return ``SegmentationLossParts`` instead of the scalar.
        """
        if targets is None:
            raise TypeError("targets is None, but class indices (N, H, W) were wanted.")
        logit_maps.checked_maps(student_maps, teacher_maps)
        if isinstance(ramp, Tensor):
            ramp = weight_tensor(ramp, "ramp", student_maps)
        else:
            ramp = _checks.finite_number(ramp, "ramp")
        distils = teacher_maps is not None and not (isinstance(ramp, float) and ramp == 0.0)
        if distils and self.alpha != 0.0:
            ce_student, ce_teacher, kd = self._map_losses(student_maps, teacher_maps, targets)
        else:
            ce_student, ce_teacher, kd = self._map_losses(student_maps, None, targets)
            if teacher_maps is not None:
                ce_teacher, _, _ = self._map_losses(teacher_maps, None, targets)
        transfer = torch.zeros_like(kd)
        if distils and self.beta != 0.0:
            students, teachers = attention.checked_pyramids(student_feats, teacher_feats, None)
            check_beside_logits(students[0], "student_feats[0]", student_maps, "student_maps")
            transfer = attention.attention_transfer(students, teachers, 2.0, "mean", None, True, self.impl)
        loss = ce_student + ce_teacher + ramp * (self.alpha * kd + self.beta * transfer)
        if not return_parts:
            return loss
        return SegmentationLossParts(loss, *(term.detach() for term in (ce_student, ce_teacher, kd, transfer)))

    def _map_losses(self, student: Tensor, teacher: Tensor | None, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """CE(student), CE(teacher) and KD at the labels' size; without a teacher the last two are 0."""
        return logit_maps.logit_map_losses(
            student, teacher, targets, None, self.temperature, self.class_weights, self.label_smoothing,
            self.ignore_index, "mean", True, self.impl,
        )  # fmt: skip


def _weights_of_classes(weights: Any) -> Tensor | None:
    if weights is None:
        return None
    try:
        return torch.as_tensor(weights) * 1.0  # whole numbers, too
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"class_weights is {weights!r}, but a number for each class was wanted.") from None
