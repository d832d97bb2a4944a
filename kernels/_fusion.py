"""What the kernels of weighted fusion share: a node, its tiles, resampling and activations; on the host, its layout.

s = sum_i w^_i * pre(v_i), v_i = resample_i(y_i), y_i = (x_i - mean) * (inverse deviation * gamma) + beta
(Ji et al., CVPR 2021, arXiv 2103.08273; Tan et al., "EfficientDet", CVPR 2020).

Maps are taken as tiles of (pixels, channels) of one sample, long along the contiguous axis.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from frskd_fast.reference.fusion import Node, Settings

from ._common import Geometry, aligned, layout_of, tile_of, tile_offsets, triton_accumulate_dtype

# Positions in RESAMPLES, ACTIVATIONS and WEIGHTINGS of the reference.
NONE, UP, POOL = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
RELU, SILU = tl.constexpr(1), tl.constexpr(2)
SUM, SOFTMAX = tl.constexpr(0), tl.constexpr(2)

# Elements of a tile of one tensor, of which 4 warps hold 8 to a lane.
_TILE = 1024
NUM_WARPS = 4

# Sums over all pixels: tiles that one program adds up, and how many programs it takes before one adds up several.
_MOST_STEPS = 64
_ENOUGH_PROGRAMS = 1024


class FinishBlock(NamedTuple):
    """What one program adds up at once of what other programs left."""

    rows: int
    channels: int
    step: int  # numbers, where there are no channels


FINISH = FinishBlock(rows=64, channels=8, step=1024)


class Block(NamedTuple):
    """Shape of a tile."""

    pixels: int
    channels: int
    align: int  # divides the extent of the map along the tile's contiguous axis


class Strides(NamedTuple):
    """Of one tensor, in elements."""

    sample: int
    row: int  # of the image
    pixel: int
    channel: int


class Size(NamedTuple):
    """Of one input."""

    height: int
    width: int


class Ratio(NamedTuple):
    """Size of an input / size of the output, rounded to float32."""

    rows: float
    columns: float


class Variant(NamedTuple):
    """What a kernel over a node is compiled for. "Bit i" is that of input i, or of tensor i among the strides."""

    count: int  # K
    resamples: tuple[int, ...]  # K
    normalised: int  # bit i
    pre: int
    weighting: int
    channels_fast: bool  # tiles are long along the channels
    contiguity: int  # bit i: neighbouring channels lie closer together than pixels
    flat: int  # bit i: the pixels are one axis
    alignments: tuple[int, ...]  # of each tensor
    wide: bool  # some offset needs 64 bits
    accumulate: tl.dtype


class NodeLayout(NamedTuple):
    """Where the elements of a node lie."""

    strides: tuple[Strides, ...]  # K inputs, then the other tensors of a kernel
    sizes: tuple[Size, ...]  # K
    ratios: tuple[Ratio, ...]  # K
    channels: int  # C
    height: int  # H
    width: int  # W


class KernelNode(NamedTuple):
    """A node as a kernel takes it; the fields after ``weight`` are those of ``NodeLayout``."""

    inputs: Any  # K x (N, C, H_i, W_i)
    statistics: Any  # K x (>= 2, C)
    gammas: Any  # K x (C,)
    betas: Any  # K x (C,)
    weight: Any  # (K,)
    strides: Any
    sizes: Any
    ratios: Any
    channels: Any
    height: Any
    width: Any


class Tile(NamedTuple):
    """Some pixels and channels of a map."""

    sample: Any  # int64
    pixel: Any  # (pixels,) row * width + column
    row: Any  # (pixels,)
    column: Any  # (pixels,)
    channel: Any  # (channels,)
    mask: Any  # (pixels, channels)


class Affine(NamedTuple):
    """The normalisation of some channels, each (1, channels)."""

    mean: Any
    inverse: Any  # deviation
    scale: Any  # inverse deviation * gamma
    shift: Any  # beta


class Weights(NamedTuple):
    """The weights of a node."""

    normalised: Any  # K x w^
    divisor: Any  # by which w was divided


class Resampled(NamedTuple):
    """One input at pixels of the output, each (pixels, channels)."""

    value: Any  # v
    raw: Any  # the x that it comes from
    tap: Any  # which of its window: 3 * row + column, or -1 in the padding


@triton.jit
def total(values):
    """Sum of a tile."""
    return tl.sum(tl.sum(values, axis=1), axis=0)


@triton.jit
def activated(value, ACTIVATION: tl.constexpr):
    """The activation of ``value``; a NaN stays a NaN."""
    if ACTIVATION == RELU:
        result = tl.where(value < 0.0, 0.0, value)
    elif ACTIVATION == SILU:
        result = value / (1.0 + tl.exp(-value))
    else:
        result = value
    return result


@triton.jit
def before_activation(
    gradient,  # d loss / d activation(value)
    value,
    ACTIVATION: tl.constexpr,
):
    """d loss / d value."""
    if ACTIVATION == RELU:
        result = tl.where(value <= 0.0, 0.0, gradient)
    elif ACTIVATION == SILU:
        sigmoid = 1.0 / (1.0 + tl.exp(-value))
        result = gradient * (sigmoid * (1.0 + value * (1.0 - sigmoid)))
    else:
        result = gradient
    return result


@triton.jit
def normalised_weights(
    weight,  # (K,)
    epsilon: tl.float64,
    COUNT: tl.constexpr,  # K
    WEIGHTING: tl.constexpr,
    ACCUMULATE: tl.constexpr,
):
    """w^ from w."""
    one = tl.full([], 1.0, ACCUMULATE)
    parts = ()
    sum_of_parts = one * 0.0
    if WEIGHTING == SOFTMAX:
        largest = tl.load(weight)
        for index in tl.static_range(1, COUNT):
            value = tl.load(weight + index)
            largest = tl.where(value > largest, value, largest)
    for index in tl.static_range(COUNT):
        value = tl.load(weight + index)
        if WEIGHTING == SUM:
            part = one
        elif WEIGHTING == SOFTMAX:
            part = tl.exp(value - largest)
        else:
            # Written so that a NaN weight stays NaN.
            part = tl.where(value < 0.0, 0.0, value)
        sum_of_parts += part
        parts += (part,)
    if WEIGHTING == SUM:
        divisor = one
    elif WEIGHTING == SOFTMAX:
        divisor = sum_of_parts
    else:
        divisor = sum_of_parts + tl.full([], epsilon, ACCUMULATE)
    weights = ()
    for index in tl.static_range(COUNT):
        weights += (parts[index] / divisor,)
    return Weights(weights, divisor)


@triton.jit
def affine_of(
    node,  # KernelNode
    channel,  # (channels of the tile,)
    INDEX: tl.constexpr,  # of the input
    VARIANT: tl.constexpr,
):
    """The normalisation of an input; zeros where it is not normalised."""
    if (VARIANT.normalised >> INDEX) & 1:
        mask = channel < node.channels
        mean = tl.load(node.statistics[INDEX] + channel, mask=mask, other=0.0)
        inverse = tl.load(node.statistics[INDEX] + node.channels + channel, mask=mask, other=0.0)
        scale = inverse * tl.load(node.gammas[INDEX] + channel, mask=mask, other=0.0)
        shift = tl.load(node.betas[INDEX] + channel, mask=mask, other=0.0)
        affine = Affine(mean[None, :], inverse[None, :], scale[None, :], shift[None, :])
    else:
        zero = tl.zeros([1, 1], VARIANT.accumulate)
        affine = Affine(zero, zero, zero, zero)
    return affine


@triton.jit
def normalised(
    raw,  # (pixels, channels)
    affine,  # Affine
    INDEX: tl.constexpr,  # of the input
    VARIANT: tl.constexpr,
):
    """(x - mean) * scale + beta. Explicitly one rounding less, so that equal inputs tie in every copy of this code."""
    if (VARIANT.normalised >> INDEX) & 1:
        raw = tl.fma(raw - affine.mean, affine.scale, affine.shift)
    return raw


@triton.jit
def tile_at(
    sample,  # int64
    first_pixel,
    first_channel,
    pixels,  # of one sample
    width,  # pixels of one image row
    channels,  # C
    BLOCK: tl.constexpr,
    CHANNELS_FAST: tl.constexpr,
    WIDE: tl.constexpr,
):
    """The tile that begins there."""
    pixel = first_pixel + tl.arange(0, BLOCK.pixels)
    channel = first_channel + tl.arange(0, BLOCK.channels)
    if WIDE:
        pixel = pixel.to(tl.int64)
        channel = channel.to(tl.int64)
    if CHANNELS_FAST:
        pixel_mask = pixel < pixels
        channel_mask = channel < aligned(channels, BLOCK.align)
    else:
        pixel_mask = pixel < aligned(pixels, BLOCK.align)
        channel_mask = channel < channels
    mask = pixel_mask[:, None] & channel_mask[None, :]
    return Tile(sample, pixel, pixel // width, pixel % width, channel, mask)


@triton.jit
def masked(
    tile,  # Tile
    mask,  # broadcast to (pixels, channels)
):
    """A part of the tile."""
    return Tile(tile.sample, tile.pixel, tile.row, tile.column, tile.channel, tile.mask & mask)


@triton.jit
def moved(
    tile,  # Tile
    row,  # (pixels,)
    column,  # (pixels,)
    width,  # of the map that row and column belong to
    inside,  # (pixels,) whether they do
):
    """The same sample and channels at other pixels."""
    return Tile(tile.sample, row * width + column, row, column, tile.channel, tile.mask & inside[:, None])


@triton.jit
def places(
    tensor,  # (N, C, height, width)
    strides,  # of all tensors
    tile,  # Tile
    PLACE: tl.constexpr,  # of the tensor among the strides
    VARIANT: tl.constexpr,
):
    """Pointers (pixels, channels) into one tensor."""
    align: tl.constexpr = VARIANT.alignments[PLACE]
    channels_contiguous: tl.constexpr = (VARIANT.contiguity >> PLACE) & 1
    step: tl.constexpr = align if channels_contiguous else 1
    if (VARIANT.flat >> PLACE) & 1:
        offset = tile.pixel * aligned(strides[PLACE].pixel, step)
    else:
        offset = tile.row * aligned(strides[PLACE].row, step) + tile.column * aligned(strides[PLACE].pixel, step)
    # The sample first: only its offset needs 64 bits.
    tensor += tile.sample * aligned(strides[PLACE].sample, align)
    return tensor + tile_offsets(offset, tile.channel, strides[PLACE], channels_contiguous, align)


@triton.jit
def load_input(
    node,  # KernelNode
    tile,  # Tile
    INDEX: tl.constexpr,  # of the input
    VARIANT: tl.constexpr,
):
    """x at pixels of the input itself; 0 outside the mask."""
    place = places(node.inputs[INDEX], node.strides, tile, INDEX, VARIANT)
    return tl.load(place, mask=tile.mask, other=0.0).to(VARIANT.accumulate)


@triton.jit
def load_upstream(
    grad,  # (N, C, H, W), the first tensor behind the inputs
    node,  # KernelNode
    tile,  # Tile
    VARIANT: tl.constexpr,
):
    """d loss / d s at pixels of the output; 0 outside the mask."""
    place = places(grad, node.strides, tile, VARIANT.count, VARIANT)
    return tl.load(place, mask=tile.mask, other=0.0).to(VARIANT.accumulate)


@triton.jit
def nearest_source(
    destination,  # (pixels,) along one axis
    source_size,
    ratio,  # float32 source size / float32 output size
):
    """Where nearest-neighbour up-sampling reads; rounded as PyTorch rounds it."""
    source = (destination.to(tl.float32) * ratio).to(tl.int32)
    return tl.minimum(source.to(destination.dtype), source_size - 1)


@triton.jit
def resampled(
    node,  # KernelNode
    tile,  # Tile of the output
    INDEX: tl.constexpr,  # of the input
    VARIANT: tl.constexpr,
):
    """One input at the tile. Of equals in a window the first wins; a NaN counts as larger than everything before it, as
    in max_pool2d."""
    height = node.sizes[INDEX].height
    width = node.sizes[INDEX].width
    affine = affine_of(node, tile.channel, INDEX, VARIANT)
    if VARIANT.resamples[INDEX] == POOL:
        for tap in tl.static_range(9):
            source_row = 2 * tile.row - height % 2 + tap // 3
            source_column = 2 * tile.column - width % 2 + tap % 3
            inside = (source_row >= 0) & (source_row < height) & (source_column >= 0) & (source_column < width)
            source = moved(tile, source_row, source_column, width, inside)
            raw = load_input(node, source, INDEX, VARIANT)
            # The padding comes after the normalisation.
            value = tl.where(inside[:, None], normalised(raw, affine, INDEX, VARIANT), 0.0)
            here = tl.where(inside[:, None], tap, -1)
            if tap == 0:
                largest = value
                picked = raw
                position = here + tl.zeros(value.shape, tl.int32)
            else:
                larger = (value > largest) | (value != value)
                largest = tl.where(larger, value, largest)
                picked = tl.where(larger, raw, picked)
                position = tl.where(larger, here, position)
    else:
        if VARIANT.resamples[INDEX] == UP:
            row = nearest_source(tile.row, height, node.ratios[INDEX].rows)
            column = nearest_source(tile.column, width, node.ratios[INDEX].columns)
            tile = Tile(tile.sample, row * width + column, row, column, tile.channel, tile.mask)
        picked = load_input(node, tile, INDEX, VARIANT)
        largest = normalised(picked, affine, INDEX, VARIANT)
        position = tl.zeros([1, 1], tl.int32)
    return Resampled(largest, picked, position)


def tile_elements(tensors: int, dtype: torch.dtype) -> int:
    """Elements of a tile where a lane keeps those of so many tensors in registers."""
    elements = _TILE if tensors <= 2 else _TILE // 2
    return elements // 2 if dtype == torch.float64 else elements


def block_of(channels: int, pixels: int, channels_fast: bool, elements: int) -> Block:
    """A tile that is long along the contiguous axis; the other axis takes what is left."""
    pixel_block, channel_block = tile_of(channels, pixels, channels_fast, elements)
    return Block(pixel_block, channel_block, math.gcd(16, channels if channels_fast else pixels))


def tiles_of(channels: int, pixels: int, block: Block) -> int:
    """Tiles of one sample of a map."""
    return triton.cdiv(pixels, block.pixels) * triton.cdiv(channels, block.channels)


def steps_of(batch: int, pixels: int, channels: int, block: Block) -> tuple[int, int]:
    """Tiles of pixels that one program adds up, and programs for the same channels; by the shape alone."""
    tiles = batch * triton.cdiv(pixels, block.pixels)
    enough = triton.cdiv(_ENOUGH_PROGRAMS, triton.cdiv(channels, block.channels))
    steps = min(max(tiles // enough, 1), _MOST_STEPS)
    return steps, triton.cdiv(tiles, steps)


def bits(tensors: Sequence[Tensor]) -> int:
    """Bit i: tensor i is not empty."""
    return sum((tensor.numel() > 0) << place for place, tensor in enumerate(tensors))


def filled(tensors: Sequence[Tensor], stand_in: Tensor) -> tuple[Tensor, ...]:
    """``tensors`` with ``stand_in`` for empty ones, which no kernel reads."""
    return tuple([tensor if tensor.numel() > 0 else stand_in for tensor in tensors])


def hashable(settings: Settings) -> Settings:
    """The same settings as a key of a plan."""
    return settings._replace(resamples=tuple(settings.resamples))


def laid_out(
    inputs: tuple[Geometry, ...],
    others: tuple[
        Geometry, ...
    ],  # tensors that a kernel reads or writes beside the inputs; the first has the output's size
    dtype: torch.dtype,
    normalised_inputs: int,  # bit i: input i is normalised
    settings: Settings,
) -> tuple[NodeLayout, Variant]:
    """Where a node lies in memory, and what its kernels are compiled for; by shapes, strides and settings alone."""
    layouts = [layout_of([tensor], [True], merge_samples=False) for tensor in (*inputs, *others)]
    # The largest input decides about the order of the axes: the others cost less when they are read against it.
    areas = [shape[2] * shape[3] for shape, _ in inputs]
    channels, height, width = others[0][0][1:]
    layout = NodeLayout(
        tuple(Strides(*layout.strides[0]) for layout in layouts),
        tuple(Size(*shape[2:]) for shape, _ in inputs),
        tuple(Ratio(_ratio(shape[2], height), _ratio(shape[3], width)) for shape, _ in inputs),
        channels,
        height,
        width,
    )
    variant = Variant(
        count=len(inputs),
        resamples=tuple(settings.resamples),
        normalised=normalised_inputs,
        pre=settings.pre,
        weighting=settings.weighting,
        channels_fast=layouts[areas.index(max(areas))].channels_contiguous[0],
        contiguity=sum(layout.channels_contiguous[0] << place for place, layout in enumerate(layouts)),
        flat=sum(layout.flat << place for place, layout in enumerate(layouts)),
        alignments=tuple(layout.alignment for layout in layouts),
        wide=any(layout.wide for layout in layouts),
        accumulate=triton_accumulate_dtype(dtype),
    )
    return layout, variant


def _ratio(source: int, output: int) -> float:
    return float(np.float32(source) / np.float32(output))


def kernel_node(node: Node, layout: NodeLayout) -> KernelNode:
    """What a kernel takes."""
    affine = [filled(tensors, node.weight) for tensors in (node.statistics, node.gammas, node.betas)]
    return KernelNode(tuple(node.inputs), *affine, node.weight, *layout)
