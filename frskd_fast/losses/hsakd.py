"""HSAKD: what rotated images tell about class and rotation, at every stage of a network (Yang et al., IJCAI 2021)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor

from frskd_fast import _dispatch
from frskd_fast.losses.base import Loss, Parts
from frskd_fast.mixing import joint_labels
from frskd_fast.ops import _checks
from frskd_fast.ops.head_objective import Sources, head_objective
from frskd_fast.ops.labels import IGNORED, Labels, checked_labels, is_mix, mixed_probabilities
from frskd_fast.reference.logits import Settings

__all__ = [
    "HSAKDLoss",
    "HSAKDLossParts",
    "HSAKDOnlineLoss",
    "HSAKDOnlineLossParts",
    "HSAKDTeacherLoss",
    "HSAKDTeacherLossParts",
]


class HSAKDLossParts(NamedTuple):
    """What ``HSAKDLoss(..., return_parts=True)`` returns: all but ``loss`` detached."""

    loss: Tensor
    ce: Tensor
    kd: Tensor
    auxiliary_kd: Tensor  # (L,)


class HSAKDTeacherLossParts(NamedTuple):
    """What ``HSAKDTeacherLoss(..., return_parts=True)`` returns: all but ``loss`` detached."""

    loss: Tensor
    ce: Tensor
    auxiliary_ce: Tensor  # (L,)


class HSAKDOnlineLossParts(NamedTuple):
    """What ``HSAKDOnlineLoss(..., return_parts=True)`` returns: all but ``loss`` detached, entry m of network m."""

    loss: Tensor
    ce: Tensor  # (2,)
    auxiliary_ce: Tensor  # (2, L)
    kd: Tensor  # (2,), kd[m] pulls network m towards the other
    auxiliary_kd: Tensor  # (2, L)


def _checked_heads(logits: Any, auxiliary: Any, name: str, auxiliary_name: str) -> tuple[Tensor, ...]:
    """(4N, K) and L x (4N, 4K) of one network as one tuple."""
    shape = _checks.floating_tensor(logits, name).shape
    if len(shape) != 2 or shape[0] % 4 != 0 or shape[1] == 0:
        raise ValueError(
            f"{name} has shape {tuple(shape)}, but (4N, K), four rows for each image, was wanted; run the network on "
            "frskd_fast.mixing.rotate4(images)."
        )
    if not isinstance(auxiliary, list | tuple):
        raise TypeError(
            f"{auxiliary_name} is a {type(auxiliary).__name__}, but a list of the auxiliary heads' logits, each (4N, 4K), "
            "was wanted."
        )
    wanted = shape[0], 4 * shape[1]
    for head, joint in enumerate(auxiliary):
        head_name = f"{auxiliary_name}[{head}]"
        if _checks.floating_tensor(joint, head_name).shape != wanted:
            raise ValueError(
                f"{head_name} has shape {tuple(joint.shape)}, but {wanted}, a score for each of the four rotations of each "
                f"class of {name}, was wanted."
            )
        _checks.same(logits, name, joint, head_name)
    return logits, *auxiliary


def _check_alike(
    first: Sequence[Tensor], second: Sequence[Tensor], first_names: tuple[str, str], second_names: tuple[str, str]
) -> None:
    """Raise unless two networks, already checked by themselves, have as many heads over the same rows and classes."""
    if len(first) != len(second):
        raise ValueError(
            f"{second_names[1]} has {len(second) - 1} heads, but {first_names[1]} has {len(first) - 1} and the same number "
            "was wanted: the heads are compared in order."
        )
    if first[0].shape != second[0].shape:
        raise ValueError(
            f"{second_names[0]} has shape {tuple(second[0].shape)}, but {first_names[0]} has {tuple(first[0].shape)} and "
            "equal shapes were wanted; both networks see the same rotated images and score the same classes."
        )
    _checks.same(first[0], first_names[0], second[0], second_names[0])


def _image_labels(targets: Any, logits: Tensor, ignore_index: int, impl: str) -> Labels:
    """`targets` of the N images, checked against `logits` (4N, K), in which ignored labels are `IGNORED`."""
    upright = logits[::4]
    if is_mix(targets) and isinstance(targets[2], Tensor):
        targets = mixed_probabilities(targets, upright, ignore_index)
    if targets is None:
        raise TypeError("targets is None, but the class indices (N,) of the images before their rotation were wanted.")
    renamed = ignore_index != IGNORED
    labels = checked_labels(targets, (upright,), False, ignore_index, renamed or _dispatch.is_plain(impl))
    if not renamed or labels.first[0].is_floating_point():
        return labels

    def rename(indices: Tensor) -> Tensor:
        # Any other negative label is wrong, and stays so.
        return indices.clamp_min(-1).masked_fill(indices == ignore_index, IGNORED)

    return Labels(tuple(map(rename, labels.first)), tuple(map(rename, labels.second)), labels.mix)


def _upright(targets: Tensor) -> Tensor:
    """Labels (4N,) of which only those of the upright images count; of probabilities (N, K) the same in (4N, K)."""
    if targets.is_floating_point():
        # A row of zeros has no cross-entropy, but is one of the 4N rows of the mean, of which N were meant.
        return F.pad(4.0 * targets.unsqueeze(1), (0, 0, 0, 3)).flatten(0, 1)
    return F.pad(targets.unsqueeze(1), (0, 3), value=IGNORED).flatten()


def _none_of(targets: Tensor, logits: Tensor) -> Tensor:
    """Labels for `logits` of which none counts."""
    if targets.is_floating_point():
        return targets.new_zeros((1, 1)).expand(logits.shape)
    return targets.new_full(logits.shape[:1], IGNORED)


class _HSAKDLoss(Loss[Parts]):
    """What the three losses share."""

    passes = "one"

    def __init__(self, temperature: float, impl: str, ignore_index: int) -> None:
        super().__init__()
        self.temperature = _checks.positive_number(temperature, "temperature")
        self.ignore_index = _checks.whole_number(ignore_index, "ignore_index")
        self.impl = _dispatch.check_name(impl, "the argument impl")

    def _objective(
        self, networks: Sequence[Tensor], heads: int, targets: Any, *, frozen: Sequence[Tensor] = (), joint: bool
    ) -> tuple[Tensor, Tensor]:
        """The loss, and (2, networks, heads): cross-entropies and divergences.

        `networks` are the logits of one network or of two that teach each other, `frozen` those of a teacher. The labels of
        the main heads are those of the upright images; auxiliary heads have `joint` labels or none.
        """
        main = networks[0]
        impl = _dispatch.choose_for("logits", self.impl, main)
        images = _image_labels(targets, main, self.ignore_index, impl)
        tensors = [*networks, *frozen]
        places = []
        for labels in (*images.first, *images.second):
            # One tensor for the main heads, one for the auxiliary heads.
            places.append(([len(tensors)] + [len(tensors) + 1] * (heads - 1)) * (len(networks) // heads))
            tensors.append(_upright(labels))
            if heads > 1:
                tensors.append(joint_labels(labels) if joint else _none_of(labels, networks[1]))
        teachers: Sequence[int] = ()
        if frozen:
            teachers = range(heads, 2 * heads)
        elif len(networks) > heads:
            teachers = (*range(heads, 2 * heads), *range(heads))
        sources = Sources(len(networks), teachers, places[0], places[1] if images.second else ())
        settings = Settings(images.mix, 0.0, IGNORED, self.temperature)
        loss, terms = head_objective(tensors, sources, settings, impl)
        return loss, terms.view(2, len(networks) // heads, heads)


class HSAKDLoss(_HSAKDLoss[HSAKDLossParts]):
    """CE(z[0::4], y) + KD(z, z_teacher) + sum_l KD(a_l, a_l of the teacher): a student of a frozen teacher.

    z (4N, K) are the logits of the N images and their rotations, rows 4n + r as `rotate4` makes them, and a_l (4N, 4K) those
    of auxiliary head l, which scores class and rotation jointly (`joint_labels`). The cross-entropy is the mean over the
    upright images alone; KD, as in `kd_loss`, is the mean over all 4N rows. Without auxiliary heads (L = 0) this is ordinary
    knowledge distillation on rotated images.

    Args:
        temperature: T > 0 of both softmaxes of KD.
        ignore_index: class index whose images do not count in the cross-entropy; KD keeps them.
        impl: ``"auto"``, ``"reference"``, ``"cpu"``, ``"triton"`` or ``"cuda"``.

    Raises:
        TypeError, ValueError: a sentence naming the argument, what came and what was wanted.
        RuntimeError: when ``impl`` cannot run here.

    Example:
        >>> import torch
        >>> from frskd_fast.losses import HSAKDLoss
        >>> logits, auxiliary = torch.zeros(8, 10, requires_grad=True), [torch.zeros(8, 40, requires_grad=True)]
        >>> loss = HSAKDLoss()(logits, torch.zeros(8, 10), auxiliary, [torch.zeros(8, 40)], torch.tensor([3, 1]))
        >>> round(loss.item(), 4)  # the cross-entropy, ln(10)
        2.3026
        >>> loss.backward()

    Source: Yang et al., IJCAI 2021 (arXiv 2107.13715), as released. The student's auxiliary heads have no cross-entropy.
    """

    shown = ("temperature", "impl")

    def __init__(self, temperature: float = 3.0, *, ignore_index: int = -100, impl: str = "auto") -> None:
        super().__init__(temperature, impl, ignore_index)

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        student_aux: Sequence[Tensor],
        teacher_aux: Sequence[Tensor],
        targets: Any,
        *,
        return_parts: bool = False,
    ) -> Tensor | HSAKDLossParts:
        """Return the loss as a float32 (float64) scalar, or its parts.

        Args:
            student_logits: (4N, K) raw logits; float32, bfloat16, float16 or float64, any strides.
            teacher_logits: (4N, K), same dtype and device; the teacher gets no gradient.
            student_aux: list of L logits (4N, 4K), of the same dtype and device; may be empty.
            teacher_aux: as many of the teacher, in the same order.
            targets: of the N images: class indices (N,), ``(targets_a, targets_b, lam)`` of mixup or cutmix, or probabilities
                (N, K).
            return_parts: return ``HSAKDLossParts`` instead of the scalar.
        """
        student = _checked_heads(student_logits, student_aux, "student_logits", "student_aux")
        teacher = _checked_heads(teacher_logits, teacher_aux, "teacher_logits", "teacher_aux")
        _check_alike(student, teacher, ("student_logits", "student_aux"), ("teacher_logits", "teacher_aux"))
        loss, parts = self._objective(student, len(student), targets, frozen=teacher, joint=False)
        if not return_parts:
            return loss
        kd = parts[1, 0]
        return HSAKDLossParts(loss, parts[0, 0, 0], kd[0], kd[1:])


class HSAKDTeacherLoss(_HSAKDLoss[HSAKDTeacherLossParts]):
    """CE(z[0::4], y) + sum_l CE(a_l, 4y + r): a teacher with auxiliary heads.

    z (4N, K), a_l (4N, 4K) and y are those of `HSAKDLoss`. The first term is the mean over the upright images, the others are
    means over all rotations with their joint labels.

    Args:
        ignore_index: class index whose images, with all rotations, do not count.
        impl: ``"auto"``, ``"reference"``, ``"cpu"``, ``"triton"`` or ``"cuda"``.

    Raises:
        TypeError, ValueError: a sentence naming the argument, what came and what was wanted.
        RuntimeError: when ``impl`` cannot run here.

    Example:
        >>> import torch
        >>> from frskd_fast.losses import HSAKDTeacherLoss
        >>> parts = HSAKDTeacherLoss()(torch.zeros(8, 10), [torch.zeros(8, 40)], torch.tensor([3, 1]), return_parts=True)
        >>> round(parts.ce.item(), 4), round(parts.auxiliary_ce.item(), 4)  # ln(10) and ln(40)
        (2.3026, 3.6889)

    Source: Yang et al., IJCAI 2021 (arXiv 2107.13715), as released. With a frozen backbone the first term is a constant.
    """

    shown = ("impl",)

    def __init__(self, *, ignore_index: int = -100, impl: str = "auto") -> None:
        super().__init__(1.0, impl, ignore_index)

    def forward(
        self, logits: Tensor, aux: Sequence[Tensor], targets: Any, *, return_parts: bool = False
    ) -> Tensor | HSAKDTeacherLossParts:
        """Return the loss as a float32 (float64) scalar, or its parts.

        Args:
            logits: (4N, K) raw logits; float32, bfloat16, float16 or float64, any strides.
            aux: list of L logits (4N, 4K), of the same dtype and device; may be empty.
            targets: of the N images, as in `HSAKDLoss`.
            return_parts: return ``HSAKDTeacherLossParts`` instead of the scalar.
        """
        network = _checked_heads(logits, aux, "logits", "aux")
        loss, parts = self._objective(network, len(network), targets, joint=True)
        if not return_parts:
            return loss
        ce = parts[0, 0]
        return HSAKDTeacherLossParts(loss, ce[0], ce[1:])


class HSAKDOnlineLoss(_HSAKDLoss[HSAKDOnlineLossParts]):
    """sum_m [CE(z_m[0::4], y) + sum_l CE(a_lm, 4y + r) + KD(z_m, z_o) + sum_l KD(a_lm, a_lo)], o the other of two networks.

    z_m (4N, K), a_lm (4N, 4K) and y are those of `HSAKDLoss`; the other network's logits are detached in each KD.

    Args:
        temperature: T > 0 of both softmaxes of KD.
        ignore_index: class index whose images do not count in the cross-entropies; KD keeps them.
        impl: ``"auto"``, ``"reference"``, ``"cpu"``, ``"triton"`` or ``"cuda"``.

    Raises:
        TypeError, ValueError: a sentence naming the argument, what came and what was wanted.
        RuntimeError: when ``impl`` cannot run here.

    Example:
        >>> import torch
        >>> from frskd_fast.losses import HSAKDOnlineLoss
        >>> logits, auxiliary = [torch.zeros(8, 10), torch.ones(8, 10)], [[torch.zeros(8, 40)], [torch.ones(8, 40)]]
        >>> parts = HSAKDOnlineLoss()(logits, auxiliary, torch.tensor([3, 1]), return_parts=True)
        >>> parts.auxiliary_ce.shape, parts.kd.abs().max().item() < 1e-5  # both say the same
        (torch.Size([2, 1]), True)

    Source: Yang et al., IJCAI 2021 (arXiv 2107.13715), as released.
    """

    shown = ("temperature", "impl")

    def __init__(self, temperature: float = 3.0, *, ignore_index: int = -100, impl: str = "auto") -> None:
        super().__init__(temperature, impl, ignore_index)

    def forward(
        self,
        logits: Sequence[Tensor],
        aux: Sequence[Sequence[Tensor]],
        targets: Any,
        *,
        return_parts: bool = False,
    ) -> Tensor | HSAKDOnlineLossParts:
        """Return the loss as a float32 (float64) scalar, or its parts.

        Args:
            logits: of both networks, each (4N, K) raw logits; float32, bfloat16, float16 or float64, any strides.
            aux: of both networks, each a list of L logits (4N, 4K), of the same dtype and device; may be empty.
            targets: of the N images, as in `HSAKDLoss`.
            return_parts: return ``HSAKDOnlineLossParts`` instead of the scalar.
        """
        for name, given in (("logits", logits), ("aux", aux)):
            if not isinstance(given, list | tuple) or len(given) != 2:
                came = f"{len(given)} entries" if isinstance(given, list | tuple) else f"type {type(given).__name__}"
                raise TypeError(f"{name} has {came}, but a list with one entry for each of two networks was wanted.")
        first = _checked_heads(logits[0], aux[0], "logits[0]", "aux[0]")
        second = _checked_heads(logits[1], aux[1], "logits[1]", "aux[1]")
        _check_alike(first, second, ("logits[0]", "aux[0]"), ("logits[1]", "aux[1]"))
        loss, parts = self._objective((*first, *second), len(first), targets, joint=True)
        if not return_parts:
            return loss
        ce, kd = parts
        return HSAKDOnlineLossParts(loss, ce[:, 0], ce[:, 1:], kd[:, 0], kd[:, 1:])
