"""The FRSKD objective (Ji et al., CVPR 2021, arXiv 2103.08273)."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor, nn

from frskd_fast import _dispatch
from frskd_fast.ops import _checks, attention, logits, objective


class FRSKDLossParts(NamedTuple):
    """What ``FRSKDLoss(..., return_parts=True)`` returns: scalars, all but ``loss`` detached and unweighted."""

    loss: Tensor
    ce_student: Tensor
    ce_teacher: Tensor
    kd: Tensor
    feature: Tensor


class FRSKDLoss(nn.Module):
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
        super().__init__()
        self.alpha = _checks.finite_number(alpha, "alpha")
        self.beta = _checks.finite_number(beta, "beta")
        self.temperature = _checks.positive_number(temperature, "temperature")
        self.exponent = _checks.attention_exponent(exponent)
        self.label_smoothing = _checks.unit_interval(label_smoothing, "label_smoothing")
        self.ignore_index = _checks.whole_number(ignore_index, "ignore_index")
        if resize not in (None, "pool"):
            raise ValueError(f"resize is {resize!r}, but None or 'pool' was wanted.")
        self.resize = resize
        self.impl = _dispatch.check_name(impl, "the argument impl")

    @classmethod
    def from_args(cls, args: Any, impl: str = "auto") -> FRSKDLoss:
        """Build the loss from the original script's namespace (``args.alpha``, ``args.beta``, ``args.temperature``)."""
        return cls(alpha=args.alpha, beta=args.beta, temperature=args.temperature, impl=impl)

    @overload
    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        student_feats: Any,
        teacher_feats: Any,
        targets: Any = None,
        *,
        return_parts: Literal[False] = False,
    ) -> Tensor: ...

    @overload
    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        student_feats: Any,
        teacher_feats: Any,
        targets: Any = None,
        *,
        return_parts: Literal[True],
    ) -> FRSKDLossParts: ...

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        student_feats: Any,
        teacher_feats: Any,
        targets: Any = None,
        *,
        return_parts: bool = False,
    ) -> Tensor | FRSKDLossParts:
        """Return the loss as a float32 (float64) scalar, or its parts.

        Args:
            student_logits: (N, K) raw logits of the network; float32, bfloat16, float16 or float64, any strides.
            teacher_logits: (N, K) raw logits of the self-teacher, same dtype and device.
            student_feats: list, tuple or dict of L feature maps (N, C_l, H_l, W_l); one dtype, any strides.
            teacher_feats: L maps (N, D_l, H_l, W_l) of the self-teacher; channels may differ, pixels may not.
            targets: None, class indices (N,), ``(targets_a, targets_b, lam)`` of mixup or cutmix, or probabilities (N, K).
            return_parts: return ``FRSKDLossParts`` instead of the scalar.
        """
        logits.checked_logits(student_logits, teacher_logits, "")
        if teacher_logits is None:
            raise TypeError("teacher_logits is None, but the self-teacher's logits were wanted.")
        students, teachers = attention.checked_pyramids(student_feats, teacher_feats, self.resize)
        if students[0].device != student_logits.device:
            raise ValueError(
                f"student_feats[0] is on {students[0].device}, but student_logits is on {student_logits.device} and one "
                "device was wanted."
            )
        if students[0].shape[0] != student_logits.shape[0]:
            raise ValueError(
                f"student_feats[0] has batch size {students[0].shape[0]}, but student_logits has {student_logits.shape[0]} "
                "and one batch size was wanted."
            )
        if (students[0].dtype == torch.float64) != (student_logits.dtype == torch.float64):
            raise TypeError(
                f"student_feats[0] has dtype {students[0].dtype}, but student_logits has {student_logits.dtype} and "
                "either both or neither in float64 was wanted; cast one of them."
            )
        name = _dispatch.choose_for("combine", self.impl, student_logits)
        labels = logits.checked_labels(
            targets, (student_logits,), False, self.ignore_index, check_range=name == "reference"
        )
        settings = objective.Objective(
            self.alpha,
            self.beta,
            self.exponent,
            logits.Settings(labels.mix, self.label_smoothing, self.ignore_index, self.temperature),
        )
        if self.beta == 0.0:
            students = teachers = ()
        total, parts = objective.objective(student_logits, teacher_logits, labels, students, teachers, settings, name)
        if return_parts:
            return FRSKDLossParts(total, parts[1], parts[2], parts[3], parts[4])
        return total

    def extra_repr(self) -> str:
        """The settings, shown by ``print(module)``."""
        return f"alpha={self.alpha}, beta={self.beta}, temperature={self.temperature}, impl={self.impl!r}"
