"""AdaIN-KD: the teacher judges its own maps with the student's channel statistics in them (Yang et al., arXiv 2003.04289)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from frskd_fast import _dispatch
from frskd_fast.losses.base import Loss
from frskd_fast.ops import _checks, logits
from frskd_fast.ops.moments import channel_moments
from frskd_fast.reference.dtypes import accumulate_dtype
from frskd_fast.reference.moments import ChannelMoments

__all__ = ["AdaINLoss", "AdaINLossParts"]

JUDGES = ("mse", "kl", "ce")


class AdaINLossParts(NamedTuple):
    """What ``AdaINLoss(..., return_parts=True)`` returns: all but ``loss`` detached and unweighted; L stages."""

    loss: Tensor
    ce: Tensor
    mean: Tensor  # (L,)
    std: Tensor  # (L,)
    transfer: Tensor  # (L,)


class AdaINLoss(Loss[AdaINLossParts]):
    """CE(z, y) + statistics_weight * sum_l (D(m_l) + D(s_l)) + transfer_weight * sum_l J(z_l).

    m_l and s_l are mean and standard deviation of the channels of each image at stage l (`functional.channel_moments`), D is
    their mean squared distance to the teacher's. z_l are the logits of the teacher when it goes on from its own map of stage l
    with the student's statistics in it (`functional.adain`), and J judges them:

    * ``"mse"``: the mean of (z_l - z_t)^2 over all N * K logits, z_t the teacher's own logits.
    * ``"kl"``: KD of z_l and z_t, as in `functional.kd_loss`.
    * ``"ce"``: the cross-entropy of z_l with the targets.

    The teacher's maps and logits get no gradient. Terms of weight 0 are not computed, and what they need may be None.
    Arithmetic is float32 (float64 for float64 inputs) whatever the dtype of the inputs.

    Args:
        statistics_weight, transfer_weight: finite.
        unbiased: the variance divides by H*W - 1, not by H*W.
        eps: > 0, added to the variance.
        judge: "mse", "kl" or "ce".
        temperature: T > 0 of "kl".
        label_smoothing, ignore_index: of the cross-entropies.
        impl: ``"auto"``, ``"reference"``, ``"cpu"``, ``"triton"`` or ``"cuda"``.

    Raises:
        TypeError, ValueError: a sentence naming the argument, what came and what was wanted.
        RuntimeError: when ``impl`` cannot run here.

    Example:
        >>> import torch
        >>> from frskd_fast.functional import adain, channel_moments
        >>> from frskd_fast.losses import AdaINLoss
        >>> student_map, teacher_map = torch.rand(4, 8, 4, 4, requires_grad=True), torch.rand(4, 8, 6, 6)
        >>> tail = torch.nn.Linear(8, 10)  # what the teacher does with its last map, after the mean over its pixels
        >>> transferred = tail(adain(teacher_map, *channel_moments(student_map)).mean(dim=(2, 3)))
        >>> teacher_logits = tail(teacher_map.mean(dim=(2, 3)))
        >>> student_logits = torch.zeros(4, 10, requires_grad=True)
        >>> loss = AdaINLoss()(student_logits, [student_map], [teacher_map], [transferred], teacher_logits, torch.arange(4))
        >>> loss.backward()

    Source: Yang et al., arXiv 2003.04289. Its equations were not at hand: the form of the terms, their weights and eps are
    ours, except for the unbiased variance, which its first author's later code computes.
    """

    shown = ("statistics_weight", "transfer_weight", "unbiased", "eps", "judge", "temperature", "impl")

    def __init__(
        self,
        statistics_weight: float = 1.0,
        transfer_weight: float = 1.0,
        unbiased: bool = True,
        eps: float = 1e-5,
        judge: str = "mse",
        temperature: float = 4.0,
        *,
        label_smoothing: float = 0.0,
        ignore_index: int = -100,
        impl: str = "auto",
    ) -> None:
        super().__init__()
        self.statistics_weight = _checks.finite_number(statistics_weight, "statistics_weight")
        self.transfer_weight = _checks.finite_number(transfer_weight, "transfer_weight")
        self.unbiased = bool(unbiased)
        self.eps = _checks.positive_number(eps, "eps")
        if judge not in JUDGES:
            raise ValueError(f"judge is {judge!r}, but one of {', '.join(map(repr, JUDGES))} was wanted.")
        self.judge = judge
        self.temperature = _checks.positive_number(temperature, "temperature")
        self.label_smoothing = _checks.unit_interval(label_smoothing, "label_smoothing")
        self.ignore_index = _checks.whole_number(ignore_index, "ignore_index")
        self.impl = _dispatch.check_name(impl, "the argument impl")

    def moments(self, feature: Tensor, name: str = "feature") -> ChannelMoments:
        """`channel_moments` with the settings of this loss; errors call the map `name`."""
        return channel_moments(feature, self.eps, self.unbiased, self.impl, name)

    def forward(
        self,
        student_logits: Tensor,
        connected_feats: Sequence[Tensor | ChannelMoments] | None,
        teacher_feats: Sequence[Tensor | ChannelMoments] | None,
        transferred_logits: Sequence[Tensor] | None,
        teacher_logits: Tensor | None,
        targets: Any,
        *,
        return_parts: bool = False,
    ) -> Tensor | AdaINLossParts:
        """Return the loss as a float32 (float64) scalar, or its parts; a part of weight 0 is 0.

        Args:
            student_logits: (N, K) raw logits; float32, bfloat16, float16 or float64, any strides.
            connected_feats: L maps (N, C_l, H_l, W_l) of the student, brought to the teacher's channels, or their moments
                where they are known already.
            teacher_feats: L maps (N, C_l, H'_l, W'_l) of the teacher, or their moments; sizes may differ from the student's.
            transferred_logits: L x (N, K), of the teacher's tails.
            teacher_logits: (N, K), not needed by the judge "ce".
            targets: class indices (N,), ``(targets_a, targets_b, lam)`` of mixup or cutmix, or probabilities (N, K).
            return_parts: return ``AdaINLossParts`` instead of the scalar.
        """
        logits.checked_logits(student_logits, None, "")
        if student_logits.dim() != 2:
            raise ValueError(f"student_logits has shape {tuple(student_logits.shape)}, but (N, K) was wanted.")
        absent = student_logits.new_zeros((), dtype=accumulate_dtype(student_logits.dtype))
        mean = std = transfer = absent.expand(0)
        if self.statistics_weight != 0.0:
            mean, std = self._distances(student_logits, connected_feats, teacher_feats)
        heads = []
        if self.transfer_weight != 0.0:
            heads = self._checked_heads(student_logits, transferred_logits, teacher_logits)
            if self.statistics_weight != 0.0 and len(heads) != mean.shape[0]:
                raise ValueError(
                    f"transferred_logits has {len(heads)} stages, but connected_feats has {mean.shape[0]} and the same number "
                    "was wanted."
                )
        if heads:
            transfer = torch.stack([self._judged(head, teacher_logits, targets) for head in heads])
        ce = self._cross_entropy(student_logits, targets)
        loss = ce
        if self.statistics_weight != 0.0:
            loss = loss + self.statistics_weight * (mean.sum() + std.sum())
        if heads:
            loss = loss + self.transfer_weight * transfer.sum()
        if not return_parts:
            return loss
        stages = max(mean.shape[0], transfer.shape[0])
        terms = (part.detach() if part.shape[0] else absent.expand(stages) for part in (mean, std, transfer))
        return AdaINLossParts(loss, ce.detach(), *terms)

    def _cross_entropy(self, scores: Tensor, targets: Any) -> Tensor:
        ce: Tensor = logits.logit_losses(
            scores, None, targets, 1.0, self.label_smoothing, self.ignore_index, "batchmean", True, self.impl
        )[0]
        return ce

    def _judged(self, head: Tensor, teacher_logits: Tensor | None, targets: Any) -> Tensor:
        """J of one stage's logits."""
        if self.judge == "ce":
            return self._cross_entropy(head, targets)
        assert teacher_logits is not None
        teacher = teacher_logits.detach()
        if self.judge == "kl":
            kd: Tensor = logits.logit_losses(
                head, teacher, None, self.temperature, 0.0, -100, "batchmean", True, self.impl
            )[2]
            return kd
        dtype = accumulate_dtype(head.dtype)
        return (head.to(dtype) - teacher.to(dtype)).square().sum() / max(head.numel(), 1)

    def _distances(self, student_logits: Tensor, connected: Any, teacher: Any) -> tuple[Tensor, Tensor]:
        """Mean squared distances of means and of standard deviations, (L,) each."""
        sides = [
            self._all_moments(feats, name, student_logits)
            for feats, name in ((connected, "connected_feats"), (teacher, "teacher_feats"))
        ]
        if len(sides[0]) != len(sides[1]):
            raise ValueError(
                f"teacher_feats has {len(sides[1])} stages, but connected_feats has {len(sides[0])} and the same number was "
                "wanted."
            )
        distances: list[list[Tensor]] = [[], []]
        for stage, (ours, theirs) in enumerate(zip(*sides, strict=True)):
            if ours.mean.shape != theirs.mean.shape:
                raise ValueError(
                    f"connected_feats[{stage}] is of (images, channels) {tuple(ours.mean.shape)}, but teacher_feats[{stage}] "
                    f"of {tuple(theirs.mean.shape)} and the same was wanted; a connector brings the student's map to the "
                    "teacher's channels."
                )
            for found, one, other in zip(distances, ours, theirs, strict=True):
                difference = one - other.detach()
                found.append(difference.square().sum() / max(difference.numel(), 1))
        mean, std = map(torch.stack, distances)
        return mean, std

    def _all_moments(self, feats: Any, name: str, student_logits: Tensor) -> list[ChannelMoments]:
        if not isinstance(feats, list | tuple) or not feats:
            raise TypeError(
                f"{name} is a {type(feats).__name__}, but a list of maps (N, C, H, W), one for each stage, was wanted because "
                f"statistics_weight is {self.statistics_weight}."
            )
        dtype = accumulate_dtype(student_logits.dtype)
        found = []
        for stage, value in enumerate(feats):
            place = f"{name}[{stage}]"
            moments = value if isinstance(value, ChannelMoments) else self.moments(value, place)
            if moments.mean.device != student_logits.device or moments.mean.dtype != dtype:
                raise TypeError(
                    f"{place} is on {moments.mean.device} and computed in {moments.mean.dtype}, but student_logits on "
                    f"{student_logits.device} in {dtype} and the same was wanted."
                )
            if moments.mean.shape[0] != student_logits.shape[0]:
                raise ValueError(
                    f"{place} is of {moments.mean.shape[0]} images, but student_logits of {student_logits.shape[0]} and the "
                    "same images were wanted."
                )
            found.append(moments)
        return found

    def _checked_heads(self, student_logits: Tensor, transferred: Any, teacher_logits: Any) -> list[Tensor]:
        if not isinstance(transferred, list | tuple) or not transferred:
            raise TypeError(
                f"transferred_logits is a {type(transferred).__name__}, but a list of logits (N, K), one for each stage, was "
                f"wanted because transfer_weight is {self.transfer_weight}."
            )
        if self.judge != "ce":
            if teacher_logits is None:
                raise TypeError(
                    f'teacher_logits is None, but judge="{self.judge}" compares with the teacher\'s logits.'
                )
            logits.checked_logits(student_logits, teacher_logits, "")
        for stage, head in enumerate(transferred):
            name = f"transferred_logits[{stage}]"
            _checks.same(student_logits, "student_logits", _checks.floating_tensor(head, name), name)
            if head.shape != student_logits.shape:
                raise ValueError(
                    f"{name} has shape {tuple(head.shape)}, but student_logits has {tuple(student_logits.shape)} and equal "
                    "shapes were wanted; the teacher must score the same classes of the same images."
                )
        return list(transferred)
