"""Hostile arguments of the compiled functions of the operation `channel_moments`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from problems._hostile import FLOATING, Hostile


class _Drawn:
    """Maps of one shape, and numbers of its channels."""

    def __init__(self, hostile: Hostile) -> None:
        self.hostile = hostile
        self.kind = hostile.random.choice(FLOATING)
        self.wide = torch.float64 if self.kind == torch.float64 else torch.float32
        self.shape = [hostile.size() for _ in range(4)]

    def map(self) -> Tensor:
        return self.hostile.tensor(self.shape, self.kind)

    def numbers(self) -> Tensor:
        return self.hostile.working(*self.shape[:2], dtype=self.wide).nan_to_num(0.5)


def _forward(hostile: Hostile) -> tuple[Any, ...]:
    drawn = _Drawn(hostile)
    transfers = hostile.random.random() < 0.5
    given = [hostile.often(drawn.numbers() if transfers else None, None, drawn.numbers()) for _ in range(2)]
    out = hostile.often(drawn.map() if transfers else None, None, drawn.map())
    settings = hostile.number(1e-5), hostile.random.random() < 0.5
    return (drawn.map(), *given, *settings, drawn.numbers(), drawn.numbers(), out)


def _affine(hostile: Hostile) -> tuple[Any, ...]:
    drawn = _Drawn(hostile)
    return (drawn.map(), *(drawn.numbers() for _ in range(3)), drawn.map())


def _sums(hostile: Hostile) -> tuple[Any, ...]:
    drawn = _Drawn(hostile)
    return (drawn.map(), drawn.map(), *(drawn.numbers() for _ in range(3)))


ENTRY_POINTS = {
    "channel_moments_forward": _forward,
    "channel_moments_affine": _affine,
    "channel_moments_sums": _sums,
}
