"""The FRSKD objective (Ji et al., CVPR 2021, arXiv 2103.08273)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from frskd_fast.losses.base import DistillationLoss, FRSKDLossParts
from frskd_fast.ops import _checks, attention

__all__ = ["FRSKDLoss", "FRSKDLossParts"]


class FRSKDLoss(DistillationLoss):
    """alpha * KD + beta * sum_l AT_l, and with targets also CE(student) + CE(teacher).

    ``alpha`` multiplies KD = T^2 / N * sum_n sum_k p_t (log p_t - log p_s) with p = softmax(z / temperature).
    ``beta`` multiplies the attention transfer AT_l = mean_{n,hw} (q_student - q_teacher)^2 with q = a / max(||a||_2, 1e-12),
    a = mean_c |f|^exponent.
    KD and AT are detached from the self-teacher; its cross-entropy is not. Arithmetic is float32 (float64 for float64 inputs)
    whatever the dtype of the inputs, and finite wherever the formula is.

    Args:
        alpha: weight of KD, finite. FRSKD's CIFAR-100 recipe: 2.
        beta: weight of the summed attention terms, finite; 0 skips them. FRSKD's CIFAR-100 recipe: 100.
        temperature: T > 0 of both softmaxes.
        impl: ``"auto"``, ``"reference"``, ``"cpu"``, ``"triton"`` or ``"cuda"``.
        exponent: p >= 1 of the attention maps.
        label_smoothing: in [0, 1], applied to both cross-entropies.
        ignore_index: class index whose rows count in neither cross-entropy (they still count in KD, as in the original).
        resize: ``None`` (maps of different size are an error) or ``"pool"`` (average-pool the larger one).

    Raises:
        TypeError, ValueError: a sentence naming the argument, what came and what was wanted.
        RuntimeError: when ``impl`` cannot run here.

    Example:
        >>> import torch
        >>> from frskd_fast.losses import FRSKDLoss
        >>> criterion = FRSKDLoss(alpha=2.0, beta=100.0, temperature=4.0)
        >>> student_logits = torch.zeros(8, 100, requires_grad=True)
        >>> student_feats = [torch.ones(8, 64, 4, 4, requires_grad=True)]
        >>> teacher_feats = [torch.ones(8, 128, 4, 4)]
        >>> targets = torch.arange(8)
        >>> loss = criterion(student_logits, torch.zeros(8, 100), student_feats, teacher_feats, targets)
        >>> round(loss.item(), 4)  # two cross-entropies of ln(100)
        9.2103
        >>> loss.backward()

    Source: FRSKD's released classification losses, whose numbers (a mean, not a sum, over the map's pixels) this follows.
    """

    exponent: float

    def __init__(
        self,
        alpha: float = 2.0,
        beta: float = 100.0,
        temperature: float = 4.0,
        impl: str = "auto",
        *,
        exponent: float = 2.0,
        label_smoothing: float = 0.0,
        ignore_index: int = -100,
        resize: str | None = None,
    ) -> None:
        super().__init__(alpha, beta, temperature, impl, label_smoothing, ignore_index)
        self.exponent = _checks.attention_exponent(exponent)
        if resize not in (None, "pool"):
            raise ValueError(f"resize is {resize!r}, but None or 'pool' was wanted.")
        self.resize = resize

    def feature_rows(self, students: Sequence[Tensor], teachers: Sequence[Tensor]) -> Tensor:
        """sum_l AT_l of each image, (N,)."""
        rows = attention.attention_transfer(students, teachers, self.exponent, "none", self.resize, True, self.impl)
        return rows.sum(0)
