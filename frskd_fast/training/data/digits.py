"""Scikit-learn's handwritten digits with few labels: the experiment of examples/digits.py as a data module."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import ImageData, Part, whole_number
from .loader import ArrayReader

CLASSES = 10
POOL_PER_CLASS = 40
SPLIT_SEED = 210308273
# Mean and deviation of the pool's pixels at 16 x 16, where full brightness is 1.
MEAN, STD = 0.303706, 0.318073


class DigitsSplit(NamedTuple):
    """Images float32 (1797, 1, H, W) in 0 .. 16 with labels (1797,), and the row numbers of pool and test set."""

    images: Tensor
    labels: Tensor
    pool: Tensor
    test: Tensor


class DigitsData(ImageData):
    """x = (shift(pixels) / 16 - mean) / std of 8 x 8 digits that were enlarged bilinearly, with few labels.

    The 1797 images are split once, by class: 40 of each digit are the development pool, all others the test set. The
    seed draws the labelled training images from the pool; the rest of the pool is for validation. The test set takes no
    part in any choice. A shift moves each image by its own whole number of pixels in both directions; what comes in is
    background.

    Args:
        labels_per_class: training images of each digit, 1 to 40; with 40 there are no validation images.
        image_side: pixels of a side after enlarging.
        largest_shift: of the augmentation, in pixels; 0 turns it off.
        as_rgb: repeat the grey channel three times, for networks that want colours.
        evaluate_on: what validation uses, "validation" (the rest of the pool) or "test".
        batch_size: 50 by default; common: the other arguments of `ImageData`: seed, mixup, cutmix, ...

    Raises:
        ImportError: when scikit-learn, which the images come with, is missing.

    Example:
        >>> from frskd_fast.training.data import DigitsData
        >>> data = DigitsData(labels_per_class=10)
        >>> data.num_classes, data.image_size, data.channels
        (10, (16, 16), 1)

    Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI repository, 1998.
    """

    pixel_scale = 16.0

    def __init__(
        self,
        labels_per_class: int = 10,
        image_side: int = 16,
        largest_shift: int = 2,
        as_rgb: bool = False,
        evaluate_on: Literal["validation", "test"] = "validation",
        batch_size: int = 50,
        **common: Any,
    ) -> None:
        super().__init__(batch_size=batch_size, **common)
        self.labels_per_class = whole_number(labels_per_class, "labels_per_class", 1, POOL_PER_CLASS)
        side = whole_number(image_side, "image_side", 8)
        self.padding = whole_number(largest_shift, "largest_shift", 0)
        if evaluate_on not in ("validation", "test"):
            raise ValueError(f"evaluate_on is {evaluate_on!r}, but 'validation' or 'test' was wanted.")
        self.evaluate_on = evaluate_on
        self.num_classes, self.image_size, self.channels = CLASSES, (side, side), 3 if as_rgb else 1
        self.mean, self.std = (MEAN,) * self.channels, (STD,) * self.channels
        self._split: DigitsSplit | None = None

    def make_reader(self, part: Part) -> ArrayReader | None:
        """Images and labels of one part, in memory."""
        if self._split is None:
            self._split = load_digits_split(self.image_size[0])
        split = self._split
        if part == "test" or (part == "validation" and self.evaluate_on == "test"):
            rows = split.test
        else:
            training, validation = draw_labelled(split, self.labels_per_class, self.seed)
            rows = training if part == "train" else validation
        if not len(rows):
            return None
        images = split.images[rows].expand(-1, self.channels, -1, -1)
        return ArrayReader(images, split.labels[rows], self.padding, crop_each_view=self.crop_each_view)


def load_digits_split(image_side: int = 16) -> DigitsSplit:
    """The digits, enlarged bilinearly, and their fixed split by class: 40 of each in the pool, the others for the test."""
    try:
        from sklearn.datasets import load_digits  # type: ignore[import-untyped, unused-ignore]
    except ImportError as error:
        raise ImportError(
            "The digits come with scikit-learn, but it could not be imported; run `pip install scikit-learn`."
        ) from error
    digits = load_digits()
    labels = torch.from_numpy(digits.target).long()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(SPLIT_SEED))
    pool = torch.cat([order[labels[order] == digit][:POOL_PER_CLASS] for digit in range(CLASSES)])
    in_pool = torch.zeros(len(labels), dtype=torch.bool)
    in_pool[pool] = True
    images = torch.from_numpy(digits.images).float().unsqueeze(1)
    images = F.interpolate(images, size=image_side, mode="bilinear", align_corners=False)
    return DigitsSplit(images, labels, pool, torch.nonzero(~in_pool).flatten())


def draw_labelled(split: DigitsSplit, labels_per_class: int, seed: int) -> tuple[Tensor, Tensor]:
    """Row numbers of this seed's labelled training images, and of the rest of the pool."""
    order = split.pool[torch.randperm(len(split.pool), generator=torch.Generator().manual_seed(seed))]
    groups = [order[split.labels[order] == digit] for digit in range(CLASSES)]
    training = torch.cat([group[:labels_per_class] for group in groups])
    return training, torch.cat([group[labels_per_class:] for group in groups])
