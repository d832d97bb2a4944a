"""What the kernels of attention transfer share: powers of features, and the tiles in which pyramids are read.

a = mean_c |f|^p, q = a / max(||a||_2, 1e-12) per sample, loss[l, n] = mean_hw (q_student - q_teacher)^2
(FRSKD, CVPR 2021, arXiv 2103.08273; Zagoruyko and Komodakis, ICLR 2017).
"""

from __future__ import annotations

import functools
import math
from typing import Any

import triton
import triton.language as tl

from ._common import Geometry, layout_of, tile_of

NUM_WARPS = 4  # they keep a tile in registers
_MOST_FACTORS = 8  # of a power


def power_of(exponent: float) -> tuple[bool, int, float]:
    """Whether p = 2, which needs no power; and |f|^p as |f|^whole * |f|^fraction: a logarithm times p would lose digits."""
    whole = min(math.floor(exponent), _MOST_FACTORS)
    return exponent == 2.0, whole, exponent - whole


@triton.jit
def absolute_power(
    magnitude,  # |f|
    whole,
    fraction,  # >= 0
):
    """magnitude^(whole + fraction)."""
    # log2(0) = -inf and exp2(-inf) = 0. |f|^0 counts as 1, but a NaN stays a NaN.
    one = tl.where(magnitude == magnitude, 1.0, magnitude)
    power = tl.where(fraction == 0.0, one, tl.exp2(tl.log2(magnitude) * fraction))
    for _ in range(whole):
        power *= magnitude
    return power


@functools.lru_cache(maxsize=256)
def plan(
    tensors: tuple[tuple[Geometry, ...], ...], elements: int, all_channels: bool
) -> tuple[int, tuple[Any, ...], dict[str, Any]]:
    """Programs of one launch over levels (each one or two tensors of one shape), its arguments and its constants.

    The arguments are (strides, channels, pixels, widths); with one tensor a level, the strides lose that axis. A tile has
    ``elements``; with ``all_channels`` a program goes through all those of its pixels.
    """
    layouts = [layout_of(level, [True] * len(level), merge_samples=False) for level in tensors]
    channels = tuple(level[0][0][1] for level in tensors)
    blocks = [
        tile_of(width, layout.pixels, layout.channels_contiguous[0], elements)
        for width, layout in zip(channels, layouts, strict=True)
    ]
    single = len(tensors[0]) == 1
    programs = 0
    for layout, width, (pixel_block, channel_block) in zip(layouts, channels, blocks, strict=True):
        channel_tiles = 1 if all_channels else triton.cdiv(width, channel_block)
        programs += layout.samples * triton.cdiv(layout.pixels, pixel_block) * channel_tiles
    arguments = (
        tuple(layout.strides[0] if single else layout.strides for layout in layouts),
        channels,
        tuple(layout.pixels for layout in layouts),
        tuple(layout.width for layout in layouts),
    )
    constants = {
        "BLOCK_PIXELS": tuple(block[0] for block in blocks),
        "BLOCK_CHANNELS": tuple(block[1] for block in blocks),
        "CHANNELS_CONTIGUOUS": tuple(layout.contiguity for layout in layouts),
        "FLAT": tuple(layout.flat for layout in layouts),
        "ALIGN": tuple(layout.alignment for layout in layouts),
        "WIDE": any(layout.wide for layout in layouts),
    }
    return programs, arguments, constants
