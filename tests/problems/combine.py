"""Problems of the operation ``combine``: the scalars of an objective from unreduced losses."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from numerics import assert_close
from torch import Tensor

from frskd_fast import _dispatch, last_impl
from frskd_fast.ops.combine import combine
from frskd_fast.reference import combine as reference
from problems._memory import poisoned_memory

ALPHA, BETA = 2.0, 100.0
PARTS = ("total", "ce_student", "ce_teacher", "kd", "feature")


def formula(attention_losses: Tensor, logits_losses: Tensor, has_targets: bool) -> Tensor:
    """The parts by one PyTorch operation for each step of docs/contracts.md."""
    valid = logits_losses[3].sum() if has_targets else logits_losses.new_zeros(())
    inverse_valid = (valid != 0) / valid.masked_fill(valid == 0, 1.0)
    ce_student, ce_teacher = (
        logits_losses[row].sum() * inverse_valid if has_targets else logits_losses.new_zeros(()) for row in (0, 1)
    )
    kd = logits_losses[2].sum() / max(logits_losses.shape[1], 1)
    feature = attention_losses.sum() / max(attention_losses.shape[1], 1)
    total = ce_student + ce_teacher + ALPHA * kd + BETA * feature
    return torch.stack([total, ce_student, ce_teacher, kd, feature])


def _by_reference(attention_losses: Tensor, logits_losses: Tensor, has_targets: bool) -> Tensor:
    weight = logits_losses[3] if has_targets else torch.zeros_like(logits_losses[3])
    terms = [reference.weighted_mean(row.where(weight != 0, 0.0), weight) for row in logits_losses[:2]]
    terms.append(logits_losses[2].sum() / max(logits_losses.shape[1], 1))
    terms.append(attention_losses.sum() / max(attention_losses.shape[1], 1))
    return torch.stack([reference.combine(*terms, ALPHA, BETA), *terms])


def solve(attention_losses: Tensor, logits_losses: Tensor, has_targets: bool, implementation: str) -> Tensor:
    """The parts by `implementation`; the scalars beside them must hold the same numbers."""
    name = _dispatch.choose_for("combine", implementation, logits_losses)
    if _dispatch.is_plain(name):
        return _by_reference(attention_losses, logits_losses, has_targets)
    with poisoned_memory():
        parts, (total,) = combine(attention_losses, logits_losses, ALPHA, BETA, has_targets, False, name)
        again, apart = combine(attention_losses, logits_losses, ALPHA, BETA, has_targets, True, name)
    assert last_impl()["combine"] == name
    same = functools.partial(torch.testing.assert_close, rtol=0, atol=0, equal_nan=True)
    same(total, parts[0])
    same(again, parts)
    same(torch.stack(apart), parts[1:4])
    return parts


@dataclass(frozen=True)
class Combine:
    """Random losses of so many levels, samples and rows; half of the rows do not count."""

    levels: int
    batch: int
    rows: int
    has_targets: bool
    dtype: torch.dtype = torch.float32

    @property
    def name(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        targets = "with" if self.has_targets else "without"
        return f"{self.levels} levels of {self.batch} samples, {self.rows} rows {targets} targets, {dtype}"

    def run(self, implementation: str, device: str) -> None:
        generator = torch.Generator().manual_seed(1)
        attention_losses = torch.rand(self.levels, self.batch, generator=generator, dtype=self.dtype)
        logits_losses = torch.rand(4, self.rows, generator=generator, dtype=self.dtype)
        logits_losses[3] = (logits_losses[3] > 0.5).to(self.dtype)
        logits_losses[:2] *= logits_losses[3]
        given = attention_losses.to(device), logits_losses.to(device)
        parts = solve(*given, self.has_targets, implementation)
        plain = formula(*given, self.has_targets)
        truth = formula(given[0].double(), given[1].double(), self.has_targets)
        assert parts.dtype == self.dtype
        for part, mine, theirs, true in zip(PARTS, parts, plain, truth, strict=True):
            assert_close(mine, theirs, true, f"{self.name}: {part}")
        for tensor, copy in zip(given, (attention_losses, logits_losses), strict=True):
            assert torch.equal(tensor.cpu(), copy), "an input was written to"


@dataclass(frozen=True)
class NoValidRow:
    """Where no row counts the cross-entropies are 0, not NaN."""

    name: str = "no row counts"

    def run(self, implementation: str, device: str) -> None:
        losses = torch.zeros(4, 3, device=device)
        losses[2] = 1.0
        parts = solve(torch.zeros(0, 3, device=device), losses, True, implementation)
        assert parts.tolist() == [ALPHA, 0.0, 0.0, 1.0, 0.0]


@dataclass(frozen=True)
class NanIsNotHidden:
    """A NaN in one row makes its term and the total NaN, and no other."""

    row: int

    @property
    def name(self) -> str:
        return f"a NaN in {PARTS[1 + self.row]}"

    def run(self, implementation: str, device: str) -> None:
        losses = torch.zeros(4, 3, device=device)
        losses[self.row, 1] = float("nan")
        losses[3] = 1.0
        parts = solve(torch.zeros(1, 3, device=device), losses, True, implementation)
        wanted = [part in ("total", PARTS[1 + self.row]) for part in PARTS]
        assert parts.isnan().tolist() == wanted


PROBLEMS = [
    *(
        Combine(levels, batch, rows, has_targets, dtype)
        # One number of each, tails of blocks, more rows than one program of the Triton kernel sums, none at all.
        for levels, batch, rows in ((3, 5, 7), (0, 5, 5), (1, 1, 1), (4, 600, 2100), (2, 3, 40_000), (2, 0, 0))
        for has_targets in (True, False)
        for dtype in (torch.float32, torch.float64)
    ),
    NoValidRow(),
    *(NanIsNotHidden(row) for row in range(3)),
]


def _launch(rows: int) -> None:
    """The raw Triton function on the losses of a training step."""
    from frskd_fast.kernels import combine as kernels

    for split in (False, True):
        kernels.forward(torch.zeros(4, 128), torch.zeros(4, rows), ALPHA, BETA, True, split)


COMPILED: dict[str, Callable[[], None]] = {
    "128 rows": functools.partial(_launch, 128),
    "200,000 rows": functools.partial(_launch, 200_000),
}
