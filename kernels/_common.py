"""What the kernels share on the host: dtypes, layouts of tensors, block shapes and the launch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

if triton.knobs.runtime.interpret:
    from . import _interpreter

    _interpreter.accept_one_element_bounds()

# Levels or heads of one launch: each adds a branch to the kernel, and a longer list takes several launches.
MAX_LEVELS = 8

_TRITON_DTYPES = {
    torch.float16: tl.float32,
    torch.bfloat16: tl.float32,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}


def triton_accumulate_dtype(dtype: torch.dtype) -> tl.dtype:
    """The Triton name of ``accumulate_dtype``.

    Raises:
        TypeError: for a dtype the kernels do not read.
    """
    accumulate = _TRITON_DTYPES.get(dtype)
    if accumulate is None:
        raise TypeError(
            f"The tensors have dtype {dtype}, but the Triton kernels read float32, bfloat16, float16 or float64; "
            "cast them with .float() or use impl='reference'."
        )
    return accumulate


def chunks(count: int) -> Iterator[slice]:
    """Slices of at most MAX_LEVELS levels."""
    return (slice(begin, min(begin + MAX_LEVELS, count)) for begin in range(0, count, MAX_LEVELS))


def launch(
    kernel: Any,
    programs: int,
    device: torch.device,
    *arguments: Any,
    num_warps: int,
    maxnreg: int | None = None,
    **constants: Any,
) -> None:
    """Run ``programs`` instances of ``kernel`` on the current stream of ``device``; nothing when there are none.

    ``maxnreg`` is the most registers of a thread on NVIDIA's GPUs: fewer let more programs run at once. Without it the
    assembler weighs that against spilled registers by itself.
    """
    if programs == 0:
        return
    if torch.version.hip is None:
        constants["maxnreg"] = maxnreg
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[(programs,)](*arguments, num_warps=num_warps, **constants)


def high_and_low(value: float) -> tuple[float, float]:
    """Two float32 numbers whose sum is ``value`` to 48 bits: floats inside a tuple reach a kernel as float32."""
    high = float(np.float32(value))
    return high, value - high


def power_of_two(extent: int, low: int, high: int) -> int:
    """The smallest power of two that holds ``extent``, between ``low`` and ``high``."""
    return min(max(1 << max(extent - 1, 0).bit_length(), low), high)


def tile_of(
    channels: int,
    pixels: int,
    channels_contiguous: bool,
    elements: int,
    most_channels: int = 256,
    most_pixels: int = 128,
) -> tuple[int, int]:
    """(pixels, channels) of a tile: long along the contiguous axis, the other axis takes what is left of the elements."""
    if channels_contiguous:
        channel_block = power_of_two(channels, 1, most_channels)
        return power_of_two(pixels, 1, max(elements // channel_block, 1)), channel_block
    pixel_block = power_of_two(pixels, 1, most_pixels)
    return pixel_block, power_of_two(channels, 1, elements // pixel_block)


# Shape and strides of a tensor. Plans are cached by them: working them out costs more host time than a launch.
Geometry = tuple[tuple[int, ...], tuple[int, ...]]


def geometry(tensor: Tensor) -> Geometry:
    """Shape and strides, in elements."""
    return tensor.shape, tensor.stride()


def geometries(tensors: Sequence[Tensor]) -> tuple[Geometry, ...]:
    """Shape and strides of every tensor, as a cache key."""
    return tuple([(tensor.shape, tensor.stride()) for tensor in tensors])


def tail(tensor: Tensor, begin: int) -> Tensor:
    """``tensor[begin:]``, without the cost of a view where nothing is cut off."""
    return tensor if begin == 0 else tensor[begin:]


class Layout(NamedTuple):
    """Where the elements of one or several tensors over the same (N, H, W) lie.

    Elements are numbered (sample, pixel, channel). Where every tensor allows it, H and W count as one axis ("flat"),
    and on request N as well.
    """

    samples: int
    pixels: int
    width: int  # pixels of one image row; of no meaning when flat
    flat: bool
    strides: tuple[tuple[int, int, int, int], ...]  # per tensor: sample, image row, pixel, channel; in elements
    channels_contiguous: tuple[bool, ...]  # per tensor: neighbouring channels lie closer together than pixels
    alignment: int  # power of two <= 16: divides the contiguous extent and the other strides of channelled tensors
    wide: bool  # some offset passes 31 bits

    @property
    def contiguity(self) -> int:
        """``channels_contiguous`` as a number: bit i stands for tensor i."""
        return sum(contiguous << tensor for tensor, contiguous in enumerate(self.channels_contiguous))


def layout_of(tensors: Sequence[Geometry], channelled: Sequence[bool], merge_samples: bool) -> Layout:
    """The common layout of tensors (N, C, ...) or, where not channelled, (N, ...); at most two trailing axes."""
    samples = tensors[0][0][0]
    height, width = _image(tensors[0][0], channelled[0])
    strides = []
    wide = False
    for (shape, steps), has_channels in zip(tensors, channelled, strict=True):
        sample = steps[0] if samples > 1 else 0
        channel = steps[1] if has_channels and shape[1] > 1 else 0
        trailing = steps[1 + has_channels :]
        row = trailing[0] if len(trailing) == 2 and height > 1 else 0
        pixel = trailing[-1] if trailing and width > 1 else 0
        strides.append((sample, row, pixel, channel))
        wide = wide or sum((extent - 1) * step for extent, step in zip(shape, steps, strict=True)) >= 2**31 - 1
    pixels = height * width
    # The number of a row among all samples is an offset too.
    wide = wide or samples * pixels >= 2**31 - 2**16
    if width == 1:
        strides = [(sample, 0, row, channel) for sample, row, _, channel in strides]
    flat = width == 1 or height == 1 or all(row == width * pixel for _, row, pixel, _ in strides)
    if flat:
        strides = [(sample, 0, pixel, channel) for sample, _, pixel, channel in strides]
        if merge_samples and pixels == 1:
            strides = [(0, 0, sample, channel) for sample, _, _, channel in strides]
            samples, pixels = 1, samples
        elif merge_samples and all(sample == pixels * pixel for sample, _, pixel, _ in strides):
            strides = [(0, 0, pixel, channel) for _, _, pixel, channel in strides]
            samples, pixels = 1, samples * pixels
    channels_contiguous = tuple(channel != 0 and (channel < pixel or pixel == 0) for _, _, pixel, channel in strides)
    # Triton learns of an argument only whether 16 divides it; rows of 100 classes or of 14x14 pixels would be read
    # one element at a time.
    alignment = 16
    for (shape, _), has_channels, (sample, row, pixel, channel), contiguous in zip(
        tensors, channelled, strides, channels_contiguous, strict=True
    ):
        if has_channels:
            extents = (row, pixel, shape[1]) if contiguous else (channel, pixels)
            alignment = math.gcd(alignment, sample, *extents)
    return Layout(samples, pixels, width, flat, tuple(strides), channels_contiguous, alignment, wide)


def _image(shape: tuple[int, ...], has_channels: bool) -> tuple[int, int]:
    """(H, W); absent axes have one pixel."""
    trailing = shape[1 + has_channels :]
    if len(trailing) == 2:
        return trailing[0], trailing[1]
    return 1, (trailing[0] if trailing else 1)


@triton.jit
def aligned(value, ALIGN: tl.constexpr):
    """``value``, a multiple of ALIGN, in a form that shows it to the compiler."""
    return (value // ALIGN) * ALIGN


@triton.jit
def pixel_offsets(
    pixel,  # (rows,) number of the pixel in its sample
    width,  # pixels of one image row
    strides,  # (sample, image row, pixel, channel)
    CHANNELS_CONTIGUOUS: tl.constexpr,
    FLAT: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """Offsets of the pixels inside their sample, in elements."""
    if FLAT:
        if CHANNELS_CONTIGUOUS:
            offset = pixel * aligned(strides[2], ALIGN)
        else:
            offset = pixel * strides[2]
    elif CHANNELS_CONTIGUOUS:
        offset = (pixel // width) * aligned(strides[1], ALIGN) + (pixel % width) * aligned(strides[2], ALIGN)
    else:
        offset = (pixel // width) * strides[1] + (pixel % width) * strides[2]
    return offset


@triton.jit
def tile_offsets(
    row_offset,  # (rows,) of the pixels
    channel,  # (channels,)
    strides,  # (sample, image row, pixel, channel)
    CHANNELS_CONTIGUOUS: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """Offsets (rows, channels) of a tile inside its sample, in elements."""
    if CHANNELS_CONTIGUOUS:
        offset = channel * strides[3]
    else:
        offset = channel * aligned(strides[3], ALIGN)
    return row_offset[:, None] + offset[None, :]
