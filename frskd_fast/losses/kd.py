"""Knowledge distillation of logits (Hinton et al., 2015, arXiv 1503.02531)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Self

from torch import Tensor, nn

from frskd_fast import _dispatch
from frskd_fast.losses.base import Loss, zero_of
from frskd_fast.ops import _checks, logits
from frskd_fast.ops.labels import checked_labels

__all__ = ["KDLoss", "KDLossParts"]


class KDLossParts(NamedTuple):
    """What ``KDLoss(..., return_parts=True)`` returns: scalars, all but ``loss`` detached and unweighted."""

    loss: Tensor
    ce_student: Tensor
    kd: Tensor


class KDLoss(Loss[KDLossParts]):
    """gamma * CE(student) + alpha * KD: a student of the labels and of a teacher that does not learn.

    ``gamma`` multiplies the cross-entropy of the student's logits with the targets.
    ``alpha`` multiplies KD = T^2 / N * sum_n sum_k p_t (log p_t - log p_s) with p = softmax(z / temperature).
    Arithmetic is float32 (float64 for float64 inputs) whatever the dtype of the inputs.

    Args:
        gamma: weight of the cross-entropy, finite; 0 skips it. RepDistiller's recipe: 0.1.
        alpha: weight of KD, finite; 0 skips it. RepDistiller's recipe: 0.9.
        temperature: T > 0 of both softmaxes. RepDistiller's recipe: 4.
        impl: ``"auto"``, ``"reference"``, ``"cpu"``, ``"triton"`` or ``"cuda"``.
        label_smoothing: in [0, 1], of the cross-entropy.
        ignore_index: class index whose rows do not count in the cross-entropy (they still count in KD).

    Raises:
        TypeError, ValueError: a sentence naming the argument, what came and what was wanted.
        RuntimeError: when ``impl`` cannot run here.

    Example:
        >>> import torch
        >>> from frskd_fast.losses import KDLoss
        >>> student_logits, teacher_logits = torch.zeros(8, 100, requires_grad=True), torch.zeros(8, 100)
        >>> loss = KDLoss()(student_logits, teacher_logits, torch.arange(8))
        >>> round(loss.item(), 4)  # a tenth of ln(100)
        0.4605
        >>> loss.backward()

    Source: Hinton et al., 2015, section 2, with the weights, and their names, of RepDistiller's command line.
    """

    needs_features = False
    shown = ("gamma", "alpha", "temperature", "impl")

    def __init__(
        self,
        gamma: float = 0.1,
        alpha: float = 0.9,
        temperature: float = 4.0,
        impl: str = "auto",
        *,
        label_smoothing: float = 0.0,
        ignore_index: int = -100,
    ) -> None:
        super().__init__()
        self.gamma = _checks.finite_number(gamma, "gamma")
        self.alpha = _checks.finite_number(alpha, "alpha")
        self.temperature = _checks.positive_number(temperature, "temperature")
        self.label_smoothing = _checks.unit_interval(label_smoothing, "label_smoothing")
        self.ignore_index = _checks.whole_number(ignore_index, "ignore_index")
        self.impl = _dispatch.check_name(impl, "the argument impl")

    @classmethod
    def for_networks(cls, student_channels: Sequence[int], teacher: nn.Module, **settings: Any) -> Self:
        """The loss, which needs nothing of the networks; for callers that have other losses, too."""
        return cls(**settings)

    def forward(
        self, student_logits: Tensor, teacher_logits: Tensor, targets: Any = None, *, return_parts: bool = False
    ) -> Tensor | KDLossParts:
        """Return the loss as a float32 (float64) scalar, or its parts.

        Args:
            student_logits: (N, K) raw logits; float32, bfloat16, float16 or float64, any strides.
            teacher_logits: (N, K) raw logits, same dtype and device; they get no gradient.
            targets: None for alpha * KD alone, class indices (N,), ``(targets_a, targets_b, lam)`` of mixup or cutmix, or
                probabilities (N, K).
            return_parts: return ``KDLossParts`` instead of the scalar.
        """
        if teacher_logits is None:
            raise TypeError("teacher_logits is None, but the teacher's logits were wanted.")
        teacher: Any = teacher_logits.detach() if isinstance(teacher_logits, Tensor) else teacher_logits
        if self.alpha == 0.0 or self.gamma == 0.0:
            # Without its input a term is 0 and not computed.
            logits.checked_logits(student_logits, teacher, "")
            if self.gamma == 0.0:
                checked_labels(targets, (student_logits,), False, self.ignore_index, check_range=True)
                targets = None
            if self.alpha == 0.0:
                teacher = None
        settings = self.temperature, self.label_smoothing, self.ignore_index, "batchmean", True, self.impl
        ce, _, kd = logits.logit_losses(student_logits, teacher, targets, *settings)
        loss = self.gamma * ce + self.alpha * kd
        if teacher is None and targets is None:
            loss = zero_of(student_logits)
        return KDLossParts(loss, ce.detach(), kd.detach()) if return_parts else loss
