"""Mean and standard deviation of each channel of each image, and their transfer to another map, as formulas."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from frskd_fast.reference.dtypes import accumulate_dtype


class ChannelMoments(NamedTuple):
    """Mean and standard deviation over the pixels, each (N, C)."""

    mean: Tensor
    std: Tensor


def channel_moments(x: Tensor, eps: float, unbiased: bool) -> ChannelMoments:
    """Mean and sqrt(variance + eps); the variance divides by H*W - 1 where `unbiased`, else by H*W."""
    variance, mean = torch.var_mean(x.to(accumulate_dtype(x.dtype)), dim=(2, 3), correction=int(unbiased))
    return ChannelMoments(mean, (variance + eps).sqrt())


def scale_between(own_std: Tensor, std: Tensor) -> Tensor:
    """std / own_std; NaN where the content's deviation has overflowed, by which a quotient of 0 would hide that."""
    return std / own_std + 0.0 * own_std


def transfer(content: Tensor, moments: ChannelMoments, mean: Tensor, std: Tensor) -> Tensor:
    """std * (content - its mean) / its std + mean, in the dtype of the content."""
    scale = scale_between(moments.std, std)
    shift = mean - moments.mean * scale
    wide = content.to(accumulate_dtype(content.dtype))
    return torch.addcmul(shift[:, :, None, None], wide, scale[:, :, None, None]).to(content.dtype)
