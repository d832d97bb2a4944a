"""CollaborativeTeaching: a scratch teacher's logits at every step, an expert's attention (Zhao et al., arXiv 1907.09643)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor

from frskd_fast import _dispatch
from frskd_fast.losses.base import Loss, check_beside_logits
from frskd_fast.ops import _checks, attention, logits
from frskd_fast.ops.head_objective import Sources, head_objective
from frskd_fast.ops.labels import checked_labels, is_mix, mixed_probabilities
from frskd_fast.reference.dtypes import accumulate_dtype
from frskd_fast.reference.logits import Settings

__all__ = ["CTKDLoss", "CollaborativeTeachingLoss", "CollaborativeTeachingLossParts"]

ATTENTION_ON = {"student": ("student",), "scratch": ("scratch",), "both": ("student", "scratch")}


class CollaborativeTeachingLossParts(NamedTuple):
    """What ``CollaborativeTeachingLoss(..., return_parts=True)`` returns: all but ``loss`` detached and unweighted."""

    loss: Tensor
    ce_student: Tensor
    ce_scratch: Tensor
    hint: Tensor
    attention: Tensor  # (L,), summed over the networks that learn it; of beta 0 it is empty
    kd: Tensor  # 0 unless gamma is 0


class CollaborativeTeachingLoss(Loss[CollaborativeTeachingLossParts]):
    """CE(scratch) + CE(student) + gamma / B * sum_nk (z_scratch - z_student)^2 + beta * sum_l AT_l.

    ``gamma`` multiplies the hint: raw logits, no softmax, a sum over classes; the scratch teacher gets no gradient from it.
    ``beta`` multiplies the attention transfer AT_l = mean_{n,hw} (q - q_expert)^2 with q = a / max(||a||_2, 1e-12),
    a = mean_c f^2, of the maps of the student, of the scratch teacher, or of both. The expert gets no gradient.

    With gamma = 0 there is no scratch teacher, and the expert teaches by its logits, too:
    (1 - alpha) * CE(student) + 2 * alpha / K * KD(student, expert) + beta * sum_l AT_l, with K classes and KD as in `KDLoss`.

    Arithmetic is float32 (float64 for float64 inputs) whatever the dtype of the inputs.

    Args:
        beta: weight of the summed attention terms, finite; with 0 they are not computed, and no feature maps are read.
        gamma: weight of the hint, finite.
        attention_on: whose maps learn the expert's attention: "student", as the method is described; "scratch", as the
            released code computes it; "both", the sum of the two.
        batch_size: B > 0, by which the hint is divided; None is the number of rows. The released code divides by the
            configured batch size, also where the last batch is smaller.
        alpha: weight of KD, finite, where gamma is 0.
        temperature: T > 0 of KD, where gamma is 0.
        label_smoothing: in [0, 1], of the cross-entropies.
        ignore_index: class index whose rows do not count in the cross-entropies (they still count elsewhere).
        resize: None (maps of different size are an error) or ``"pool"`` (average-pool the larger one).
        impl: ``"auto"``, ``"reference"``, ``"cpu"``, ``"triton"`` or ``"cuda"``.

    Raises:
        TypeError, ValueError: a sentence naming the argument, what came and what was wanted.
        RuntimeError: when ``impl`` cannot run here.

    Example:
        >>> import torch
        >>> from frskd_fast.losses import CollaborativeTeachingLoss
        >>> student_logits, scratch_logits = (torch.zeros(8, 100, requires_grad=True) for _ in range(2))
        >>> maps = [torch.ones(8, 16, 4, 4, requires_grad=True)]
        >>> expert_maps = [torch.ones(8, 32, 4, 4)]
        >>> targets = torch.arange(8)
        >>> loss = CollaborativeTeachingLoss()(student_logits, scratch_logits, maps, maps, expert_maps, targets)
        >>> round(loss.item(), 4)  # two cross-entropies of ln(100)
        9.2103
        >>> loss.backward()

    Source: Zhao et al., 2019 (arXiv 1907.09643), with the terms and their reductions of its released code; weights are those
    of Rocket Launching, from which that code was made, as the paper's were not found.
    """

    shown = ("beta", "gamma", "attention_on", "batch_size", "impl")

    def __init__(
        self,
        beta: float = 1e3,
        gamma: float = 0.03,
        attention_on: str = "student",
        batch_size: int | None = None,
        *,
        alpha: float = 0.9,
        temperature: float = 4.0,
        label_smoothing: float = 0.0,
        ignore_index: int = -100,
        resize: str | None = None,
        impl: str = "auto",
    ) -> None:
        super().__init__()
        self.beta = _checks.finite_number(beta, "beta")
        self.gamma = _checks.finite_number(gamma, "gamma")
        if attention_on not in ATTENTION_ON:
            raise ValueError(
                f"attention_on is {attention_on!r}, but {', '.join(map(repr, ATTENTION_ON))} was wanted: the network whose "
                "feature maps learn the expert's attention."
            )
        if self.gamma == 0.0 and attention_on != "student":
            raise ValueError(
                f"gamma is 0, with which there is no scratch teacher, but attention_on is {attention_on!r}; take 'student'."
            )
        if resize not in (None, "pool"):
            raise ValueError(f"resize is {resize!r}, but None or 'pool' was wanted.")
        if batch_size is not None:
            _checks.check_positive_integer("batch_size", batch_size)
        self.attention_on = attention_on
        self.batch_size = batch_size
        self.alpha = _checks.finite_number(alpha, "alpha")
        self.temperature = _checks.positive_number(temperature, "temperature")
        self.label_smoothing = _checks.unit_interval(label_smoothing, "label_smoothing")
        self.ignore_index = _checks.whole_number(ignore_index, "ignore_index")
        self.resize = resize
        self.impl = _dispatch.check_name(impl, "the argument impl")

    def forward(
        self,
        student_logits: Tensor,
        scratch_logits: Tensor | None,
        student_feats: Any,
        scratch_feats: Any,
        expert_feats: Any,
        targets: Any,
        expert_logits: Tensor | None = None,
        *,
        return_parts: bool = False,
    ) -> Tensor | CollaborativeTeachingLossParts:
        """Return the loss as a float32 (float64) scalar, or its parts.

        Args:
            student_logits: (N, K) raw logits; float32, bfloat16, float16 or float64, any strides.
            scratch_logits: (N, K) raw logits of the scratch teacher, same dtype and device. With gamma = 0 not read.
            student_feats: list, tuple or dict of L feature maps (N, C_l, H_l, W_l); one dtype, any strides. Not read where
                `attention_on` is "scratch".
            scratch_feats: L maps of the scratch teacher. Not read where `attention_on` is "student".
            expert_feats: L maps (N, D_l, H_l, W_l) of the expert; channels may differ, pixels may not.
            targets: class indices (N,), ``(targets_a, targets_b, lam)`` of mixup or cutmix, or probabilities (N, K).
            expert_logits: (N, K) raw logits of the expert, wanted where gamma is 0 and alpha is not, otherwise not read.
            return_parts: return ``CollaborativeTeachingLossParts`` instead of the scalar.
        """
        if targets is None:
            raise TypeError("targets is None, but class indices (N,) were wanted.")
        self._check_logits(student_logits, scratch_logits, expert_logits)
        if self.gamma == 0.0:
            loss, terms = self._from_the_expert(student_logits, expert_logits, targets)
        else:
            assert scratch_logits is not None
            loss, terms = self._from_the_scratch_teacher(student_logits, scratch_logits, targets)
        if self.beta == 0.0:
            by_level = loss.new_zeros((0,))
        else:
            pairs = {"student": student_feats, "scratch": scratch_feats}
            by_level = self._attention(
                {name: pairs[name] for name in ATTENTION_ON[self.attention_on]}, expert_feats, student_logits
            )
            loss = loss.add(by_level.sum(), alpha=self.beta)
        if not return_parts:
            return loss
        ce_student, ce_scratch, hint, kd = (term.detach() for term in terms)
        return CollaborativeTeachingLossParts(loss, ce_student, ce_scratch, hint, by_level.detach(), kd)

    def _check_logits(self, student: Any, scratch: Any, expert: Any) -> None:
        teacher, name = (expert, "expert_logits") if self.gamma == 0.0 else (scratch, "scratch_logits")
        if teacher is None and self.gamma != 0.0:
            raise TypeError("scratch_logits is None, but the scratch teacher's logits were wanted.")
        if teacher is None and self.alpha != 0.0:
            raise TypeError(
                f"expert_logits is None, but gamma is 0 and alpha {self.alpha}, with which the student learns the expert's "
                "logits; give them, or set alpha to 0."
            )
        logits.checked_logits(student, teacher, "", ("student_logits", name))
        if student.dim() != 2:
            raise ValueError(f"student_logits has shape {tuple(student.shape)}, but (N, K) was wanted.")

    def _from_the_scratch_teacher(self, student: Tensor, scratch: Tensor, targets: Any) -> tuple[Tensor, list[Tensor]]:
        """CE(scratch) + CE(student) + gamma * hint, and the unweighted terms."""
        if is_mix(targets) and isinstance(targets[2], Tensor):
            targets = mixed_probabilities(targets, student, self.ignore_index, self.label_smoothing)
        impl = _dispatch.choose_for("logits", self.impl, student)
        pair = (student, scratch)
        labels = checked_labels(targets, pair, False, self.ignore_index, check_range=_dispatch.is_plain(impl))
        places = [(2, 2), (3, 3)] if labels.second else [(2, 2), ()]
        ce, terms = head_objective(
            [*pair, labels.first[0], *labels.second[:1]],
            Sources(2, (), *places),
            Settings(labels.mix, self.label_smoothing, self.ignore_index, 1.0),
            impl,
        )
        dtype = accumulate_dtype(student.dtype)
        batch = max(student.shape[0], 1) if self.batch_size is None else self.batch_size
        hint = F.mse_loss(student.to(dtype), scratch.detach().to(dtype), reduction="sum") / batch
        return ce.add(hint, alpha=self.gamma), [*terms[0].unbind(), hint, terms.new_zeros(())]

    def _from_the_expert(self, student: Tensor, expert: Tensor | None, targets: Any) -> tuple[Tensor, list[Tensor]]:
        """(1 - alpha) * CE(student) + 2 * alpha / K * KD, and the unweighted terms."""
        teacher = None if expert is None or self.alpha == 0.0 else expert.detach()
        settings = (self.temperature, self.label_smoothing, self.ignore_index, "batchmean", True, self.impl)
        ce, _, kd = logits.logit_losses(student, teacher, targets, *settings)
        loss = (1.0 - self.alpha) * ce
        if teacher is not None:
            loss = loss.add(kd, alpha=2.0 * self.alpha / student.shape[1])
        absent = kd.new_zeros(())
        return loss, [ce, absent, absent, kd]

    def _attention(self, networks: dict[str, Any], expert_feats: Any, student_logits: Tensor) -> Tensor:
        """AT_l of all levels, summed over the networks, (L,), in one call."""
        students: list[Tensor] = []
        experts: list[Tensor] = []
        for network, feats in networks.items():
            name = f"{network}_feats"
            maps, expert_maps = attention.checked_pyramids(feats, expert_feats, self.resize, (name, "expert_feats"))
            check_beside_logits(maps[0], f"{name}[0]", student_logits)
            students += maps
            experts += expert_maps
        by_level = attention.attention_transfer(students, experts, 2.0, "levels", None, True, self.impl)
        return by_level if len(networks) == 1 else by_level.view(len(networks), -1).sum(0)


# The authors' name. It is an alias, because a later method, Curriculum Temperature (AAAI 2023), is better known by it.
CTKDLoss = CollaborativeTeachingLoss
