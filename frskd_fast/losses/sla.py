"""FRSKD with the auxiliary task of self-supervised label augmentation: which class, turned by which angle."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from frskd_fast.losses.base import (
    DistillationLoss,
    Loss,
    Pyramids,
    check_beside_parameters,
    checked_outputs,
)
from frskd_fast.losses.frskd import FRSKDLoss
from frskd_fast.losses.hints import wide_range
from frskd_fast.mixing import joint_labels
from frskd_fast.ops import _checks, attention
from frskd_fast.ops.labels import IGNORED, is_mix, mixed_probabilities
from frskd_fast.reference.dtypes import accumulate_dtype

PASSES = ("two", "one")


class SLALossParts(NamedTuple):
    """What ``SLALoss(..., return_parts=True)`` returns: scalars, all but ``loss`` detached and unweighted."""

    loss: Tensor
    ce_student: Tensor
    ce_teacher: Tensor
    kd: Tensor
    feature: Tensor
    joint: Tensor
    sla: Tensor


def aggregate_rotations(joint_logits: Tensor) -> Tensor:
    """v[n, k] = mean_r u[4n + r, 4k + r]: the class scores of image n over its rotations; (4N, 4K) -> (N, K).

    Args:
        joint_logits: u (4N, 4K), rows in the order of `rotate4`, columns in that of `joint_labels`; any floating dtype.

    Returns:
        (N, K) float32 (float64 for float64), averaged in that dtype. Nothing but the result is written.

    Example:
        >>> import torch
        >>> aggregate_rotations(torch.arange(32.0).view(4, 8)).tolist()  # means of 0, 9, 18, 27 and of 4, 13, 22, 31
        [[13.5, 17.5]]

    Source: Lee et al., ICML 2020 (arXiv 1910.05872), eq. 4.
    """
    rows, columns = joint_logits.shape
    dtype = accumulate_dtype(joint_logits.dtype)
    by_rotation = joint_logits.unflatten(0, (rows // 4, 4)).unflatten(2, (columns // 4, 4))
    aggregated: Tensor = by_rotation.diagonal(dim1=1, dim2=3).mean(2, dtype=dtype)
    return aggregated


class SLALoss(Loss[SLALossParts]):
    """CE(z_s) + CE(z_t) + JOINT + weight * SLA + alpha * KD + beta * D, all of them over images and their rotations.

    With u = fc(mean over pixels of the last map) the scores of 4K joint labels (class, rotation) for the 4N rotated images,
    by a head of their own for student (``fc1``) and self-teacher (``fc2``), and v[n, k] = mean_r u[4n+r, 4k+r]:

    * JOINT = CE(u_s, joint labels) + CE(u_t, joint labels).
    * ``weight`` multiplies SLA = KD(z_s, v_s) + KD(z_t, v_t), v detached, at the temperature of ``distillation``.
    * alpha * KD + beta * D is ``distillation`` on concatenations along the batch: the logits [z, v] of student and
      self-teacher (2N rows), and the feature maps of the images and of their rotations (5N rows). KD's and D's means divide
      by these rows.

    Nothing is detached that `FRSKDLoss` does not detach: KD trains v_s, and so fc1 and the backbone.

    Args:
        distillation: `FRSKDLoss`, `FitNetLoss`, `OverhaulLoss` or another `losses.base.DistillationLoss`. None is
            ``FRSKDLoss()``. Its label smoothing and ignore_index hold for every cross-entropy here.
        student_width: channels of the student's last map.
        teacher_width: channels of the self-teacher's last map: the last of its ``.out_channels`` (any self-teacher: the
            original's ``fc2`` fits BiFPNc alone).
        num_classes: K.
        weight: of SLA, finite (the original's ``aux_lamb``, 1).
        passes: ``"two"`` wants outputs of the images and, apart from them, of their rotations, as the original runs the
            networks: N images, then 4N. Every BatchNorm normalises the upright images by themselves and updates its running
            statistics twice a step. ``"one"`` wants outputs of the 4N rotated images alone, whose rows 4n are the images:
            a fifth less work, and every BatchNorm sees one batch, in which upright images are normalised together with
            turned ones. The formula is the same, so upright feature maps count twice in D.

    Attributes:
        fc1, fc2: the heads, ``Linear(student_width, 4 * K)`` and ``Linear(teacher_width, 4 * K)``.
        needs_preact: that of ``distillation``. The heads always read rectified maps.

    Raises:
        TypeError, ValueError: a sentence naming the argument, what came and what was wanted.
        RuntimeError: when ``distillation``'s implementation cannot run here.

    Example:
        >>> import torch
        >>> from frskd_fast.losses import FRSKDLoss, SLALoss
        >>> from frskd_fast.mixing import rotate4
        >>> from frskd_fast.models import BiFPNc, wrn16x2
        >>> backbone = wrn16x2(num_classes=10)
        >>> self_teacher = BiFPNc(backbone.channels, 10)
        >>> criterion = SLALoss(FRSKDLoss(), backbone.channels[-1], self_teacher.out_channels[-1], 10, passes="one")
        >>> images, targets = torch.randn(2, 3, 16, 16), torch.tensor([3, 1])
        >>> features, logits = backbone(rotate4(images))
        >>> teacher_features, teacher_logits = self_teacher(features)
        >>> parts = criterion(logits, teacher_logits, features, teacher_features, targets, return_parts=True)
        >>> parts.loss.backward()
        >>> parts._fields
        ('loss', 'ce_student', 'ce_teacher', 'kd', 'feature', 'joint', 'sla')

    Source: ``aux=sla`` of FRSKD's released code (Ji et al., CVPR 2021), after Lee et al., ICML 2020 (arXiv 1910.05872).
    """

    shown = ("num_classes", "weight", "passes")
    # What the distillation declares holds here, too.
    needs_preact = property(lambda self: self.distillation.needs_preact)
    label_smoothing = property(lambda self: self.distillation.label_smoothing)
    ignore_index = property(lambda self: self.distillation.ignore_index)
    teacher_modules = property(lambda self: self.distillation.teacher_modules)

    def __init__(
        self,
        distillation: DistillationLoss | None = None,
        student_width: int = 512,
        teacher_width: int = 1024,
        num_classes: int = 100,
        weight: float = 1.0,
        *,
        passes: str = "two",
    ) -> None:
        super().__init__()
        if distillation is None:
            distillation = FRSKDLoss()
        if not isinstance(distillation, DistillationLoss):
            raise TypeError(
                f"distillation is a {type(distillation).__name__}, but FRSKDLoss, FitNetLoss or OverhaulLoss was wanted, or "
                "another loss built on losses.base.DistillationLoss."
            )
        for name, count in (
            ("student_width", student_width),
            ("teacher_width", teacher_width),
            ("num_classes", num_classes),
        ):
            _checks.check_positive_integer(name, count)
        if passes not in PASSES:
            raise ValueError(f"passes is {passes!r}, but 'two' or 'one' was wanted.")
        self.distillation = distillation
        self.num_classes = num_classes
        self.weight = _checks.finite_number(weight, "weight")
        self.passes = passes
        self.fc1 = nn.Linear(student_width, 4 * num_classes)
        self.fc2 = nn.Linear(teacher_width, 4 * num_classes)

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        student_feats: Any,
        teacher_feats: Any,
        targets: Any = None,
        *,
        rotated_student_feats: Any = None,
        rotated_teacher_feats: Any = None,
        return_parts: bool = False,
    ) -> Tensor | SLALossParts:
        """Return the loss as a float32 (float64) scalar, or its parts.

        Args:
            student_logits: (N, K) raw logits of the network for the images; with ``passes="one"`` (4N, K) for their rotations
                in the order of `rotate4`.
            teacher_logits: the same of the self-teacher.
            student_feats: list, tuple or dict of L maps (N, C_l, H_l, W_l), finest first; 4N with ``passes="one"``.
            teacher_feats: the same of the self-teacher; channels may differ, pixels may not.
            targets: of the N images: class indices (N,), ``(targets_a, targets_b, lam)`` of mixup or cutmix, or probabilities
                (N, K). None leaves the cross-entropies out.
            rotated_student_feats: with ``passes="two"`` L maps (4N, C_l, H_l, W_l) of the rotated images.
            rotated_teacher_feats: the same of the self-teacher.
            return_parts: return ``SLALossParts`` instead of the scalar.
        """
        students, teachers = checked_outputs(
            student_logits, teacher_logits, student_feats, teacher_feats, self.distillation.resize
        )
        if student_logits.shape[1:] != (self.num_classes,):
            raise ValueError(
                f"student_logits has shape {tuple(student_logits.shape)}, but logits of the {self.num_classes} classes that "
                "this SLALoss was built for were wanted."
            )
        if self.passes == "one":
            if rotated_student_feats is not None or rotated_teacher_feats is not None:
                raise TypeError(
                    "rotated features were given, but with passes='one' all outputs are those of the rotated images; "
                    "leave these arguments out, or build SLALoss with passes='two'."
                )
            if student_logits.shape[0] % 4 != 0:
                raise ValueError(
                    f"student_logits has {student_logits.shape[0]} rows, but with passes='one' four for each image were "
                    "wanted; run the networks on frskd_fast.mixing.rotate4(images)."
                )
            rotated_students, rotated_teachers = students, teachers
            student_logits, teacher_logits = student_logits[::4], teacher_logits[::4]
        else:
            rotated_students, rotated_teachers = self._checked_rotated(
                rotated_student_feats, rotated_teacher_feats, students, teachers
            )
        joint_student = self._joint_logits(self.fc1, rotated_students[-1], "student")
        joint_teacher = self._joint_logits(self.fc2, rotated_teachers[-1], "teacher")
        dtype = accumulate_dtype(student_logits.dtype)
        z_student, z_teacher = student_logits.to(dtype), teacher_logits.to(dtype)
        v_student, v_teacher = aggregate_rotations(joint_student), aggregate_rotations(joint_teacher)

        ce_student, ce_teacher, joint = self._cross_entropies(
            student_logits, teacher_logits, joint_student, joint_teacher, targets
        )
        # All divergences in one call: N rows each of KD's two halves and SLA's two terms.
        divergences = self.distillation.logit_terms(
            torch.cat([z_student, v_student, z_student, z_teacher]),
            torch.cat([z_teacher, v_teacher, v_student, v_teacher]),
            reduction="none",
        )[2].unflatten(0, (4, -1))
        images = max(divergences.shape[1], 1)
        kd, sla = divergences[:2].sum() / (2 * images), divergences[2:].sum() / images
        loss: Tensor = ce_student + ce_teacher + joint + self.weight * sla + self.distillation.alpha * kd
        feature = torch.zeros_like(kd)
        if self.distillation.beta != 0.0:
            feature = self._feature_term((students, teachers), (rotated_students, rotated_teachers))
            loss = loss + self.distillation.beta * feature
        if not return_parts:
            return loss
        return SLALossParts(loss, *(part.detach() for part in (ce_student, ce_teacher, kd, feature, joint, sla)))

    def _checked_rotated(
        self, rotated_student_feats: Any, rotated_teacher_feats: Any, students: Any, teachers: Any
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        for name, features in (
            ("rotated_student_feats", rotated_student_feats),
            ("rotated_teacher_feats", rotated_teacher_feats),
        ):
            if features is None:
                raise TypeError(
                    f"{name} is None, but with passes='two' the features of frskd_fast.mixing.rotate4(images) were wanted; "
                    "pass them, or build SLALoss with passes='one'."
                )
        rotated = attention.checked_pyramids(rotated_student_feats, rotated_teacher_feats, self.distillation.resize)
        for side, features, plain in (("student", rotated[0], students), ("teacher", rotated[1], teachers)):
            for level, (turned, upright) in enumerate(zip(features, plain, strict=False)):
                wanted = (4 * upright.shape[0], *upright.shape[1:])
                if tuple(turned.shape) != wanted:
                    raise ValueError(
                        f"rotated_{side}_feats[{level}] has shape {tuple(turned.shape)}, but {wanted}, four rotations of "
                        f"{side}_feats[{level}], was wanted; run the networks on frskd_fast.mixing.rotate4(images)."
                    )
                _checks.same(upright, f"{side}_feats[{level}]", turned, f"rotated_{side}_feats[{level}]")
        if len(rotated[0]) != len(students):
            raise ValueError(
                f"rotated_student_feats has {len(rotated[0])} levels, but student_feats has {len(students)} and the same "
                "number was wanted."
            )
        return rotated

    def _joint_logits(self, head: nn.Linear, feature: Tensor, side: str) -> Tensor:
        if feature.shape[1] != head.in_features:
            raise ValueError(
                f"the last map of {side}_feats has {feature.shape[1]} channels, but this SLALoss was built for "
                f"{side}_width={head.in_features}; build it for the channels of your networks."
            )
        check_beside_parameters(feature, f"{side}_feats[-1]", self, head.weight)
        rectified = F.relu(feature) if self.needs_preact else feature
        pooled = rectified.mean((2, 3), dtype=accumulate_dtype(feature.dtype))
        with wide_range(feature.device.type):
            joint: Tensor = head(pooled.to(head.weight.dtype))
        return joint

    def _cross_entropies(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        joint_student: Tensor,
        joint_teacher: Tensor,
        targets: Any,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """CE(student), CE(self-teacher), and the sum of both on the joint labels."""
        if targets is None:
            zero = student_logits.new_zeros((), dtype=accumulate_dtype(student_logits.dtype))
            return zero, zero, zero
        joint_targets = joint_labels(targets, self.ignore_index)
        if is_mix(targets) and isinstance(targets[2], Tensor):
            targets = mixed_probabilities(targets, student_logits, self.ignore_index, self.label_smoothing)
            joint_targets = mixed_probabilities(joint_targets, joint_student, IGNORED, self.label_smoothing)
        ce_student, ce_teacher, _ = self.distillation.logit_terms(student_logits, teacher_logits, targets)
        joint_ce_student, joint_ce_teacher, _ = self.distillation.logit_terms(
            joint_student, joint_teacher, joint_targets, ignore_index=IGNORED
        )
        return ce_student, ce_teacher, joint_ce_student + joint_ce_teacher

    def _feature_term(self, upright: Pyramids, rotated: Pyramids) -> Tensor:
        """D of all 5N maps, before its weight."""
        turned = self.distillation.feature_rows(*rotated)
        if turned is not None:
            # Each image has a D of its own, so that nothing has to be concatenated, and the upright of "one" are known.
            images = turned.shape[0] // 4
            once_more = turned[::4] if self.passes == "one" else self.distillation.feature_rows(*upright)
            assert once_more is not None
            return (turned.sum() + once_more.sum()) / max(5 * images, 1)
        if self.passes == "one":
            upright = tuple(tuple(feature[::4] for feature in pyramid) for pyramid in upright)  # type: ignore[assignment]
        # The images meet, for instance in the statistics of the adapters' BatchNorms: over all 5N maps.
        students, teachers = (
            [torch.cat(pair) for pair in zip(*pyramids, strict=True)] for pyramids in zip(upright, rotated, strict=True)
        )
        return self.distillation.feature_term(students, teachers)
