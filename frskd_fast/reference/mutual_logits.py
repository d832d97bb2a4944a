"""The divergences between several networks and the classifier that fuses their maps, towards probabilities with an offset."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from frskd_fast.reference.dtypes import accumulate_dtype


class MutualSettings(NamedTuple):
    """The numbers of one call; all plain Python, so that a traced graph holds them as constants."""

    temperature: float
    offset: float  # added to every probability that is a target
    ignore_index: int


def mutual_divergences(logits: Sequence[Tensor], temperature: float, offset: float) -> Tensor:
    """J of S networks, then of the fused classifier, (S + 1,), given their logits (N, K) in this order.

    J = T^2 / N * sum q (log q - log softmax(z / T)), q = softmax(t / T) + offset, detached and not renormalised. The networks'
    t are the fused logits, and the fused classifier's the mean of the networks'. q = 0 contributes 0.
    """
    *networks, fused = (one.to(accumulate_dtype(one.dtype)) for one in logits)
    ensemble = torch.stack(networks).mean(0)
    terms = []
    for student, teacher in [*((network, fused) for network in networks), (fused, ensemble)]:
        log_student = torch.log_softmax(student / temperature, 1)
        target = torch.softmax(teacher.detach() / temperature, 1) + offset
        log_target = target.clamp_min(torch.finfo(target.dtype).tiny).log()
        difference = (log_target - log_student).masked_fill(target == 0, 0.0)
        terms.append(temperature**2 / max(student.shape[0], 1) * (target * difference).sum())
    return torch.stack(terms)
