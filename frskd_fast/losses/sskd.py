"""SSKD: the student learns the teacher's classes of rotated images and its similarities between them (Xu et al., ECCV 2020)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from frskd_fast import _dispatch
from frskd_fast.losses.base import Loss, zero_of
from frskd_fast.ops import _checks, logits, ranking, similarity
from frskd_fast.ops.labels import IGNORED, class_indices
from frskd_fast.reference.logits import check_label_range
from frskd_fast.reference.ranking import rank_of

__all__ = ["SSKDHeadLoss", "SSKDHeadLossParts", "SSKDLoss", "SSKDLossParts"]


class SSKDLossParts(NamedTuple):
    """What ``SSKDLoss(..., return_parts=True)`` returns: scalars, all but ``loss`` detached and unweighted."""

    loss: Tensor
    ce: Tensor
    kd: Tensor
    transformed: Tensor
    similarity: Tensor


class SSKDHeadLossParts(NamedTuple):
    """What ``SSKDHeadLoss(..., return_parts=True)`` returns: scalars; ``accuracy``, from 0 to 1, is detached."""

    loss: Tensor
    accuracy: Tensor


def _rotated(rows: Tensor) -> Tensor:
    """(4N, K) -> (N, K, 3), a view of the rows 4n + 1 to 4n + 3 with the columns on axis 1."""
    views: Tensor = rows.unflatten(0, (rows.shape[0] // 4, 4))
    return views[:, 1:].transpose(1, 2)


class SSKDLoss(Loss[SSKDLossParts]):
    """ce_weight * CE + kd_weight * KD + transformed_weight * KD_rotated + similarity_weight * KD_similarity.

    Outputs are those of N images in four rotations, row 4n + r of image n turned r times, as `mixing.rotate4` orders them.

    * CE and KD are those of the N upright rows.
    * KD_rotated is `ranked_kd_loss` of the 3N rotated rows' logits; the correct column is the class of the image.
    * KD_similarity is `ranked_kd_loss` of their cosines with the N upright rows' projections, (3N, N), student against teacher;
      the correct column is the image itself.

    Projections get a gradient from KD_similarity alone, the teacher from nothing. A term of weight 0 is not computed, and with
    a ratio of 1 nothing is ranked. Arithmetic is float32 (float64 for float64 inputs) whatever the dtype of the inputs.

    Args:
        ce_weight, kd_weight, transformed_weight, similarity_weight: finite. The defaults are those of the released code; the
            paper's supplement and its preprint list others.
        kd_temperature, transformed_temperature, similarity_temperature: T > 0 of the terms KD, KD_rotated, KD_similarity.
        transformed_ratio, similarity_ratio: share in [0, 1] of the rows on which the teacher is wrong that the student still
            learns; all on which it is right are kept.
        label_smoothing: in [0, 1], of CE.
        ignore_index: class index whose images do not count in CE. The other terms keep them; where rotated rows are ranked by
            class, theirs rank last.
        impl: ``"auto"``, ``"reference"``, ``"cpu"``, ``"triton"`` or ``"cuda"``.

    Raises:
        TypeError, ValueError: a sentence naming the argument, what came and what was wanted.
        RuntimeError: when ``impl`` cannot run here.

    Example:
        >>> import torch
        >>> from frskd_fast.losses import SSKDLoss
        >>> student_logits = torch.zeros(8, 10, requires_grad=True)  # two images
        >>> projections = torch.ones(8, 16)
        >>> loss = SSKDLoss()(student_logits, torch.zeros(8, 10), projections, projections, torch.tensor([3, 1]))
        >>> round(loss.item(), 4)  # a tenth of ln(10)
        0.2303
        >>> loss.backward()

    Source: Xu et al., ECCV 2020 (arXiv 2006.07114), eq. 6 to 9, as released; ties in a ranking go by index.
    """

    passes = "one"
    shown = (
        "ce_weight",
        "kd_weight",
        "transformed_weight",
        "similarity_weight",
        "kd_temperature",
        "transformed_temperature",
        "similarity_temperature",
        "transformed_ratio",
        "similarity_ratio",
        "impl",
    )

    def __init__(
        self,
        ce_weight: float = 0.1,
        kd_weight: float = 0.9,
        transformed_weight: float = 2.7,
        similarity_weight: float = 10.0,
        kd_temperature: float = 4.0,
        transformed_temperature: float = 4.0,
        similarity_temperature: float = 0.5,
        transformed_ratio: float = 1.0,
        similarity_ratio: float = 0.75,
        *,
        label_smoothing: float = 0.0,
        ignore_index: int = -100,
        impl: str = "auto",
    ) -> None:
        super().__init__()
        self.ce_weight = _checks.finite_number(ce_weight, "ce_weight")
        self.kd_weight = _checks.finite_number(kd_weight, "kd_weight")
        self.transformed_weight = _checks.finite_number(transformed_weight, "transformed_weight")
        self.similarity_weight = _checks.finite_number(similarity_weight, "similarity_weight")
        self.kd_temperature = _checks.positive_number(kd_temperature, "kd_temperature")
        self.transformed_temperature = _checks.positive_number(transformed_temperature, "transformed_temperature")
        self.similarity_temperature = _checks.positive_number(similarity_temperature, "similarity_temperature")
        self.transformed_ratio = _checks.unit_interval(transformed_ratio, "transformed_ratio")
        self.similarity_ratio = _checks.unit_interval(similarity_ratio, "similarity_ratio")
        self.label_smoothing = _checks.unit_interval(label_smoothing, "label_smoothing")
        self.ignore_index = _checks.whole_number(ignore_index, "ignore_index")
        self.impl = _dispatch.check_name(impl, "the argument impl")

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        student_projections: Tensor | None,
        teacher_projections: Tensor | None,
        targets: Tensor,
        *,
        return_parts: bool = False,
    ) -> Tensor | SSKDLossParts:
        """Return the loss as a float32 (float64) scalar, or its parts; a part of weight 0, or of no images, is 0.

        Args:
            student_logits: (4N, K) raw logits; float32, bfloat16, float16 or float64, any strides.
            teacher_logits: (4N, K), same dtype and device.
            student_projections: (4N, D) of the student's projection head; its dtype may be another, but float64 only with
                logits in float64. May be None where ``similarity_weight`` is 0.
            teacher_projections: (4N, E) of the teacher's, or None, too.
            targets: class indices (N,).
            return_parts: return ``SSKDLossParts`` instead of the scalar.
        """
        self._check(student_logits, teacher_logits, student_projections, teacher_projections)
        upright = student_logits[::4]
        targets = class_indices(targets, upright, "targets", "class indices (int64), neither a mix nor probabilities,")
        if self.ce_weight == 0.0:  # or else they are checked where the cross-entropy reads them
            check_label_range(targets, upright.shape[1], self.ignore_index, "targets")
        terms: dict[str, Tensor] = {}
        if upright.shape[0] > 0:
            terms = self._class_terms(student_logits, teacher_logits.detach(), targets)
            if self.similarity_weight != 0.0:
                terms["similarity"] = similarity.view_divergence(
                    student_projections,
                    teacher_projections,
                    self.similarity_temperature,
                    self.similarity_ratio,
                    self.impl,
                )
        loss: Tensor | None = None
        for name, term in terms.items():
            weight = getattr(self, f"{name}_weight")
            loss = weight * term if loss is None else loss.add(term, alpha=weight)
        if loss is None:
            loss = zero_of(student_logits)
            if student_projections is not None:
                loss = loss + zero_of(student_projections)
        if not return_parts:
            return loss
        names = SSKDLossParts._fields[1:]
        return SSKDLossParts(loss, *(terms[name].detach() if name in terms else loss.new_zeros(()) for name in names))

    def _class_terms(self, student: Tensor, teacher: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """CE, KD and KD_rotated by name, without those of weight 0."""
        wants_ce, wants_kd = self.ce_weight != 0.0, self.kd_weight != 0.0
        wants_upright, wants_rotated = wants_ce or wants_kd, self.transformed_weight != 0.0
        settings = self.label_smoothing, self.ignore_index
        ce = kd = transformed = None
        if wants_upright and wants_rotated and self.kd_temperature == self.transformed_temperature:
            # One read of all rows, of which the rotated ones have no label.
            labels = None
            if wants_ce:
                labels = targets.new_full(student.shape[:1], self.ignore_index)
                labels[::4] = targets
            ce_rows, _, kd_rows = logits.logit_losses(
                student, teacher, labels, self.kd_temperature, *settings, "none", True, self.impl
            )
            if wants_ce:
                ce = ce_rows.sum() / (targets != self.ignore_index).sum().clamp_min(1)
            by_view = kd_rows.unflatten(0, (targets.shape[0], 4))
            kd, *rotations = by_view.mean(0).unbind()
            if self.transformed_ratio == 1.0:
                transformed = (rotations[0] + rotations[1] + rotations[2]) / 3
            else:
                transformed = ranking.ranked_mean(
                    by_view[:, 1:], _rotated(teacher), self._correct(targets), self.transformed_ratio
                )
        else:
            if wants_upright:
                ce, _, kd = logits.logit_losses(
                    student[::4], teacher[::4] if wants_kd else None, targets if wants_ce else None, self.kd_temperature,
                    *settings, "batchmean", True, self.impl,
                )  # fmt: skip
            if wants_rotated:
                transformed = ranking.divergence(
                    _rotated(student), _rotated(teacher), self._correct(targets), self.transformed_temperature,
                    self.transformed_ratio, self.impl,
                )  # fmt: skip
        terms = (("ce", ce, wants_ce), ("kd", kd, wants_kd), ("transformed", transformed, wants_rotated))
        return {name: term for name, term, wanted in terms if wanted and term is not None}

    def _correct(self, targets: Tensor) -> Tensor:
        """The class by which the rotated rows of each image are ranked, (N, 1); none where the label is ignored."""
        if self.ignore_index >= 0:
            targets = targets.masked_fill(targets == self.ignore_index, IGNORED)
        return targets.unsqueeze(1)

    def _check(
        self, student_logits: Any, teacher_logits: Any, student_projections: Any, teacher_projections: Any
    ) -> None:
        logits.checked_logits(student_logits, teacher_logits, "")
        if teacher_logits is None:
            raise TypeError("teacher_logits is None, but the teacher's logits were wanted.")
        rows = student_logits.shape[0]
        if student_logits.dim() != 2 or rows % 4 != 0:
            raise ValueError(
                f"student_logits has shape {tuple(student_logits.shape)}, but (4N, K), four rows for each image in the "
                "order of mixing.rotate4, was wanted."
            )
        for projections, name in (
            (student_projections, "student_projections"),
            (teacher_projections, "teacher_projections"),
        ):
            if projections is None and self.similarity_weight == 0.0:
                continue
            _checks.floating_tensor(projections, name)
            if projections.shape[:1] != (rows,):
                raise ValueError(
                    f"{name} has shape {tuple(projections.shape)}, but student_logits has {rows} rows and as many were wanted."
                )
            if projections.device != student_logits.device:
                raise ValueError(
                    f"{name} is on {projections.device}, but student_logits is on {student_logits.device} and one device was "
                    "wanted."
                )
            if (projections.dtype == torch.float64) != (student_logits.dtype == torch.float64):
                raise TypeError(
                    f"{name} has dtype {projections.dtype}, but student_logits has {student_logits.dtype} and either both or "
                    "neither in float64 was wanted; cast one of them."
                )


class SSKDHeadLoss(Loss[SSKDHeadLossParts]):
    """CE(cos(rotated, upright), image): which of the N upright images is the rotated one, by the cosine of projections.

    The first stage of SSKD, which trains a projection head on a frozen teacher. There is no temperature: logits are the cosines
    themselves, in [-1, 1], so the loss stays near ln(N).

    Args:
        impl: ``"auto"``, ``"reference"``, ``"cpu"``, ``"triton"`` or ``"cuda"``.

    Raises:
        TypeError, ValueError: a sentence naming the argument, what came and what was wanted.
        RuntimeError: when ``impl`` cannot run here.

    Example:
        >>> import torch
        >>> from frskd_fast.losses import SSKDHeadLoss
        >>> projections = torch.eye(2).repeat_interleave(4, 0)  # all views of an image agree, those of two do not
        >>> loss, accuracy = SSKDHeadLoss()(projections, return_parts=True)
        >>> round(loss.item(), 4), accuracy.item()  # ln(1 + 1/e)
        (0.3133, 1.0)

    Source: Xu et al., ECCV 2020 (arXiv 2006.07114), eq. 2 and 3, as released: without the paper's temperature.
    """

    passes = "one"
    shown = ("impl",)

    def __init__(self, impl: str = "auto") -> None:
        super().__init__()
        self.impl = _dispatch.check_name(impl, "the argument impl")

    def forward(self, projections: Tensor, *, return_parts: bool = False) -> Tensor | SSKDHeadLossParts:
        """Return the loss as a float32 (float64) scalar, or its parts.

        Args:
            projections: (4N, D), row 4n + r of image n turned r times; float32, bfloat16, float16 or float64, any strides.
            return_parts: return ``SSKDHeadLossParts``; its ``accuracy`` is the share of the 3N rotated rows whose largest
                cosine is that with their own image; 0 of no rows.
        """
        cosines = similarity.cosines_of_views(projections, "projections", self.impl)
        if projections.shape[0] == 0:
            zero = zero_of(projections)
            return SSKDHeadLossParts(zero, zero.detach()) if return_parts else zero
        images = torch.arange(cosines.shape[0], device=cosines.device).unsqueeze(1)
        loss: Tensor = logits.logit_losses(
            cosines, None, images.expand(-1, 3), 1.0, 0.0, -100, "batchmean", True, self.impl
        )[0]
        if not return_parts:
            return loss
        ranks = rank_of(cosines.detach().transpose(1, 2), images)
        return SSKDHeadLossParts(loss, (ranks == 0).to(loss.dtype).mean())
