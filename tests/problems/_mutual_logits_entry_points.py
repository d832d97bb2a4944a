"""Hostile arguments of the compiled function of the operation `mutual_logits`."""

from __future__ import annotations

from typing import Any

import torch

from problems._hostile import FLOATING, Hostile


def _forward(hostile: Hostile) -> tuple[Any, ...]:
    kind = hostile.random.choice(FLOATING)
    wide = torch.float64 if kind == torch.float64 else torch.float32
    rows, classes, heads = hostile.size(), hostile.size(), hostile.random.choice([3, 3, 4])
    targets = torch.randint(-1, max(classes, 1) + 1, (rows,))
    return (
        [hostile.tensor([rows, classes], kind) for _ in range(hostile.often(heads, 0, 2))],
        hostile.often(hostile.random.choice([targets, None]), targets[:-1], targets.int(), targets.to("meta")),
        hostile.working(dtype=wide).nan_to_num(0.5),
        hostile.number(3.0),
        hostile.number(1e-7),
        hostile.random.choice([-100, -1, 0]),
        hostile.working(dtype=wide),
        hostile.working(2, heads, dtype=wide),
        hostile.working(2, heads, rows, dtype=wide),
        hostile.working(heads, rows, classes, dtype=wide),
    )


ENTRY_POINTS = {
    "mutual_logits_forward": _forward,
}
