"""Hostile arguments of the compiled functions of the operation `fusion` and its convolution."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from frskd_fast.reference.dtypes import accumulate_dtype
from problems._hostile import FLOATING, Hostile


class _FusionNode:
    """A node of a weighted feature pyramid: what all three of its entry points are given."""

    def __init__(self, hostile: Hostile) -> None:
        hostile.right = 0.98  # of many more arguments than elsewhere

        def side() -> int:
            return hostile.random.choice([1, 1, 2, 3, 4, 5, 9])

        self.count = hostile.often(hostile.random.choice([1, 2, 3, 4]), 0, 5)
        self.channels = hostile.often(hostile.random.choice([1, 2, 3, 8, 9, 17]), 0, 1100)
        batch, height, width = hostile.often(hostile.random.choice([1, 2, 3]), 0), side(), side()
        dtype = hostile.random.choice(FLOATING)
        self.kind = accumulate_dtype(dtype)
        self.resamples = [hostile.random.choice([0, 0, 1, 2]) for _ in range(self.count)]
        self.inputs = []
        for resample in self.resamples:
            size = [height, width]
            if resample == 1:
                size = [hostile.random.randint(1, length) for length in size]
            elif resample == 2:
                size = [2 * length - hostile.random.randrange(2) for length in size]
            # A batch and channels that differ are drawn rarely: four inputs would seldom fit together otherwise.
            shape = hostile.often([batch, self.channels, *size], [batch + 1, self.channels + 1, *size], size)
            self.inputs.append(
                hostile.often(hostile.layout(torch.randn(shape).to(dtype)), hostile.tensor(shape, dtype))
            )
        self.out = hostile.tensor([batch, self.channels, height, width], dtype)
        self.normalised = [hostile.random.random() < 0.5 for _ in range(self.count)]
        rows = hostile.random.choice([2, 3])
        numbers = [self._numbers(hostile, *shape, self.channels) for shape in ([rows], [], [])]
        self.weight = hostile.often(
            torch.randn(self.count, dtype=self.kind), hostile.working(self.count, dtype=self.kind)
        )
        self.tensors = (hostile.often(self.inputs, self.inputs[:-1]), *numbers, self.weight)
        self.settings = (
            hostile.often(self.resamples, self.resamples[:-1], [3] * self.count, [-1] * self.count),
            *(hostile.often(hostile.random.randrange(3), -1, 3, 1 << 40) for _ in range(2)),
            hostile.number(1e-4),
        )

    def _numbers(self, hostile: Hostile, *shape: int) -> list[Tensor]:
        """Of each input so many numbers, or an empty tensor."""
        made = [
            hostile.often(
                torch.randn(shape if normalised else [0], dtype=self.kind),
                hostile.working(*shape, dtype=self.kind),
            )
            for normalised in self.normalised
        ]
        return made if hostile.random.random() < 0.98 else made[:-1]

    def sums(self, hostile: Hostile) -> list[Tensor]:
        """Of each normalised input two numbers a channel, to be written."""
        return [
            hostile.working(*((2, self.channels) if normalised else (0,)), dtype=self.kind)
            for normalised in self.normalised
        ]


def _fusion_statistics(hostile: Hostile) -> tuple[Any, ...]:
    hostile.right = 0.98
    count = hostile.often(hostile.random.choice([1, 2, 3]), 0, 5)
    dtype, batch, channels = hostile.random.choice(FLOATING), hostile.size(), hostile.often(hostile.size(), 1100)
    inputs = [hostile.tensor([batch, channels, hostile.size() % 9, 3], dtype) for _ in range(count)]
    statistics = [hostile.working(3, channels, dtype=accumulate_dtype(dtype)) for _ in range(count)]
    epsilons = [hostile.number(1e-5) for _ in range(count)]
    return inputs, hostile.often(epsilons, epsilons[:-1], []), hostile.often(statistics, statistics[:-1]), None


def _fusion_forward(hostile: Hostile) -> tuple[Any, ...]:
    node = _FusionNode(hostile)
    return *node.tensors, *node.settings, node.out


def _convolved_node(hostile: Hostile) -> _FusionNode:
    """A node that a depthwise convolution may stand behind, more often than not."""
    node = _FusionNode(hostile)
    channels_last = [
        x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 and x.device.type == "cpu" else x
        for x in (*node.inputs, node.out)
    ]
    if hostile.random.random() < 0.9:
        *node.inputs, node.out = channels_last
        node.tensors = (node.inputs, *node.tensors[1:])
    return node


def _fused_convolution_forward(hostile: Hostile) -> tuple[Any, ...]:
    node = _convolved_node(hostile)
    return *node.tensors, *node.settings, hostile.working(node.channels, 1, 3, 3, dtype=node.kind), node.out


def _fused_convolution_backward_sums(hostile: Hostile) -> tuple[Any, ...]:
    node = _convolved_node(hostile)
    kernel, kernel_gradient = (hostile.working(node.channels, 1, 3, 3, dtype=node.kind) for _ in range(2))
    map_gradient = torch.zeros_like(node.out) if node.out.device.type == "cpu" else node.out
    map_gradient = hostile.often(map_gradient, map_gradient[..., :1], map_gradient.double(), map_gradient[:0])
    weight_gradient = hostile.working(node.count, dtype=node.kind)
    sums = hostile.often(node.sums(hostile), node.sums(hostile)[:-1])
    return node.out, *node.tensors, *node.settings, kernel, sums, weight_gradient, kernel_gradient, map_gradient


def _fusion_backward_sums(hostile: Hostile) -> tuple[Any, ...]:
    node = _FusionNode(hostile)
    weight_gradient = hostile.working(node.count, dtype=node.kind)
    sums = hostile.often(node.sums(hostile), node.sums(hostile)[:-1])
    return node.out, *node.tensors, *node.settings, sums, weight_gradient, None


def _fusion_backward(hostile: Hostile) -> tuple[Any, ...]:
    node = _FusionNode(hostile)
    sums = [
        hostile.often(
            torch.randn(2, node.channels, dtype=node.kind), hostile.working(2, node.channels, dtype=node.kind)
        )
        if normalised and hostile.random.random() < 0.7
        else torch.zeros(0, dtype=node.kind)
        for normalised in node.normalised
    ]
    sums = hostile.often(sums, sums[:-1], [torch.zeros(2, node.channels, dtype=node.kind)] * node.count)
    positions = sorted(hostile.random.sample(range(node.count), hostile.random.randint(0, node.count)))
    wanted = [node.inputs[place] for place in positions]
    gradients = [hostile.layout(torch.zeros_like(x)) if x.device.type == "cpu" else x for x in wanted]
    gradients = [hostile.often(gradient, gradient[..., :1], gradient.double()) for gradient in gradients]
    return (
        node.out,
        *node.tensors,
        hostile.often(sums, sums[:-1]),
        *node.settings,
        hostile.often(
            positions, positions[:-1], [0] * len(positions), [-1] * len(positions), [1 << 40] * len(positions)
        ),
        hostile.often(gradients, gradients[:-1]),
        hostile.random.choice([None, hostile.working(node.count, dtype=node.kind)]),
        None,
    )


ENTRY_POINTS = {
    "fusion_statistics": _fusion_statistics,
    "fusion_forward": _fusion_forward,
    "fusion_backward_sums": _fusion_backward_sums,
    "fusion_backward": _fusion_backward,
    "fused_convolution_forward": _fused_convolution_forward,
    "fused_convolution_backward_sums": _fused_convolution_backward_sums,
}
