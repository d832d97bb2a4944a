"""The memory layouts that every kernel takes without a copy, each as a function from a dense tensor.

Those of arguments called ``tensor`` are for logits and labels of any number of axes, too.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def contiguous(tensor: Tensor) -> Tensor:
    """Rows side by side."""
    return tensor.contiguous()


def channels_last(tensor: Tensor) -> Tensor:
    """Channels side by side."""
    if tensor.dim() == 4:
        return tensor.contiguous(memory_format=torch.channels_last)
    return tensor.movedim(1, -1).contiguous().movedim(-1, 1)


def sliced(feature: Tensor) -> Tensor:
    """Cut from a larger map, which is NaN elsewhere."""
    n, c, h, w = feature.shape
    view = feature.new_full((n + 1, c + 2, h + 1, w + 4), float("nan"))[1:, 1:-1, 1:, 4:]
    view.copy_(feature)
    return view


def channel_slice(feature: Tensor) -> Tensor:
    """As a split along the channels of a channels_last map gives it; everything around it is NaN."""
    n, c, h, w = feature.shape
    return channels_last(feature.new_full((n, c + 5, h, w), float("nan")))[:, 2 : 2 + c].copy_(feature)


def strided(tensor: Tensor) -> Tensor:
    """Every axis has a step and an offset: nothing is contiguous, nothing is aligned."""
    elsewhere = float("nan") if tensor.is_floating_point() else -1
    room = tensor.new_full([2 * extent + 1 for extent in tensor.shape], elsewhere)
    return room[(slice(1, None, 2),) * tensor.dim()].copy_(tensor)


def transposed(feature: Tensor) -> Tensor:
    """Width outermost, height innermost."""
    return feature.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)


def expanded(tensor: Tensor) -> Tensor:
    """The first sample of all of them, in memory once."""
    return tensor[:1].expand(tensor.shape)


def expanded_channels(feature: Tensor) -> Tensor:
    """The first channel of all of them, in memory once."""
    return feature[:, :1].expand(feature.shape)


def batch_last(tensor: Tensor) -> Tensor:
    """Samples side by side."""
    return tensor.movedim(0, -1).contiguous().movedim(-1, 0)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": contiguous,
    "channels_last": channels_last,
    "sliced": sliced,
    "sliced_channels_last": lambda feature: sliced(feature.permute(0, 2, 3, 1)).permute(0, 3, 1, 2),
    "transposed": transposed,
    "expanded": expanded,
    "strided": strided,
    "batch_last": batch_last,
}
