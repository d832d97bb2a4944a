"""Which rows a teacher is believed: those whose correct column it ranks best. Counted on the device, without gradients."""

from __future__ import annotations

import torch
from torch import Tensor


def rank_of(scores: Tensor, correct: Tensor) -> Tensor:
    """The position (0 = best) of column `correct` in each row's scores in descending order; (..., K), (...) -> (...).

    Of columns with equal scores, that with the smaller index comes first, as in a stable sort. A column outside [0, K) ranks
    behind all.
    """
    columns = scores.shape[-1]
    own = scores.gather(-1, correct.clamp(0, columns - 1).unsqueeze(-1))
    earlier = torch.arange(columns, device=scores.device) < correct.unsqueeze(-1)
    rank = torch.where(earlier, scores >= own, scores > own).sum(-1)
    return rank.masked_fill((correct < 0) | (correct >= columns), columns)


def row_weights(ranks: Tensor, ratio: float, dtype: torch.dtype) -> Tensor:
    """1 / kept for the correct + floor(wrong * ratio) rows of smallest rank, 0 for the others; (M,) -> (M,).

    A row of rank 0 is correct. Of rows with equal ranks, those with the smaller index are kept. With nothing kept, all are 0.
    """
    rows = ranks.shape[0]
    # In float64 the product is that of Python's int(wrong * ratio).
    wrong = (ranks > 0).sum(dtype=torch.float64)
    kept = (wrong * ratio).floor() - wrong + rows
    by_position = torch.arange(rows, device=ranks.device) < kept
    weights = by_position.to(dtype) / kept.clamp_min(1.0).to(dtype)
    return torch.zeros_like(weights).scatter(0, ranks.argsort(stable=True), weights)
