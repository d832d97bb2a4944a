"""Checks shared by the networks. They read shapes only: no synchronisation, and a compiled graph keeps none of them."""

from collections.abc import Sequence

import torch
from torch import Tensor


def check_images(images: Tensor, channels: int) -> None:
    """Raise unless `images` is a floating-point batch of shape (N, channels, H, W)."""
    if images.dim() != 4:
        raise ValueError(
            f"images must be a batch of shape (N, {channels}, H, W), but has shape {tuple(images.shape)}; "
            "give a single image a batch axis with images.unsqueeze(0)."
        )
    if images.shape[1] != channels:
        raise ValueError(
            f"images must have {channels} channels in dimension 1, but has shape {tuple(images.shape)}; "
            "bring (N, H, W, C) arrays to (N, C, H, W) with images.permute(0, 3, 1, 2)."
        )
    if not images.is_floating_point():
        raise TypeError(f"images must be floating point, but is {images.dtype}; scale and normalise the images first.")


def check_features(features: Sequence[Tensor], channels: Sequence[int]) -> None:
    """Raise unless `features` is a pyramid: level i is (N, channels[i], H_i, W_i) and sizes halve, rounded up."""
    if not isinstance(features, list | tuple):
        raise TypeError(
            f"features must be a list of tensors, finest level first, but is a {type(features).__name__}; "
            "pass the first item of what a backbone returns."
        )
    if len(features) != len(channels):
        raise ValueError(
            f"features must hold one tensor for each of the {len(channels)} levels this self-teacher was built for "
            f"(channels={list(channels)}), but holds {len(features)}; build it with the backbone's own .channels."
        )
    for level, (feature, wanted) in enumerate(zip(features, channels, strict=True)):
        if feature.dim() != 4:
            raise ValueError(
                f"features[{level}] must have shape (N, {wanted}, H, W), but has shape {tuple(feature.shape)}; "
                "pass feature maps, not pooled vectors."
            )
        if feature.shape[1] != wanted:
            raise ValueError(
                f"features[{level}] must have {wanted} channels, but has shape {tuple(feature.shape)}; "
                "build the self-teacher with the backbone's own .channels and pass the finest level first."
            )
        if feature.dtype != features[0].dtype and not torch.is_autocast_enabled(feature.device.type):
            raise TypeError(
                f"features[{level}] must have the dtype of features[0], {features[0].dtype}, but is {feature.dtype}; "
                f"cast it with .to({features[0].dtype})."
            )
        if feature.shape[0] != features[0].shape[0]:
            raise ValueError(
                f"features[{level}] must have the batch size of features[0], {features[0].shape[0]}, "
                f"but has shape {tuple(feature.shape)}."
            )
        if level > 0:
            finer_height, finer_width = features[level - 1].shape[2:]
            height, width = (finer_height + 1) // 2, (finer_width + 1) // 2
            if feature.shape[2] != height or feature.shape[3] != width:
                raise ValueError(
                    f"features[{level}] must be {height} x {width}, half of the {finer_height} x {finer_width} of "
                    f"features[{level - 1}] rounded up, but has shape {tuple(feature.shape)}; "
                    "resize the features so that each level halves the one before."
                )
