"""Scenes of scikit-learn's digits on textured backgrounds: semantic segmentation without a download."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import Part, whole_number
from .digits import CLASSES, SPLIT_SEED, load_digits_split
from .segmentation import PairReader, Pixels, SegmentationData
from .streams import Purpose, stream

SIDE = 96
MOST_DIGITS = 5  # in a scene, and at least two
DIGIT_SIDES = 20, 48
MEAN, STD = 0.5, 0.25  # round numbers near those of the scenes


class DigitScenesData(SegmentationData):
    """x = (window(scene) / 255 - 0.5) / 0.25 of 96 x 96 scenes with two to five digits each, and masks of 11 classes.

    Class 0 is the background, class d + 1 the digit d. A scene has a background of coloured noise and stripes; digits of
    any colour that stands out a little, 20 to 48 pixels large, lie on it anywhere and may cover each other. The scenes are
    made in memory: those for training from the seed, those for validation and test always the same. Training digits are the
    400 of `DigitsData`'s development pool; half of the others are for validation, half for the test.

    Args:
        training_scenes, evaluation_scenes: how many; as many for validation as for the test.
        evaluate_on: what validation uses, "validation" or "test".
        crop_size, short_side, flip, blur, pad_label, mean, std, transforms: as `SegmentationData` takes them. Digits are
            not mirrored by default, and are scaled by 3/4 to 4/3.
        batch_size: 16 by default; common: the other arguments of `SegmentationData`: seed, workers, ...

    Raises:
        ImportError: when scikit-learn, which the digits come with, is missing.

    Example:
        >>> from frskd_fast.training.data import DigitScenesData
        >>> data = DigitScenesData(training_scenes=4, batch_size=2)
        >>> images, masks = data.on_after_batch_transfer(next(iter(data.train_dataloader())))
        >>> images.shape, masks.shape, data.class_names[:2]
        (torch.Size([2, 3, 96, 96]), torch.Size([2, 96, 96]), ('background', 'digit 0'))

    Source: ours; the digits are those of E. Alpaydin and C. Kaynak, UCI repository, 1998.
    """

    def __init__(
        self,
        training_scenes: int = 256,
        evaluation_scenes: int = 200,
        evaluate_on: Literal["validation", "test"] = "validation",
        crop_size: int | tuple[int, int] = SIDE,
        short_side: tuple[int, int] = (72, 128),
        flip: float = 0.0,
        mean: tuple[float, float, float] = (MEAN,) * 3,
        std: tuple[float, float, float] = (STD,) * 3,
        workers: int = 0,
        batch_size: int = 16,
        **common: Any,
    ) -> None:
        super().__init__(
            1 + CLASSES,
            crop_size,
            short_side,
            flip,
            mean=mean,
            std=std,
            workers=workers,
            batch_size=batch_size,
            **common,
        )
        self.training_scenes = whole_number(training_scenes, "training_scenes", 1)
        self.evaluation_scenes = whole_number(evaluation_scenes, "evaluation_scenes", 1)
        if evaluate_on not in ("validation", "test"):
            raise ValueError(f"evaluate_on is {evaluate_on!r}, but 'validation' or 'test' was wanted.")
        self.evaluate_on = evaluate_on
        self.class_names = ("background", *(f"digit {digit}" for digit in range(CLASSES)))

    def make_reader(self, part: Part) -> PairReader:
        """The scenes of one part, in memory."""
        split = load_digits_split(image_side=8)
        if part == "train":
            rows, count, seed, which = split.pool, self.training_scenes, self.seed, 0
        else:
            which = 1 if part == self.evaluate_on == "validation" else 2
            rows, count, seed = split.test[which - 1 :: 2], self.evaluation_scenes, SPLIT_SEED
        digits, labels = split.images[rows] / 16, split.labels[rows]
        scenes = [make_scene(digits, labels, stream(seed, Purpose.SCENES, which, number)) for number in range(count)]
        images, masks = (torch.stack(parts) for parts in zip(*scenes, strict=True))
        return SceneReader(images.permute(0, 2, 3, 1).contiguous().numpy(), masks.numpy(), **self.settings())


class SceneReader(PairReader):
    """Pairs in memory: images uint8 (N, H, W, 3) and masks uint8 (N, H, W)."""

    def __init__(self, images: Pixels, masks: Pixels, size: tuple[int, int], **settings: Any) -> None:
        super().__init__(size, **settings)
        self.images, self.masks = images, masks

    def __len__(self) -> int:
        return len(self.images)

    def pair(self, row: int) -> tuple[Pixels, Pixels]:
        return self.images[row], self.masks[row]


def make_scene(digits: Tensor, labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """One scene uint8 (3, 96, 96) and its mask uint8 (96, 96), from digits (D, 1, 8, 8) in 0 .. 1 with labels (D,)."""

    def whole(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    ground, other = torch.rand(2, 3, 1, 1, generator=generator)
    scene = ground + (other - ground) * _texture(generator)
    mask = torch.zeros(SIDE, SIDE, dtype=torch.uint8)
    for _ in range(whole(2, MOST_DIGITS)):
        digit, side = whole(0, len(digits) - 1), whole(*DIGIT_SIDES)
        top, left = whole(0, SIDE - side), whole(0, SIDE - side)
        window = slice(top, top + side), slice(left, left + side)
        ink = F.interpolate(digits[digit : digit + 1], size=side, mode="bilinear", align_corners=False)[0, 0]
        opaque = (4 * ink - 1).clamp(0, 1)
        below, colour = scene[:, *window], torch.rand(3, 1, 1, generator=generator)
        # Where a colour would hardly stand out, its opposite does.
        if (colour - below.mean((1, 2), keepdim=True)).abs().mean() < 0.25:
            colour = (colour + 0.5) % 1
        scene[:, *window] = below + (colour - below) * opaque
        mask[window][ink > 0.375] = labels[digit].to(torch.uint8) + 1
    scene += 0.04 * torch.randn(3, SIDE, SIDE, generator=generator)
    return (255 * scene.clamp(0, 1)).round().to(torch.uint8), mask


def _texture(generator: torch.Generator) -> Tensor:
    """(1, 96, 96) in 0 .. 1: noise of four coarsenesses, and stripes of any direction and width."""
    texture = torch.zeros(1, SIDE, SIDE)
    for cells in (3, 6, 12, 24):
        noise = torch.rand(1, 1, cells, cells, generator=generator)
        texture += F.interpolate(noise, size=SIDE, mode="bilinear", align_corners=False)[0] / 4
    angle, width, shift = torch.rand(3, generator=generator).tolist()
    step = torch.arange(SIDE) * 2 * math.pi / (4 + 20 * width)
    waves = torch.cos(step[:, None] * math.cos(math.pi * angle) + step * math.sin(math.pi * angle) + 7 * shift)
    return 0.75 * texture + 0.125 * (1 + waves)
