"""Hostile arguments of the compiled functions of the operation `logits`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from frskd_fast.reference.dtypes import accumulate_dtype
from problems._hostile import FLOATING, Hostile


def _heads(hostile: Hostile) -> dict[str, Any]:
    count = hostile.often(hostile.random.choice([1, 2]), 0)
    dtype = hostile.random.choice(FLOATING)
    kind = accumulate_dtype(dtype)
    shapes = [[hostile.size() for _ in range(hostile.random.choice([2, 3, 4]))] for _ in range(count)]
    students = [hostile.tensor(shape, dtype) for shape in shapes]
    teachers = hostile.often([hostile.tensor(shape, dtype) for shape in shapes], [], students[:-1])
    labels = [
        hostile.layout(torch.randint(max(hostile.often(shape[1], shape[1] + 5), 1), (shape[0], *shape[2:])))
        for shape in shapes
    ]
    probabilities = [hostile.tensor(shape, kind) for shape in shapes]
    targets = hostile.random.choice([labels, labels, probabilities, []])
    targets_b = hostile.often([], labels, labels[:-1]) if targets is not labels else hostile.random.choice([[], labels])
    rows = sum(torch.Size([shape[0], *shape[2:]]).numel() for shape in shapes)
    settings = (
        hostile.number(0.3),
        hostile.often(0.1, 2.0, float("nan")),
        hostile.often(-100, 0, 1 << 62, -(1 << 62)),
        hostile.number(hostile.random.choice([1.0, 2.0, 4.0, 0.7])),
    )
    return {
        "inputs": (students, teachers, targets, targets_b, *settings),
        "count": count,
        "rows": rows,
        "kind": kind,
        "students": students,
        "teachers": teachers,
    }


def _logits_forward(hostile: Hostile) -> tuple[Any, ...]:
    heads = _heads(hostile)
    rows, kind = heads["rows"], heads["kind"]
    outputs = (
        hostile.working(4, rows, dtype=kind),
        hostile.working(6, rows, dtype=kind),
        hostile.working(heads["count"], dtype=kind),
    )
    return *heads["inputs"], *outputs


def _logits_backward(hostile: Hostile) -> tuple[Any, ...]:
    heads = _heads(hostile)
    rows, kind, count = heads["rows"], heads["kind"], heads["count"]
    strides = hostile.random.choice([(0, 0), (0, 1), (1, 0)])
    strides = hostile.often(strides, (1 << 40, 0), (-1, 5), (0, 3))
    size = max(1, 1 + (count - 1) * min(strides[0], 9) + (rows - 1) * min(strides[1], 9))
    grads = hostile.often([hostile.working(size, dtype=kind) for _ in range(3)], [])
    scales = hostile.often([1.0, 1.0, 0.5] * count, [1.0], [0.0] * (3 * count))

    def like(tensors: list[Tensor]) -> list[Tensor]:
        made = [torch.empty_like(tensor) if tensor.device.type == "cpu" else tensor for tensor in tensors]
        return hostile.often(made, [], made[:-1])

    return (
        grads,
        *strides,
        scales,
        *heads["inputs"],
        hostile.working(4, rows, dtype=kind),
        hostile.working(6, rows, dtype=kind),
        hostile.often(hostile.working(count, dtype=kind), None),
        hostile.random.random() < 0.5,
        like(heads["students"]),
        like(heads["teachers"]),
    )


ENTRY_POINTS = {
    "logits_forward": _logits_forward,
    "logits_backward": _logits_backward,
}
