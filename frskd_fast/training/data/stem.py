"""A warning for the mistake that costs FRSKD most: small images through a stem for large ones."""

from __future__ import annotations

import warnings

from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from frskd_fast.models.dry_pass import dry_pass

SMALL_IMAGE = 64  # pixels of the shorter side, at most
LARGE_STRIDE = 4  # of the first feature map, at least


def stem_stride(backbone: nn.Module, image_size: tuple[int, int], channels: int = 3) -> int:
    """ceil(H / height of the first feature map), from a pass of zeros that leaves no trace in the network.

    Args:
        backbone: `backbone(images) -> (features, logits)`, finest map first.
        image_size: (H, W) of the images.
        channels: C of the images.

    Returns:
        The stride; 1 for a CIFAR stem, 4 for the ImageNet stem of a ResNet.

    Raises:
        ValueError: when the network does not accept such images.

    Example:
        >>> from frskd_fast.models import cifarresnet18, resnet18
        >>> from frskd_fast.training.data import stem_stride
        >>> stem_stride(cifarresnet18(), (32, 32)), stem_stride(resnet18(), (128, 128))
        (1, 4)
    """
    try:
        features, _ = dry_pass(backbone, backbone, (channels, *image_size))
    except RuntimeError as error:
        height, width = image_size
        raise ValueError(
            f"backbone ({type(backbone).__name__}) does not accept images of {channels} x {height} x {width} "
            f"({error.__cause__}); take larger images, or a network that halves them fewer times."
        ) from error
    return -(-image_size[0] // features[0].shape[-2])


def warn_if_stem_mismatch(backbone: nn.Module, image_size: tuple[int, int], channels: int = 3) -> bool:
    """Warn when min(H, W) <= 64 and the first feature map is smaller by a factor of 4 or more.

    An ImageNet stem (7 x 7 convolution of stride 2, then pooling) leaves 8 x 8 pixels of a 32-pixel image for the first
    stage. FRSKD with it was reported to reach some 62 % on CIFAR-100 where the CIFAR stem reaches over 76 %.

    Args:
        backbone, image_size, channels: as for `stem_stride`, whose errors this one raises, too.

    Returns:
        Whether there was something to warn of.
    """
    if min(image_size) > SMALL_IMAGE:
        return False
    with warnings.catch_warnings():
        # This library's ResNets warn for themselves, once.
        warnings.simplefilter("ignore")
        stride = stem_stride(backbone, image_size, channels)
    if stride < LARGE_STRIDE:
        return False
    height, width = (-(-side // stride) for side in image_size)
    rank_zero_warn(
        f"Images of {image_size[0]} x {image_size[1]} pixels meet a network ({type(backbone).__name__}) whose stem, made "
        f"for large images, leaves {height} x {width} of them for the first stage. Accuracy suffers by many points; take "
        "a network for small images, such as cifarresnet18 or wrn16x2.",
        category=UserWarning,
        stacklevel=5,  # past Lightning's wrappers, to the caller
    )
    return True
