"""Mixed and rotated batches: mixup, cutmix, and the four rotations with their joint labels.

Every random number is drawn on the host, from a generator of the CPU, so nothing here waits for a device and one seed gives
one batch on every device. No function writes into its arguments.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from frskd_fast.ops import _checks
from frskd_fast.ops.labels import IGNORED, is_mix

__all__ = ["cutmix", "joint_labels", "mixup", "rotate4"]

MixedBatch = tuple[Tensor, tuple[Tensor, Tensor, float]]


def mixup(
    images: Tensor, targets: Tensor, concentration: float, generator: torch.Generator | None = None
) -> MixedBatch:
    """mixed = lam * images + (1 - lam) * images[permutation], with one lam ~ Beta(concentration, concentration).

    Args:
        images: (N, C, H, W) float32, bfloat16, float16 or float64, any device and strides.
        targets: (N,) class indices.
        concentration: a > 0 of both arguments of the Beta distribution; FRSKD uses 0.2.
        generator: where random numbers come from, a generator of the CPU; None is PyTorch's global one. Drawn in this order:
            lam, permutation.

    Returns:
        ``(mixed, (targets, targets[permutation], lam))``: a new batch, and the targets in the form that `FRSKDLoss`,
        `cross_entropy_kd` and the tasks take; lam is a Python float.

    Raises:
        TypeError, ValueError: a sentence naming the argument, what came and what was wanted.

    Example:
        >>> import torch
        >>> images, targets = torch.rand(4, 3, 8, 8), torch.arange(4)
        >>> mixed, (first, second, lam) = mixup(images, targets, 0.2, torch.Generator().manual_seed(0))
        >>> wanted = lam * images + (1 - lam) * images[second]  # here a label is also the position of its image
        >>> torch.allclose(mixed, wanted), torch.equal(first, targets)
        (True, True)

    Source: Zhang et al., "mixup", ICLR 2018 (arXiv 1710.09412), eq. 1, with one lam a batch as FRSKD's code has it.
    """
    _checked_batch(images, targets)
    _checks.floating_tensor(images, "images")
    lam = _beta(concentration, generator)
    permutation = _permutation(images, generator)
    mixed = images[permutation].lerp_(images, lam)
    return mixed, (targets, targets[permutation], lam)


def cutmix(
    images: Tensor, targets: Tensor, concentration: float, generator: torch.Generator | None = None
) -> MixedBatch:
    """mixed = images with one box pasted from images[permutation]; lam = 1 - area of the box / area of the image.

    A first lam ~ Beta(concentration, concentration) gives the box: floor(side * sqrt(1 - lam)) long on each axis, its centre
    a uniform integer in [0, side), from centre - length // 2 to centre + length // 2, cut off at the image's edges. The lam
    that is returned is that of the box as it was cut.

    Args:
        images: (N, C, H, W), any dtype, device and strides; H and W may differ.
        targets: (N,) class indices.
        concentration: a > 0 of both arguments of the Beta distribution; FRSKD uses 1.0.
        generator: where random numbers come from, a generator of the CPU; None is PyTorch's global one. Drawn in this order:
            lam, permutation, row of the centre, column of the centre.

    Returns:
        ``(mixed, (targets, targets[permutation], lam))`` as `mixup`.

    Raises:
        TypeError, ValueError: a sentence naming the argument, what came and what was wanted.

    Example:
        >>> import torch
        >>> images, targets = torch.zeros(2, 3, 8, 8) + torch.tensor([0.0, 1.0]).view(2, 1, 1, 1), torch.tensor([0, 1])
        >>> mixed, (first, second, lam) = cutmix(images, targets, 1.0, torch.Generator().manual_seed(0))
        >>> second.tolist(), mixed.mean((1, 2, 3)).tolist(), 1 - lam
        ([1, 0], [0.125, 0.875], 0.125)

    Source: Yun et al., "CutMix", ICCV 2019 (arXiv 1905.04899), section 3.1 and its appendix A, in FRSKD's form.
    """
    _checked_batch(images, targets)
    lam = _beta(concentration, generator)
    permutation = _permutation(images, generator)
    height, width = images.shape[2:]
    top, bottom = _interval(height, lam, generator)
    left, right = _interval(width, lam, generator)
    mixed = images.clone()
    mixed[:, :, top:bottom, left:right] = images[:, :, top:bottom, left:right][permutation]
    lam = 1.0 - (bottom - top) * (right - left) / (height * width)
    return mixed, (targets, targets[permutation], lam)


def rotate4(images: Tensor) -> Tensor:
    """rotated[4n + r] = images[n] turned counter-clockwise by 90 * r degrees, r = 0..3; (N, C, H, H) -> (4N, C, H, H).

    Every element is written once, by one gather; a batch in `torch.channels_last` stays so.

    Args:
        images: (N, C, H, H), any dtype and device.

    Returns:
        (4N, C, H, H); row 4n is image n as it was.

    Raises:
        TypeError, ValueError: not a batch of square images.

    Example:
        >>> import torch
        >>> rotate4(torch.tensor([[[[1, 2], [3, 4]]]])).flatten(1).tolist()
        [[1, 2, 3, 4], [2, 4, 1, 3], [4, 3, 2, 1], [3, 1, 4, 2]]

    Source: Lee et al., ICML 2020 (arXiv 1910.05872), section 3; the same order as ``torch.rot90(images, r, (2, 3))``.
    """
    _checked_images(images)
    batch, channels, height, width = images.shape
    if height != width:
        raise ValueError(
            f"images has maps of {height} x {width} pixels, but square images were wanted: turned by 90 degrees, others "
            "do not fit into one batch; crop or resize them."
        )
    side = torch.arange(height, device=images.device)
    rows, columns = side.view(-1, 1), side.view(1, -1)
    last = height - 1
    # Where the pixel (row, column) of each rotation is read.
    sources = torch.stack(
        [
            rows * height + columns,
            columns * height + (last - rows),
            (last - rows) * height + (last - columns),
            (last - columns) * height + rows,
        ]
    ).flatten(1)
    if channels > 1 and images.is_contiguous(memory_format=torch.channels_last):
        pixels = images.permute(0, 2, 3, 1).flatten(1, 2)
        return pixels[:, sources].view(4 * batch, height, width, channels).permute(0, 3, 1, 2)
    planes = images.reshape(batch, 1, channels, height * width).expand(-1, 4, -1, -1)
    sources = sources.view(1, 4, 1, -1).expand(batch, -1, channels, -1)
    return planes.gather(3, sources).view(4 * batch, channels, height, width)


def joint_labels(targets: Any, ignore_index: int = -100) -> Any:
    """joint[4n + r] = 4 * targets[n] + r: which class and which rotation, for the rows of `rotate4`.

    Args:
        targets: class indices (N,); ``(targets_a, targets_b, lam)`` of mixup or cutmix; or probabilities (N, K).
        ignore_index: a class index that becomes -100 in all four rows, which no joint label is.

    Returns:
        Class indices (4N,) out of 4K; ``(joint_a, joint_b, lam)``; or probabilities (4N, 4K) with those of image n in the
        columns 4k + r of row 4n + r.

    Raises:
        TypeError, ValueError: a sentence naming the argument, what came and what was wanted.

    Example:
        >>> import torch
        >>> joint_labels(torch.tensor([3, 1])).tolist()
        [12, 13, 14, 15, 4, 5, 6, 7]

    Source: Lee et al., ICML 2020 (arXiv 1910.05872), section 3.
    """
    if is_mix(targets):
        return joint_labels(targets[0], ignore_index), joint_labels(targets[1], ignore_index), targets[2]
    if not isinstance(targets, Tensor):
        raise TypeError(
            f"targets is a {type(targets).__name__}, but class indices, a tuple (targets_a, targets_b, lam), or "
            "probabilities were wanted."
        )
    rotations = torch.arange(4, device=targets.device)
    if targets.dim() == 2 and targets.is_floating_point():
        here = (rotations.view(4, 1) == rotations).to(targets.dtype)
        # (n, r, k, c): the probability of class k where the column's rotation c is the row's rotation r.
        return (targets.view(-1, 1, targets.shape[1], 1) * here.view(4, 1, 4)).flatten(2).flatten(0, 1)
    if targets.dim() != 1 or targets.is_floating_point() or targets.dtype == torch.bool:
        raise ValueError(
            f"targets has shape {tuple(targets.shape)} and dtype {targets.dtype}, but class indices (N,) or probabilities "
            "(N, K) were wanted."
        )
    labels = targets.long().unsqueeze(1)
    return torch.add(rotations, labels, alpha=4).masked_fill_(labels == ignore_index, IGNORED).flatten()


def _checked_images(images: Any) -> None:
    if not isinstance(images, Tensor):
        raise TypeError(f"images is a {type(images).__name__}, but a torch.Tensor was wanted.")
    if images.dim() != 4:
        raise ValueError(f"images has shape {tuple(images.shape)}, but (N, C, H, W) was wanted.")


def _checked_batch(images: Any, targets: Any) -> None:
    _checked_images(images)
    if not isinstance(targets, Tensor):
        raise TypeError(f"targets is a {type(targets).__name__}, but class indices (N,) were wanted.")
    if targets.shape != images.shape[:1] or targets.is_floating_point():
        raise ValueError(
            f"targets has shape {tuple(targets.shape)} and dtype {targets.dtype}, but one class index for each of the "
            f"{images.shape[0]} images was wanted; mix before labels become probabilities."
        )
    if targets.device != images.device:
        raise ValueError(
            f"targets is on {targets.device}, but images is on {images.device} and one device was wanted; move one of them "
            f"with .to({str(images.device)!r})."
        )


def _beta(concentration: Any, generator: Any) -> float:
    concentration = _checks.positive_number(concentration, "concentration")
    if generator is not None and (not isinstance(generator, torch.Generator) or generator.device.type != "cpu"):
        came = f"on {generator.device}" if isinstance(generator, torch.Generator) else f"a {type(generator).__name__}"
        raise TypeError(
            f"generator is {came}, but a torch.Generator of the CPU was wanted: the mixing weight is a number of the host."
        )
    # PyTorch's own Beta distribution takes no generator.
    seed = int(torch.randint(2**63 - 1, (), generator=generator))
    return float(np.random.default_rng(seed).beta(concentration, concentration))


def _permutation(images: Tensor, generator: torch.Generator | None) -> Tensor:
    permutation = torch.randperm(images.shape[0], generator=generator)
    if images.device.type == "cuda":
        # From pinned memory the copy does not wait for the device.
        return permutation.pin_memory().to(images.device, non_blocking=True)
    return permutation.to(images.device)


def _interval(side: int, lam: float, generator: torch.Generator | None) -> tuple[int, int]:
    """First row (column) of the box and the one behind its last."""
    half = int(side * (1.0 - lam) ** 0.5) // 2
    centre = int(torch.randint(side, (), generator=generator))
    return max(centre - half, 0), min(centre + half, side)
