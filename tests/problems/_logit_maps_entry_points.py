"""Hostile arguments of the compiled functions of the operation `logit_maps`."""

from __future__ import annotations

from typing import Any

import torch

from problems._hostile import FLOATING, Hostile


class _Call:
    """What the functions share: sizes and dtypes, and the first arguments, drawn for one seed."""

    def __init__(self, hostile: Hostile) -> None:
        self.hostile = hostile
        self.dtype = hostile.random.choice(FLOATING)
        self.wide = torch.float64 if self.dtype == torch.float64 else torch.float32
        n, k, h, w = hostile.random.choice([0, 1, 2]), *(max(hostile.size(), 1) for _ in range(3))
        self.shape = [n, k, hostile.often(h, 0), w]
        self.height, self.width = h + hostile.random.choice([0, 3]), w + hostile.random.choice([0, 7])
        self.pixels = (n, self.height, self.width)
        self.has_teacher, self.has_targets = (hostile.random.random() < 0.8 for _ in range(2))

    def inputs(self) -> tuple[Any, ...]:
        hostile, k = self.hostile, self.shape[1]
        targets = hostile.layout(torch.randint(-1, k + 1, self.pixels))
        weights = hostile.random.choice([None, torch.rand(k, dtype=self.wide)])
        return (
            hostile.tensor(self.shape, self.dtype),
            hostile.tensor(self.shape, self.dtype) if self.has_teacher else None,
            hostile.often(targets, targets[:-1], targets.int(), targets.to("meta")) if self.has_targets else None,
            hostile.often(weights, torch.rand(k + 1, dtype=self.wide)),
            hostile.often(self.height, -1, 2**40),
            hostile.often(self.width, 0),
            hostile.often(0.1, -1.0, float("nan")),
            hostile.random.choice([255, -1, 0]),
            hostile.often(2.0, 0.0, float("inf")),
        )

    def maps(self, *present: bool) -> list[Any]:
        """Gradient maps, and some that cannot be."""
        hostile = self.hostile
        return [
            hostile.tensor(self.shape, self.wide) if hostile.often(there, True) and hostile.often(True, False) else None
            for there in present
        ]


def _sums(hostile: Hostile) -> tuple[Any, ...]:
    hostile.right = 0.97
    call = _Call(hostile)
    teacher, targets = call.has_teacher, call.has_targets
    gradients = call.maps(targets, teacher, teacher and targets, teacher)
    return (*call.inputs(), hostile.working(4, dtype=call.wide), *gradients)


def _pixels(hostile: Hostile) -> tuple[Any, ...]:
    call = _Call(hostile)
    losses = [hostile.working(*call.pixels, dtype=call.wide) for _ in range(hostile.often(3, 2))]
    return (*call.inputs(), losses)


def _pixels_backward(hostile: Hostile) -> tuple[Any, ...]:
    hostile.right = 0.97
    call = _Call(hostile)
    grads = [hostile.working(*call.pixels, dtype=call.wide) for _ in range(hostile.often(3, 2))]
    return (grads, *call.inputs(), hostile.often(call.has_teacher, True), *call.maps(True, call.has_teacher))


ENTRY_POINTS = {
    "logit_maps_sums": _sums,
    "logit_maps_pixels": _pixels,
    "logit_maps_pixels_backward": _pixels_backward,
}
