"""Hostile arguments of the compiled functions of the operation `attention`."""

from __future__ import annotations

from typing import Any

import torch

from frskd_fast.reference.dtypes import accumulate_dtype
from problems._hostile import FLOATING, Hostile


def _attention_forward(hostile: Hostile) -> tuple[Any, ...]:
    levels, batch = hostile.often(hostile.random.choice([1, 2, 3]), 0), hostile.size()
    dtype = hostile.random.choice(FLOATING)
    sizes = [(hostile.size(), hostile.size(), hostile.size(), hostile.size()) for _ in range(levels)]
    students = [hostile.tensor([batch, c, h, w], dtype) for c, _, h, w in sizes]
    teachers = [hostile.tensor([batch, d, h, w], dtype) for _, d, h, w in sizes]
    teachers = hostile.often(teachers, teachers[:-1])
    numel = batch * sum(h * w for _, _, h, w in sizes)
    kind = accumulate_dtype(dtype)
    coefficients = [hostile.often(hostile.working(numel, dtype=kind), None) for _ in range(2)]
    exponent = hostile.number(hostile.random.choice([1.0, 1.5, 2.0, 3.0, 4.0]))
    return students, teachers, exponent, hostile.working(levels, batch, dtype=kind), *coefficients, None


def _attention_backward(hostile: Hostile) -> tuple[Any, ...]:
    levels, batch = hostile.often(hostile.random.choice([1, 2]), 0), hostile.size()
    dtype = hostile.random.choice(FLOATING)
    sizes = [(hostile.size(), hostile.size(), hostile.size()) for _ in range(levels)]
    features = [hostile.tensor([batch, c, h, w], dtype) for c, h, w in sizes]
    gradients = [torch.empty_like(feature) if feature.device.type == "cpu" else feature for feature in features]
    gradients = hostile.often(gradients, gradients[:-1], [hostile.tensor([batch, 3, 2, 2], dtype)] * levels)
    kind = accumulate_dtype(dtype)
    grad = hostile.tensor([levels, batch], kind)
    coefficients = hostile.working(batch * sum(h * w for _, h, w in sizes), dtype=kind)
    return grad, hostile.number(0.5), features, coefficients, hostile.number(2.0), gradients


def _attention_map(hostile: Hostile) -> tuple[Any, ...]:
    shape = [hostile.size() for _ in range(4)]
    dtype = hostile.random.choice(FLOATING)
    kind = accumulate_dtype(dtype)
    return (
        hostile.tensor(shape, dtype),
        hostile.number(2.0),
        hostile.working(shape[0], shape[2] * shape[3], dtype=kind),
        hostile.working(shape[0], dtype=kind),
    )


ENTRY_POINTS = {
    "attention_forward": _attention_forward,
    "attention_backward": _attention_backward,
    "attention_map": _attention_map,
}
