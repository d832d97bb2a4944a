"""Launches of the Triton kernels of ``logit_maps`` with the block shapes of real calls."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from frskd_fast.reference.logit_maps import Maps, MapSettings, WantedGradients


def _launch(
    shape: tuple[int, int, int, int],
    size: tuple[int, int],
    dtype: torch.dtype,
    temperature: float = 1.0,
    smoothing: float = 0.0,
    kd_to_teacher: bool = False,
    channels_last: bool = False,
) -> None:
    """The raw functions of a training step, and those with the losses of each pixel, on tensors without data."""
    from frskd_fast.kernels import logit_maps as kernels

    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    student, teacher = (
        torch.empty(shape, dtype=dtype, device="meta").to(memory_format=memory_format) for _ in range(2)
    )
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    targets = torch.empty(shape[0], *size, dtype=torch.int64, device="meta")
    weights = torch.empty(shape[1], dtype=wide, device="meta") if smoothing else None
    maps, settings = Maps(student, teacher, targets, weights), MapSettings(*size, smoothing, 255, temperature)
    wanted = WantedGradients(True, True, kd_to_teacher)
    kernels.sums(maps, settings, wanted)
    grads = [torch.empty(targets.shape, dtype=wide, device="meta") for _ in range(3)]
    kernels.pixels_backward(grads, maps, settings, wanted)
    kernels.pixels(maps, settings)


COMPILED: dict[str, Callable[[], None]] = {
    "21 classes, four times": functools.partial(_launch, (4, 21, 128, 128), (512, 512), torch.float32),
    "21 classes, four times, bfloat16, T=4": functools.partial(
        _launch, (4, 21, 128, 128), (512, 512), torch.bfloat16, 4.0, channels_last=True
    ),
    "150 classes, eight times": functools.partial(_launch, (4, 150, 64, 64), (512, 512), torch.float32),
    "150 classes to both sides, T=3, smoothing, weights": functools.partial(
        _launch, (4, 150, 64, 64), (500, 375), torch.bfloat16, 3.0, 0.1, True
    ),
    "60 classes to both sides, T=3, smoothing, weights": functools.partial(
        _launch, (4, 60, 64, 64), (500, 375), torch.float16, 3.0, 0.1, True
    ),
    "2 classes, twice": functools.partial(_launch, (4, 2, 128, 128), (256, 256), torch.float32),
    "21 classes, float64": functools.partial(_launch, (4, 21, 128, 128), (512, 512), torch.float64, 4.0),
}
