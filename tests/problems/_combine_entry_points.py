"""Hostile arguments of the compiled functions of the operation `combine`."""

from __future__ import annotations

from typing import Any

import torch

from problems._hostile import Hostile


def _combine(hostile: Hostile) -> tuple[Any, ...]:
    kind = hostile.random.choice([torch.float32, torch.float64])
    levels, batch, rows = hostile.size(), hostile.size(), hostile.size()
    return (
        hostile.tensor([levels, batch], kind),
        hostile.tensor([4, rows], kind),
        hostile.number(2.0),
        hostile.number(100.0),
        hostile.random.random() < 0.5,
        hostile.working(5, dtype=kind),
        [hostile.working(dtype=kind) for _ in range(hostile.often(hostile.random.choice([1, 3]), 0, 2))],
    )


ENTRY_POINTS = {
    "combine": _combine,
}
