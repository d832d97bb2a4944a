"""One node of the self-teacher's feature pyramid: a weighted sum of rectified maps, resampled and normalised on the way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench import inputs
from bench.case import FLOAT_BYTES, Case, Operands, Selection

BATCH, CHANNELS, SIDE = 32, 256, 16
EPSILON = 1e-6


@dataclass(frozen=True)
class Node:
    """What a node does with each of its inputs; its name stands in the tables."""

    name: str
    resample: tuple[str, ...]
    batch_norm: bool = False

    def shapes(self, batch: int, channels: int, side: int) -> list[tuple[int, ...]]:
        """The inputs' shapes for an output of `side` x `side` pixels."""
        sides = {"none": side, "up": side // 2, "pool": 2 * side}
        return [(batch, channels, sides[name], sides[name]) for name in self.resample]


NODES = (
    # BiFPNc's inner levels: both own maps and the finer level's, already convolved to this size
    Node("up", ("none", "none", "up")),
    # BiFPN, whose sampling has no convolution
    Node("pool", ("none", "none", "pool")),
    # the same as the first one, from what the convolutions wrote
    Node("batch-norm up", ("none", "none", "up"), batch_norm=True),
)


def resampled(x: Tensor, resample: str) -> Tensor:
    """`x` at twice or half its size, as the original does it."""
    if resample == "up":
        return F.interpolate(x, scale_factor=2, mode="nearest")
    return F.max_pool2d(F.pad(x, (0, 1, 0, 1)), 3, stride=2) if resample == "pool" else x


def weighted(maps: Sequence[Tensor], weight: Tensor) -> Tensor:
    """sum_i relu(w_i) / (sum_j relu(w_j) + 1e-6) * x_i, each operation by itself."""
    weight = F.relu(weight)
    weight = weight / (torch.sum(weight, dim=0) + EPSILON)
    total = weight[0] * maps[0]
    for position in range(1, len(maps)):
        total = total + weight[position] * maps[position]
    return total


def original(node: Node, inputs: Sequence[Tensor], weight: Tensor) -> Tensor:
    """The node as the original writes it."""
    maps = [resampled(F.relu(x), name) for x, name in zip(inputs, node.resample, strict=True)]
    return weighted(maps, weight)


def original_with_batch_norm(
    node: Node, inputs: Sequence[Tensor], weight: Tensor, batch_norms: Sequence[nn.BatchNorm2d]
) -> Tensor:
    """The node behind the BatchNorms of its inputs, which here run at the lower size already."""
    normalised = [batch_norm(x) for batch_norm, x in zip(batch_norms, inputs, strict=True)]
    return original(node, normalised, weight)


def ours(node: Node, implementation: str) -> Callable[..., Tensor]:
    """The public function, forced to one implementation."""
    from frskd_fast import functional

    resample = list(node.resample)

    def fused(inputs: Sequence[Tensor], weight: Tensor) -> Tensor:
        return functional.weighted_fusion(inputs, weight, resample=resample, pre="relu", impl=implementation)

    def normalised_and_fused(inputs: Sequence[Tensor], weight: Tensor, batch_norms: Sequence[nn.BatchNorm2d]) -> Tensor:
        return functional.weighted_fusion(
            inputs, weight, resample=resample, pre="relu", batch_norms=list(batch_norms), impl=implementation
        )

    return normalised_and_fused if node.batch_norm else fused


def operands(node: Node, batch: int, channels: int, side: int) -> Operands:
    """Random maps, positive weights and, for a node with BatchNorms, random scales and shifts; float32 NCHW."""
    generator = torch.Generator().manual_seed(inputs.SEED)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    found: Operands = {
        "inputs": [noise(*shape) for shape in node.shapes(batch, channels, side)],
        "weight": 0.5 + noise(len(node.resample)).abs(),
    }
    if node.batch_norm:
        batch_norms = nn.ModuleList(nn.BatchNorm2d(channels) for _ in node.resample)
        for parameter in batch_norms.parameters():
            parameter.data = (1.0 if parameter.data[0] == 1 else 0.0) + 0.25 * noise(channels)
        found["batch_norms"] = batch_norms
    return found


def bytes_moved(node: Node, batch: int, dtype: str, backward: bool) -> int:
    """Each map once per pass; what has a value for each channel or input only is left out.

    Forward reads the inputs and writes the output; backward reads the output's gradient and the inputs and writes the
    inputs' gradients. BatchNorm over the batch needs the statistics before it can write anything: one pass more each
    way, over the inputs and over the inputs and the output's gradient.
    """
    of_inputs = sum(prod(shape) for shape in node.shapes(batch, CHANNELS, SIDE))
    of_output = batch * CHANNELS * SIDE * SIDE
    passes = 2 if node.batch_norm else 1
    elements = passes * of_inputs + of_output
    if backward:
        elements += passes * (of_inputs + of_output) + of_inputs
    return elements * FLOAT_BYTES[dtype]


def case(node: Node, batch: int, dtype: str, layout: str, backward: bool) -> Case:
    """One node in one setting."""
    return Case(
        suite="fusion",
        shape=f"{node.name} {batch}x{CHANNELS}x{SIDE}x{SIDE}",
        dtype=dtype,
        layout=layout,
        backward=backward,
        bytes_moved=bytes_moved(node, batch, dtype, backward),
        operands=partial(operands, node, batch, CHANNELS, SIDE),
        tiny=partial(operands, node, 2, 8, 4),
        differentiated=("inputs", "weight", "batch_norms") if node.batch_norm else ("inputs", "weight"),
        original=partial(original_with_batch_norm if node.batch_norm else original, node),
        ours=partial(ours, node),
        parameters=("weight",),
    )


def cases(selection: Selection) -> list[Case]:
    """Node x layout in the first dtype asked for, then the first node in the others and forward alone.

    `full` gives every node in every dtype and direction.
    """
    batch = selection.batch or BATCH
    first, *others = selection.dtypes
    settings = [(node, first, True) for node in NODES]
    if not selection.quick:
        again = NODES if selection.full else NODES[:1]
        settings += [(node, dtype, True) for dtype in others for node in again]
        settings += [(node, first, False) for node in again]
    return [
        case(node, batch, dtype, layout, backward) for node, dtype, backward in settings for layout in selection.layouts
    ]
