"""Problems of the operation ``mutual_logits``: the loss of FFL, by every implementation."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from numerics import assert_close
from torch import Tensor

from frskd_fast import _dispatch
from frskd_fast.ops.labels import Labels
from frskd_fast.ops.mutual_logits import mutual_objective
from frskd_fast.reference.mutual_logits import MutualSettings
from problems._mutual_logits_entry_points import ENTRY_POINTS as ENTRY_POINTS

TEMPERATURE, WEIGHT, UPSTREAM = 3.0, 0.6, 64.0


def plain(logits: list[Tensor], targets: Tensor, offset: float) -> Tensor:
    """The objective in the original's order of operations."""
    *networks, fused = logits
    loss = sum(F.cross_entropy(z, targets) for z in logits)
    for z, t in [*((z, fused) for z in networks), (fused, sum(networks) / len(networks))]:
        q = F.softmax(t.detach() / TEMPERATURE, 1) + offset
        ratio = torch.log(q) - F.log_softmax(z / TEMPERATURE, 1)
        loss = loss + WEIGHT * TEMPERATURE**2 * (q * ratio).sum() / len(z)
    return loss


@dataclass(frozen=True)
class Mutual:
    """The loss of `networks` networks and their fused classifier, and its gradients."""

    networks: int
    rows: int
    classes: int
    dtype: torch.dtype
    offset: float = 1e-7

    @property
    def name(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.networks} networks, {self.rows} rows of {self.classes} classes, offset {self.offset}, {dtype}"

    def run(self, implementation: str, device: str) -> None:
        generator = torch.Generator().manual_seed(1)
        shape = (self.networks + 1, self.rows, self.classes)
        given = (2 * torch.randn(shape, generator=generator)).to(self.dtype).to(device)
        targets = torch.randint(self.classes, (self.rows,), generator=generator).to(device)

        def run(dtype: torch.dtype, ours: bool) -> list[Tensor]:
            logits = [z.to(dtype, copy=True).requires_grad_() for z in given]
            if ours:
                settings = MutualSettings(TEMPERATURE, self.offset, -100)
                name = _dispatch.choose_for("mutual_logits", implementation, logits[0])
                wide = torch.float64 if dtype == torch.float64 else torch.float32
                weight = torch.tensor(WEIGHT, dtype=wide, device=device)
                loss, _ = mutual_objective(logits, Labels((targets,), (), 1.0), weight, settings, name)
            else:
                loss = plain(logits, targets, self.offset)
            return [loss.detach(), *torch.autograd.grad(UPSTREAM * loss, logits)]

        names = ("loss", *(f"gradient {head}" for head in range(self.networks + 1)))
        results = run(self.dtype, True), run(self.dtype, False), run(torch.float64, False)
        for name, mine, theirs, true in zip(names, *results, strict=True):
            # Probabilities and targets cancel in a gradient.
            scale = 8.0 if name == "loss" else UPSTREAM * TEMPERATURE / self.rows
            assert_close(mine, theirs, true, f"{self.name}: {name}", scale=scale)


PROBLEMS = [
    *(
        Mutual(networks, rows, classes, dtype)
        for networks, rows, classes in ((2, 5, 7), (3, 1, 1), (5, 3, 16))
        for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    ),
    Mutual(2, 7, 100, torch.float32),
    Mutual(2, 2, 1001, torch.bfloat16),
    Mutual(2, 6, 11, torch.float64, 0.0),
    Mutual(2, 6, 11, torch.float32, 0.1),
]


def _launch(networks: int, classes: int, dtype: torch.dtype) -> None:
    """The raw Triton function on the logits of a training step."""
    from frskd_fast.kernels import mutual_logits as kernels

    logits = [torch.zeros(128, classes, dtype=dtype)] * (networks + 1)
    settings = MutualSettings(TEMPERATURE, 1e-7, -100)
    for targets in (torch.zeros(128, dtype=torch.int64), None):
        kernels.forward(logits, targets, torch.ones(()), settings)


COMPILED: dict[str, Callable[[], None]] = {
    "two networks, 100 classes": functools.partial(_launch, 2, 100, torch.float32),
    "four networks, 1000 classes, bfloat16": functools.partial(_launch, 4, 1000, torch.bfloat16),
}
