"""Problems of the operation ``mutual_logits``: the loss of FFL, by every implementation."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

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


IGNORED = -7


def cross_entropy(z: Tensor, targets: Tensor) -> Tensor:
    """The mean over the images that have a label; 0 without any."""
    return F.cross_entropy(z, targets, ignore_index=IGNORED, reduction="sum") / (targets != IGNORED).sum().clamp_min(1)


def plain(logits: list[Tensor], targets: Any, offset: float) -> Tensor:
    """The objective in the original's order of operations."""
    *networks, fused = logits
    first, second, mix = targets if isinstance(targets, tuple) else (targets, targets, 1.0)
    loss = sum(mix * cross_entropy(z, first) + (1 - mix) * cross_entropy(z, second) for z in logits)
    for z, t in [*((z, fused) for z in networks), (fused, sum(networks) / len(networks))]:
        q = F.softmax(t.detach() / TEMPERATURE, 1) + offset
        ratio = torch.log(q) - F.log_softmax(z / TEMPERATURE, 1)
        loss = loss + WEIGHT * TEMPERATURE**2 * (q * ratio).sum() / max(len(z), 1)
    return loss


@dataclass(frozen=True)
class Mutual:
    """The loss of `networks` networks and their fused classifier, and its gradients."""

    networks: int
    rows: int
    classes: int
    dtype: torch.dtype
    offset: float = 1e-7
    labels: str = "of all rows"  # "of some rows", "of no row", "mixed"

    @property
    def name(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        size = f"{self.networks} networks, {self.rows} rows of {self.classes} classes"
        return f"{size}, labels {self.labels}, offset {self.offset}, {dtype}"

    def run(self, implementation: str, device: str) -> None:
        generator = torch.Generator().manual_seed(1)
        shape = (self.networks + 1, self.rows, self.classes)
        given = (2 * torch.randn(shape, generator=generator)).to(self.dtype).to(device)
        targets: Any = torch.randint(self.classes, (self.rows,), generator=generator).to(device)
        if self.labels in ("of some rows", "of no row"):
            targets[:: 2 if self.labels == "of some rows" else 1] = IGNORED
        labels = Labels((targets,), (), 1.0)
        if self.labels == "mixed":  # what is mixed is the business of operation `logits`, all else of this one
            labels = Labels((targets,), (targets.flip(0),), 0.3)
            targets = (targets, targets.flip(0), 0.3)

        def run(dtype: torch.dtype, ours: bool) -> list[Tensor]:
            logits = [z.to(dtype, copy=True).requires_grad_() for z in given]
            if ours:
                settings = MutualSettings(TEMPERATURE, self.offset, IGNORED)
                name = _dispatch.choose_for("mutual_logits", implementation, logits[0])
                wide = torch.float64 if dtype == torch.float64 else torch.float32
                weight = torch.tensor(WEIGHT, dtype=wide, device=device)
                loss, _ = mutual_objective(logits, labels, weight, settings, name)
            else:
                loss = plain(logits, targets, self.offset)
            return [loss.detach(), *torch.autograd.grad(UPSTREAM * loss, logits)]

        names = ("loss", *(f"gradient {head}" for head in range(self.networks + 1)))
        results = run(self.dtype, True), run(self.dtype, False), run(torch.float64, False)
        for name, mine, theirs, true in zip(names, *results, strict=True):
            # Probabilities and targets cancel in a gradient.
            scale = 8.0 if name == "loss" else UPSTREAM * TEMPERATURE / max(self.rows, 1)
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
    Mutual(2, 0, 4, torch.float32),
    *(Mutual(2, 5, 9, torch.float32, labels=labels) for labels in ("of some rows", "of no row", "mixed")),
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
