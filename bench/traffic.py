"""What the self-teacher BiFPNc must compute and move, level by level: `python -m bench.traffic` prints the table.

Counted, not measured: multiply-adds of the convolutions, and bytes of every map that an operation reads or writes once
from memory. Two orders of operations are counted: the original's, one operation for each step of its formulas, and
ours, which computes the same function (docs/performance.md says what changes).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from bench import inputs


@dataclass
class Level:
    """Sums for one level: multiply-adds of forward, and map elements read or written by forward and by backward."""

    multiply_adds: int = 0
    forward: int = 0
    backward: int = 0
    parameters: int = 0  # convolution weights; forward reads them, backward reads them and writes their gradient

    def bytes(self, size: int = 4) -> int:
        """Bytes of both passes for maps of `size` bytes an element and float32 parameters."""
        return (self.forward + self.backward) * size + 3 * self.parameters * 4


@dataclass
class Counter:
    """Adds up operations; each method is one, named after it, on maps of `pixels` (batch included) x `channels`."""

    levels: dict[int, Level] = field(default_factory=lambda: defaultdict(Level))
    level: int = 0

    def add(self, forward: int, backward: int, multiply_adds: int = 0, parameters: int = 0) -> None:
        """Book one operation on the current level."""
        here = self.levels[self.level]
        here.forward += forward
        here.backward += backward
        here.multiply_adds += multiply_adds
        here.parameters += parameters

    def convolution(self, pixels: int, channels: int, out_channels: int) -> None:
        """1x1: backward reads the gradient for the input's and, with the input, for the weight's."""
        weights = channels * out_channels
        read, written = pixels * channels, pixels * out_channels
        self.add(read + written, (written + read) + (written + read), pixels * weights, weights)

    def depthwise(self, pixels: int, channels: int) -> None:
        """3x3 of each channel by itself."""
        size = pixels * channels
        self.add(2 * size, 4 * size, 9 * size, 9 * channels)

    def batch_norm(self, pixels: int, channels: int, outputs: int = 1) -> None:
        """Statistics, then the map; backward: sums over gradient and input, then the input's gradient."""
        size = pixels * channels
        self.add((2 + outputs) * size, 5 * size)

    def relu(self, pixels: int, channels: int, differentiated: bool = True) -> None:
        """Backward reads the gradient and the result."""
        size = pixels * channels
        self.add(2 * size, 3 * size if differentiated else 0)

    def product(self, pixels: int, channels: int) -> None:
        """weight * map; backward scales the gradient, and writes and sums gradient * map for the weight."""
        size = pixels * channels
        self.add(2 * size, 2 * size + 4 * size)

    def sum(self, pixels: int, channels: int) -> None:
        """map + map; backward hands the gradient on."""
        self.add(3 * pixels * channels, 0)

    def accumulate(self, pixels: int, channels: int) -> None:
        """The gradients of two uses of a map are added."""
        self.add(0, 3 * pixels * channels)

    def up(self, pixels: int, channels: int) -> None:
        """Nearest neighbour from a quarter of `pixels`."""
        size = pixels * channels + pixels * channels // 4
        self.add(size, size)

    def pad_and_pool(self, pixels: int, channels: int) -> None:
        """Zero-padding and maximum from four times `pixels`, as two operations; an index takes two elements."""
        size = pixels * channels
        self.add(2 * 4 * size + (4 + 1 + 2) * size, (1 + 2 + 4) * size + 2 * 4 * size)

    def pool(self, pixels: int, channels: int) -> None:
        """The same in one pass without indices: backward finds the maximum again."""
        size = pixels * channels
        self.add(5 * size, (1 + 4 + 4) * size)

    def node(self, pixels: int, channels: int, normalised: Sequence[float], plain: Sequence[float] = ()) -> None:
        """The fused sum of maps, given by their share of `pixels`; a normalised one is read twice each way."""
        size = pixels * channels
        read = int(sum(normalised) * size)
        as_is = int(sum(plain) * size)
        self.add(2 * read + as_is + size, (2 * size + 3 * read) + 2 * as_is)

    def classifier(self, pixels: int, channels: int) -> None:
        """Mean over the pixels; what follows is small."""
        self.add(pixels * channels, pixels * channels)


def separable(count: Counter, pixels: int, width: int, depth: int, normalise: Callable[[], Any]) -> None:
    """`depth` depthwise-separable convolutions; `normalise` follows each one but the last."""
    for position in range(depth):
        count.depthwise(pixels, width)
        count.convolution(pixels, width, width)
        if position < depth - 1:
            normalise()


def sizes(batch: int, pyramid: Sequence[tuple[int, int]]) -> tuple[list[int], list[int], list[int]]:
    """(pixels of the whole batch, channels, self-teacher's channels) of each level."""
    pixels = [batch * side * side for _, side in pyramid]
    channels = [channels for channels, _ in pyramid]
    return pixels, channels, [inputs.TEACHER_WIDTH * count for count in channels]


def original(batch: int, pyramid: Sequence[tuple[int, int]] = inputs.PYRAMID, depth: int = 2) -> dict[int, Level]:
    """The order of bench/cases/self_teacher.py: every ReLU, product and sum is an operation."""
    count = Counter()
    pixels, channels, widths = sizes(batch, pyramid)
    last = len(pyramid) - 1

    def block(level: int, in_channels: int) -> None:
        count.convolution(pixels[level], in_channels, widths[level])
        count.batch_norm(pixels[level], widths[level])
        count.relu(pixels[level], widths[level])

    def weighted(level: int, number: int) -> None:
        for _ in range(number):
            count.product(pixels[level], widths[level])
        for _ in range(number - 1):
            count.sum(pixels[level], widths[level])

    def node_convolutions(level: int) -> None:
        def normalise() -> None:
            count.batch_norm(pixels[level], widths[level])
            count.relu(pixels[level], widths[level])

        separable(count, pixels[level], widths[level], depth, normalise)
        count.batch_norm(pixels[level], widths[level])

    for level in range(last + 1):
        count.level = level
        for use in range(2 if level > 0 else 1):
            count.relu(pixels[level], channels[level])
            block(level, channels[level])
            if use > 0:
                count.accumulate(pixels[level], channels[level])
        if level < last:
            count.relu(pixels[level], widths[level])  # of lat_conv's result
            count.relu(pixels[level + 1], widths[level + 1])
            count.up(pixels[level], widths[level + 1])
            block(level, widths[level + 1])
            weighted(level, 2)
            node_convolutions(level)
        if level > 0:
            count.relu(pixels[level], widths[level])  # of lat_conv2's result
            if level < last:
                count.relu(pixels[level], widths[level])
                count.accumulate(pixels[level], widths[level])
            count.relu(pixels[level - 1], widths[level - 1])
            count.pad_and_pool(pixels[level], widths[level - 1])
            block(level, widths[level - 1])
            weighted(level, 3 if level < last else 2)
            node_convolutions(level)
        # What the loss takes is detached.
        count.relu(pixels[level], widths[level], differentiated=False)
    count.relu(pixels[last], widths[last])
    count.classifier(pixels[last], widths[last])
    return dict(count.levels)


def ours(batch: int, pyramid: Sequence[tuple[int, int]] = inputs.PYRAMID, depth: int = 2) -> dict[int, Level]:
    """The same function: convolutions before up-sampling, stacked lateral convolutions, nodes as one operation."""
    count = Counter()
    pixels, channels, widths = sizes(batch, pyramid)
    last = len(pyramid) - 1

    def normalised(level: int) -> None:
        count.batch_norm(pixels[level], widths[level])  # with its ReLU

    for level in range(last + 1):
        count.level = level
        count.relu(pixels[level], channels[level])
        # Both lateral convolutions are one, of twice the width.
        count.convolution(pixels[level], channels[level], widths[level] * (2 if level > 0 else 1))
        if level == last:
            normalised(level)  # the coarsest map of the way down, of which the up-sampling is convolved
        if level < last:
            count.convolution(pixels[level + 1], widths[level + 1], widths[level])
            count.node(pixels[level], widths[level], normalised=(1.0, 0.25))
            separable(count, pixels[level], widths[level], depth, partial(normalised, level))
            normalised(level)
        if level > 0:
            count.pool(pixels[level], widths[level - 1])
            count.convolution(pixels[level], widths[level - 1], widths[level])
            if level < last:
                count.accumulate(pixels[level], widths[level])
            count.node(pixels[level], widths[level], normalised=(1.0, 1.0), plain=(1.0,) if level < last else ())
            separable(count, pixels[level], widths[level], depth, partial(normalised, level))
            normalised(level)
    count.classifier(pixels[last], widths[last])
    return dict(count.levels)


def total(levels: dict[int, Level]) -> Level:
    """The sum over the levels."""
    return Level(
        sum(level.multiply_adds for level in levels.values()),
        sum(level.forward for level in levels.values()),
        sum(level.backward for level in levels.values()),
        sum(level.parameters for level in levels.values()),
    )


def table(batch: int, pyramid: Sequence[tuple[int, int]] = inputs.PYRAMID) -> list[str]:
    """A markdown table: a row for each level, then their sum; float32, forward and backward."""
    counted = {"original": original(batch, pyramid), "ours": ours(batch, pyramid)}
    rows = [(f"{inputs.TEACHER_WIDTH * c} x {side} x {side}", level) for level, (c, side) in enumerate(pyramid)]
    lines = [
        "| level | GMAC forward, original | ours | MB forward, original | ours | MB backward, original | ours |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]

    def line(name: str, original: Level, ours: Level) -> str:
        pairs = [
            (original.multiply_adds / 1e9, ours.multiply_adds / 1e9, ".2f"),
            ((4 * (original.forward + original.parameters)) / 1e6, 4 * (ours.forward + ours.parameters) / 1e6, ".0f"),
            (
                4 * (original.backward + 2 * original.parameters) / 1e6,
                4 * (ours.backward + 2 * ours.parameters) / 1e6,
                ".0f",
            ),
        ]
        cells = [format(value, form) for first, second, form in pairs for value in (first, second)]
        return f"| {name} | {' | '.join(cells)} |"

    lines += [line(name, counted["original"][level], counted["ours"][level]) for name, level in rows]
    return [*lines, line("all", total(counted["original"]), total(counted["ours"]))]


if __name__ == "__main__":
    print("\n".join(table(32)))
