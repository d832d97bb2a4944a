"""FFL: several networks and the classifier that fuses their maps teach each other (Kim et al., ICPR 2020)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from frskd_fast import _dispatch
from frskd_fast.losses.base import Loss, weight_tensor
from frskd_fast.ops import _checks
from frskd_fast.ops.labels import checked_labels, is_mix, mixed_probabilities
from frskd_fast.ops.mutual_logits import mutual_objective
from frskd_fast.reference.dtypes import accumulate_dtype
from frskd_fast.reference.mutual_logits import MutualSettings

__all__ = ["FFLLoss", "FFLLossParts"]


class FFLLossParts(NamedTuple):
    """What ``FFLLoss(..., return_parts=True)`` returns: all but ``loss`` detached and unweighted, entry s of network s."""

    loss: Tensor
    ce: Tensor  # (S,)
    ce_fused: Tensor
    kd: Tensor  # (S,), kd[s] pulls network s towards the fused classifier
    kd_fused: Tensor  # pulls the fused classifier towards the mean of the networks


class FFLLoss(Loss[FFLLossParts]):
    """sum_s CE(z_s) + CE(z_f) + consistency_weight * (sum_s J(z_s, z_f) + J(z_f, mean_s z_s)).

    z_s (N, K) are the logits of S >= 2 networks and z_f those of the classifier that sees all their maps. What pulls,
    J(z, t) = T^2 / N * sum_nk q (log q - log softmax(z / T)) with q = softmax(t / T) + target_offset, is detached from t and
    not renormalised: with the original's offset J(z, z) is about T^2 * K * 1e-7, not 0. With an offset of 0 J is `kd_loss`.

    Args:
        temperature: T > 0 of both softmaxes of J.
        target_offset: at least 0.
        ignore_index: class index whose images do not count in the cross-entropies; J keeps them.
        impl: ``"auto"``, ``"reference"``, ``"cpu"`` or ``"triton"``.

    Raises:
        TypeError, ValueError: a sentence naming the argument, what came and what was wanted.
        RuntimeError: when ``impl`` cannot run here.

    Example:
        >>> import torch
        >>> from frskd_fast.losses import FFLLoss
        >>> logits = [torch.zeros(8, 10, requires_grad=True), torch.zeros(8, 10, requires_grad=True)]
        >>> fused = torch.zeros(8, 10, requires_grad=True)
        >>> loss = FFLLoss()(logits, fused, torch.arange(8), consistency_weight=0.5)
        >>> round(loss.item(), 3)  # three times ln(10)
        6.908
        >>> loss.backward()

    Source: Kim et al., ICPR 2020 (arXiv 1904.09058), as released. More than two networks are this library's: sums over them
    and their mean.
    """

    shown = ("temperature", "target_offset", "impl")

    def __init__(
        self,
        temperature: float = 3.0,
        target_offset: float = 1e-7,
        *,
        ignore_index: int = -100,
        impl: str = "auto",
    ) -> None:
        super().__init__()
        self.temperature = _checks.positive_number(temperature, "temperature")
        self.target_offset = _checks.finite_number(target_offset, "target_offset")
        if self.target_offset < 0.0:
            raise ValueError(f"target_offset is {self.target_offset}, but at least 0 was wanted.")
        self.ignore_index = _checks.whole_number(ignore_index, "ignore_index")
        self.impl = _dispatch.check_name(impl, "the argument impl")

    def forward(
        self,
        logits: Sequence[Tensor],
        fused_logits: Tensor,
        targets: Any,
        *,
        consistency_weight: float | Tensor = 1.0,
        return_parts: bool = False,
    ) -> Tensor | FFLLossParts:
        """Return the loss as a float32 (float64) scalar, or its parts.

        Args:
            logits: of S >= 2 networks, each (N, K) raw logits; float32, bfloat16, float16 or float64, any strides.
            fused_logits: (N, K), same dtype and device.
            targets: class indices (N,), ``(targets_a, targets_b, lam)`` of mixup or cutmix, or probabilities (N, K).
            consistency_weight: of all J, a number or a tensor of one element that gets no gradient, for example one that is
                written in place as training goes on.
            return_parts: return ``FFLLossParts`` instead of the scalar.
        """
        heads = _checked_heads(logits, fused_logits)
        weight = _scalar(consistency_weight, fused_logits)
        impl = _dispatch.choose_for("mutual_logits", self.impl, fused_logits)
        if targets is None:
            raise TypeError("targets is None, but class indices (N,) were wanted.")
        if is_mix(targets) and isinstance(targets[2], Tensor):
            targets = mixed_probabilities(targets, fused_logits, self.ignore_index)
        labels = checked_labels(
            targets, (fused_logits,), False, self.ignore_index, check_range=_dispatch.is_plain(impl)
        )
        settings = MutualSettings(self.temperature, self.target_offset, self.ignore_index)
        loss, (ce, kd) = mutual_objective(heads, labels, weight, settings, impl)
        return FFLLossParts(loss, ce[:-1], ce[-1], kd[:-1], kd[-1]) if return_parts else loss


def _checked_heads(logits: Any, fused_logits: Any) -> list[Tensor]:
    """The logits of all networks, then the fused ones."""
    if not isinstance(logits, list | tuple):
        raise TypeError(f"logits is a {type(logits).__name__}, but a list of each network's logits (N, K) was wanted.")
    if len(logits) < 2:
        raise ValueError(
            f"logits has {len(logits)} entries, but those of at least two networks were wanted: one has no other to learn from."
        )
    _checks.floating_tensor(fused_logits, "fused_logits")
    shape = tuple(fused_logits.shape)
    if len(shape) != 2 or shape[1] == 0:
        raise ValueError(f"fused_logits has shape {shape}, but (N, K) with at least one class was wanted.")
    for index, one in enumerate(logits):
        name = f"logits[{index}]"
        _checks.floating_tensor(one, name)
        if tuple(one.shape) != shape:
            raise ValueError(
                f"{name} has shape {tuple(one.shape)}, but fused_logits has {shape} and equal shapes were wanted: all networks "
                "see the same images and score the same classes."
            )
        _checks.same(fused_logits, "fused_logits", one, name)
    return [*logits, fused_logits]


def _scalar(weight: Any, like: Tensor) -> Tensor:
    """`weight` as a scalar tensor in the accumulate dtype, on the device of `like`."""
    if isinstance(weight, Tensor):
        return weight_tensor(weight, "consistency_weight", like)
    number = _checks.finite_number(weight, "consistency_weight")
    return torch.full((), number, dtype=accumulate_dtype(like.dtype), device=like.device)
