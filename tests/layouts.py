"""The memory layouts of maps (N, C, H, W) that every kernel takes without a copy, each as a function from a dense map."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def channels_last(feature: Tensor) -> Tensor:
    """Channels side by side."""
    return feature.contiguous(memory_format=torch.channels_last)


def sliced(feature: Tensor) -> Tensor:
    """Cut from a larger map, which is NaN elsewhere."""
    n, c, h, w = feature.shape
    view = feature.new_full((n + 1, c + 2, h + 1, w + 4), float("nan"))[1:, 1:-1, 1:, 4:]
    view.copy_(feature)
    return view


def strided(feature: Tensor) -> Tensor:
    """Every axis has a step and an offset: nothing is contiguous, nothing is aligned."""
    n, c, h, w = feature.shape
    view = feature.new_full((n + 1, 2 * c + 1, 2 * h + 1, 2 * w + 1), float("nan"))[1:, 1::2, 1::2, 1::2]
    view.copy_(feature)
    return view


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda feature: feature.contiguous(),
    "channels_last": channels_last,
    "sliced": sliced,
    "sliced_channels_last": lambda feature: sliced(feature.permute(0, 2, 3, 1)).permute(0, 3, 1, 2),
    "transposed": lambda feature: feature.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0),
    "expanded": lambda feature: feature[:1].expand(feature.shape),
    "strided": strided,
    "batch_last": lambda feature: feature.movedim(0, -1).contiguous().movedim(-1, 0),
}
