"""The objective sum_h [CE_h + KD_h] over several heads of class logits, with one kernel each way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from frskd_fast import _dispatch
from frskd_fast.ops import logits
from frskd_fast.ops._autograd import once_differentiable
from frskd_fast.ops.labels import kept
from frskd_fast.reference.combine import weighted_mean
from frskd_fast.reference.logits import Heads, Saved, Settings, Upstream, Wanted


class Sources(NamedTuple):
    """Where in one list of tensors those of every head stand; one tensor may serve several heads.

    The list begins with the students' logits, which get the gradients.
    """

    students: int  # how many heads
    teachers: Sequence[int]  # one position for each head, or none
    targets: Sequence[int]  # one for each head
    targets_b: Sequence[int]  # one for each head, or none

    def heads(self, tensors: Sequence[Tensor]) -> Heads:
        """The arguments of the operation."""
        return Heads(
            list(tensors[: self.students]),
            [tensors[place] for place in self.teachers],
            [tensors[place] for place in self.targets],
            [tensors[place] for place in self.targets_b],
        )


class _HeadObjective(torch.autograd.Function):
    """The total (scalar) and its terms (2, heads), cross-entropies and divergences."""

    @staticmethod
    def forward(ctx: Any, sources: Sources, settings: Settings, impl: str, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        heads = sources.heads(tensors)
        saved = Saved(*logits.forward(heads, settings, impl))
        ctx.save_for_backward(*saved, *tensors)
        ctx.call = sources, settings, impl
        rows = heads.students[0].shape[0]
        terms = saved.losses.view(4, sources.students, rows)[::2].sum(2)
        # The cross-entropies count the rows that have a label, the divergences, which are 0 without teachers, all of them.
        terms[0].mul_(saved.inverse_valid)
        if sources.teachers:
            terms[1].div_(max(rows, 1))
        ctx.mark_non_differentiable(terms)
        return terms.sum(), terms

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Any, ...]:
        sources, settings, impl = ctx.call
        losses, statistics, inverse_valid, *tensors = ctx.saved_tensors
        upstream = Upstream([grad] * 3, 0, 0, [1.0, 0.0, float(len(sources.teachers) > 0)], True)
        saved, wanted = Saved(losses, statistics, inverse_valid), Wanted(True, False, False)
        gradients = logits.backward(upstream, sources.heads(tensors), settings, saved, wanted, impl)
        return (None, None, None, *gradients, *([None] * (len(tensors) - len(gradients))))


def head_objective(tensors: Sequence[Tensor], sources: Sources, settings: Settings, impl: str) -> tuple[Tensor, Tensor]:
    """sum_h [CE_h + KD_h], and the detached (2, heads) of its terms: CE in the first row, KD in the second.

    The arguments are already checked: logits (rows, K_h) of the same rows, dtype and device in all heads, and labels that
    fit. Teachers get no gradient.
    """
    if not _dispatch.is_plain(impl):
        total, terms = _HeadObjective.apply(sources, settings, impl, *map(kept, tensors))
        return total, terms
    _dispatch.record("logits", impl)
    students, teachers, targets, targets_b = sources.heads(tensors)
    ces, kds = [], []
    for head, student in enumerate(students):
        ce, _, kd, weight = logits.reference_rows(
            student,
            teachers[head] if teachers else None,
            targets[head],
            targets_b[head] if targets_b else None,
            settings,
            detach_teacher=True,
        )
        ces.append(weighted_mean(ce, weight))
        kds.append(kd.sum() / max(kd.numel(), 1))
    terms = torch.stack([term.detach() for term in (*ces, *(kds or [torch.zeros_like(ce) for ce in ces]))])
    return sum(kds, sum(ces[1:], ces[0])), terms.view(2, len(students))
