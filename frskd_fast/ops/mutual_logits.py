"""Operation ``mutual_logits``: cross-entropies of several networks and of their fused classifier, and how they pull each other.

Every exponential serves the loss and its gradients, which the forward pass therefore takes and keeps, in the accumulate dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from frskd_fast import _dispatch
from frskd_fast.ops import _table
from frskd_fast.ops._autograd import once_differentiable
from frskd_fast.ops.head_objective import Sources, head_objective
from frskd_fast.ops.labels import Labels, kept
from frskd_fast.reference import mutual_logits as reference
from frskd_fast.reference.dtypes import accumulate_dtype
from frskd_fast.reference.logits import Settings
from frskd_fast.reference.mutual_logits import MutualSettings


@_table.register("mutual_logits")
def forward(
    logits: Sequence[Tensor], targets: Tensor | None, weight: Tensor, settings: MutualSettings, impl: str
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, its terms (2, S + 1), cross-entropies and divergences, and its gradients (S + 1, N, K)."""
    first = logits[0]
    dtype, heads = accumulate_dtype(first.dtype), len(logits)
    return (
        first.new_empty((), dtype=dtype),
        first.new_empty((2, heads), dtype=dtype),
        first.new_empty((heads, *first.shape), dtype=dtype),
    )


class _MutualLogits(torch.autograd.Function):
    """The loss and its terms."""

    @staticmethod
    def forward(
        ctx: Any, settings: MutualSettings, impl: str, targets: Tensor | None, weight: Tensor, *logits: Tensor
    ) -> tuple[Tensor, Tensor]:
        loss, terms, gradients = forward(logits, targets, weight, settings, impl)
        ctx.save_for_backward(gradients, *logits)  # the logits for the refusal of a second derivative
        ctx.dtype = logits[0].dtype
        ctx.mark_non_differentiable(terms)
        return loss, terms

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Any, ...]:
        gradients = ctx.saved_tensors[0]
        return None, None, None, None, *(gradients * grad).to(ctx.dtype).unbind()


def mutual_objective(
    logits: Sequence[Tensor], labels: Labels, weight: Tensor, settings: MutualSettings, impl: str
) -> tuple[Tensor, Tensor]:
    """sum_h CE_h + weight * sum_h J_h, and the detached (2, S + 1) of its terms: CE in the first row, J in the second.

    The arguments are already checked: logits (N, K) of S networks, then of the fused classifier, labels of one head, and a
    scalar weight in the accumulate dtype on their device. J is that of `reference.mutual_logits.mutual_divergences`.
    """
    (targets,) = labels.first
    mixed = len(labels.second) > 0
    if not (mixed or targets.is_floating_point() or _dispatch.is_plain(impl)):
        loss, terms = _MutualLogits.apply(settings, impl, kept(targets), kept(weight), *logits)
        return loss, terms
    heads = len(logits)
    tensors = [*logits, *labels.first, *labels.second]
    sources = Sources(heads, (), [heads] * heads, [heads + 1] * heads if mixed else ())
    # Mixed labels and probabilities are the business of operation `logits`.
    ce_impl = _dispatch.choose_for("logits", impl, logits[0])
    ce_settings = Settings(labels.mix, 0.0, settings.ignore_index, settings.temperature)
    ce, ce_terms = head_objective(tensors, sources, ce_settings, ce_impl)
    if _dispatch.is_plain(impl):
        _dispatch.record("mutual_logits", impl)
        divergences = reference.mutual_divergences(logits, settings.temperature, settings.offset)
        return ce + weight * divergences.sum(), torch.stack([ce_terms[0], divergences.detach()])
    pulled, terms = _MutualLogits.apply(settings, impl, None, kept(weight), *logits)
    return ce + pulled, torch.stack([ce_terms[0], terms[1]])
