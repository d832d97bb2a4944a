"""Attention transfer in Triton, backward: the gradients of all levels in one launch (the formula is in ``_attention``)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from frskd_fast.reference.attention import upstream_scale

from ._attention import NUM_WARPS, absolute_power, plan, power_of
from ._common import (
    aligned,
    chunks,
    geometries,
    launch,
    pixel_offsets,
    tail,
    tile_offsets,
    triton_accumulate_dtype,
)

_TILE = 2048  # elements of a map


@triton.jit
def _gradient_tile(
    feature,  # (N, C, H, W)
    gradient,  # (N, C, H, W)
    strides,  # (feature, gradient) x (sample, image row, pixel, channel)
    coefficients,  # (pixels of one sample,)
    upstream,  # scalar
    sample,
    first_pixel,
    first_channel,
    channels,
    pixels,
    width,
    whole,  # factors of a power
    fraction,  # the rest of its exponent
    SQUARE: tl.constexpr,  # p = 2
    BLOCK_PIXELS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    CHANNELS_CONTIGUOUS: tl.constexpr,  # bit i: of tensor i of ``strides``
    FLAT: tl.constexpr,
    ALIGN: tl.constexpr,
    WIDE: tl.constexpr,
    ACCUMULATE: tl.constexpr,
):
    """gradient = upstream * coefficient * sign(f) * |f|^(whole + fraction) for one tile."""
    pixel = first_pixel + tl.arange(0, BLOCK_PIXELS)
    channel = first_channel + tl.arange(0, BLOCK_CHANNELS)
    if WIDE:
        pixel = pixel.to(tl.int64)
        channel = channel.to(tl.int64)
        sample = sample.to(tl.int64)
    if CHANNELS_CONTIGUOUS & 1:
        pixel_mask = pixel < pixels
        channel_mask = channel < aligned(channels, ALIGN)
    else:
        pixel_mask = pixel < aligned(pixels, ALIGN)
        channel_mask = channel < channels
    mask = pixel_mask[:, None] & channel_mask[None, :]
    factor = tl.load(coefficients + pixel, mask=pixel_mask, other=0.0) * upstream
    pixel_offset = pixel_offsets(pixel, width, strides[0], CHANNELS_CONTIGUOUS & 1, FLAT, ALIGN)
    offset = sample * aligned(strides[0][0], ALIGN) + tile_offsets(
        pixel_offset, channel, strides[0], CHANNELS_CONTIGUOUS & 1, ALIGN
    )
    value = tl.load(feature + offset, mask=mask, other=0.0).to(ACCUMULATE)
    if SQUARE:
        slope = value
    else:
        magnitude = absolute_power(tl.abs(value), whole, fraction)
        slope = tl.where(value < 0.0, -magnitude, tl.where(value == 0.0, 0.0, magnitude))
    pixel_offset = pixel_offsets(pixel, width, strides[1], CHANNELS_CONTIGUOUS & 2, FLAT, ALIGN)
    offset = sample * aligned(strides[1][0], ALIGN) + tile_offsets(
        pixel_offset, channel, strides[1], CHANNELS_CONTIGUOUS & 2, ALIGN
    )
    tl.store(gradient + offset, (factor[:, None] * slope).to(gradient.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["batch", "grad_level_stride", "grad_sample_stride", "whole"])
def _gradient_kernel(
    grad,  # (L, N)
    grad_level_stride,  # elements
    grad_sample_stride,  # elements
    scale: tl.float64,
    coefficients,  # (sum_l N * H_l * W_l,)
    features,  # L x (N, C_l, H_l, W_l)
    gradients,  # L x (N, C_l, H_l, W_l)
    strides,  # L x (feature, gradient) x (sample, image row, pixel, channel)
    channels,  # L x C_l
    pixels,  # L x H_l * W_l
    widths,  # L x W_l
    batch,
    whole,
    fraction: tl.float64,
    LEVELS: tl.constexpr,
    SQUARE: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    CHANNELS_CONTIGUOUS: tl.constexpr,
    FLAT: tl.constexpr,
    ALIGN: tl.constexpr,
    WIDE: tl.constexpr,
    ACCUMULATE: tl.constexpr,
):
    """One program for each (level, sample, tile of channels, tile of pixels)."""
    program = tl.program_id(0)
    for index in tl.static_range(LEVELS):
        pixel_tiles = tl.cdiv(pixels[index], BLOCK_PIXELS[index])
        tiles = pixel_tiles * tl.cdiv(channels[index], BLOCK_CHANNELS[index])
        if (program >= 0) & (program < batch * tiles):
            sample = program // tiles
            tile = program % tiles
            upstream = tl.load(grad + index * grad_level_stride + sample * grad_sample_stride)
            _gradient_tile(
                features[index],
                gradients[index],
                strides[index],
                coefficients + sample.to(tl.int64) * pixels[index],
                upstream * tl.full([], scale, ACCUMULATE),
                sample,
                (tile % pixel_tiles) * BLOCK_PIXELS[index],
                (tile // pixel_tiles) * BLOCK_CHANNELS[index],
                channels[index],
                pixels[index],
                widths[index],
                whole,
                tl.full([], fraction, ACCUMULATE),
                SQUARE,
                BLOCK_PIXELS[index],
                BLOCK_CHANNELS[index],
                CHANNELS_CONTIGUOUS[index],
                FLAT[index],
                ALIGN[index],
                WIDE,
                ACCUMULATE,
            )
        program -= batch * tiles
        coefficients += batch.to(tl.int64) * pixels[index]


def backward(
    grad: Tensor,  # (L, N), may be expanded
    weight: float,
    mean_over_batch: bool,
    features: Sequence[Tensor],  # L x (N, C_l, H_l, W_l)
    coefficients: Tensor,  # (N * sum_l H_l * W_l,)
    exponent: float,
) -> list[Tensor]:
    """Gradients of the features, in their dtype and memory format; one launch for 8 levels."""
    gradients = [torch.empty_like(feature) for feature in features]
    first = features[0]
    if coefficients.numel() == 0:
        return gradients
    scale = upstream_scale(weight, mean_over_batch, first.shape[0])
    square, whole, fraction = power_of(exponent)
    begin = 0
    for part in chunks(len(features)):
        pairs = tuple(zip(geometries(features[part]), geometries(gradients[part]), strict=True))
        programs, arguments, constants = plan(pairs, _TILE, all_channels=False)
        launch(
            _gradient_kernel, programs, first.device,
            tail(grad, part.start), grad.stride(0), grad.stride(1), scale, tail(coefficients, begin),
            tuple(features[part]), tuple(gradients[part]), *arguments, first.shape[0], whole - 1, fraction,
            LEVELS=part.stop - part.start, SQUARE=square,
            ACCUMULATE=triton_accumulate_dtype(first.dtype), num_warps=NUM_WARPS, **constants,
        )  # fmt: skip
        begin += sum(feature.shape[0] * feature.shape[2] * feature.shape[3] for feature in features[part])
    return gradients
