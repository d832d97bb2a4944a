"""What all data modules with masks have in common: pairs of image and mask, augmented together on the device."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import numpy
import numpy.typing
import torch
from torch import Tensor

from .augmentation import normalise
from .base import ImageData, colour_statistics, probability, whole_number
from .layouts import IMAGENET_MEAN, IMAGENET_STD
from .loader import ImageBatch, Reader, Request
from .mask_augmentation import draw_pairs, resample_images, resample_masks, training_window, whole_window
from .streams import Purpose, stream_seed

Pixels = numpy.typing.NDArray[numpy.uint8]
PairTransform = Callable[[Any, Any], Any]
LARGEST_LABEL = 255  # of a byte
CLASSIFICATION_ONLY = ("mixup", "cutmix", "crop_each_view")


class SegmentationData(ImageData):
    """x = (window(pixels) / 255 - mean) / std and window(mask): images and masks for semantic segmentation.

    The contract of `ImageData` holds, with these differences: targets are masks, int64 (N, h, w), whose pixels are classes
    0 .. K - 1 or `ignore_index`; there is no mixup, cutmix or crop of views; nothing can be kept about a training image.
    `class_names` has K names, or is None.

    Args:
        num_classes: K.
        crop_size: side of the square images that the network sees, or (h, w).
        short_side: bounds of the random length to which the shorter side of a training image is scaled, in pixels, both
            included. The window is cut out of the scaled image, after black padding where it is smaller than the window.
        flip: probability of a horizontal flip in training.
        blur: probability of a Gaussian blur in training, whose radius is U(0, 1) pixels.
        pad_label: label of the padding: 0 as in the original, which teaches it as background, or `ignore_index`.
        ignore_index: label of pixels that do not count.
        mean, std: of images in 0 .. 1, ImageNet's by default.
        transforms: `(image, mask) -> (image, mask)` in place of the augmentation above, such as a
            `torchvision.transforms.v2.Compose`. It is called in the workers with a `tv_tensors.Image` uint8 (3, H, W) and
            a `tv_tensors.Mask` uint8 (H, W) (plain tensors where torchvision is not installed) and must return the same
            with H, W = crop_size, not normalised. It may draw from torch's global generator, which is seeded for each image.
        workers: as `ImageData` takes it; by default one for each core.
        common: the other arguments of `ImageData`: batch_size, evaluation_batch_size, seed, drop_last, ...

    Source: the data set of FRSKD's released segmentation code.
    """

    class_names: tuple[str, ...] | None = None

    def __init__(
        self,
        num_classes: int,
        crop_size: int | tuple[int, int] = 512,
        short_side: tuple[int, int] = (256, 1024),
        flip: float = 0.5,
        blur: float = 0.5,
        pad_label: int = 0,
        ignore_index: int = LARGEST_LABEL,
        mean: tuple[float, float, float] = IMAGENET_MEAN,
        std: tuple[float, float, float] = IMAGENET_STD,
        transforms: PairTransform | None = None,
        workers: int = -1,
        **common: Any,
    ) -> None:
        super().__init__(workers=workers, **common)
        for name in CLASSIFICATION_ONLY:
            if getattr(self, name):
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}, but {type(self).__name__} has a mask for each image, which it does "
                    "not mix or turn; leave it out."
                )
        sides = tuple(crop_size) if isinstance(crop_size, (tuple, list)) else (crop_size, crop_size)
        if len(sides) != 2:
            raise ValueError(f"crop_size is {crop_size!r}, but a whole number or two, (height, width), was wanted.")
        self.image_size = whole_number(sides[0], "crop_size", 1), whole_number(sides[1], "crop_size", 1)
        self.channels = 3
        low, high = short_side
        self.short_side = whole_number(low, "short_side", 1), whole_number(high, "short_side", low)
        self.flip, self.blur = probability(flip, "flip"), probability(blur, "blur")
        self.num_classes = num_classes
        self.ignore_index = whole_number(ignore_index, "ignore_index", 0, LARGEST_LABEL)
        self.pad_label = whole_number(pad_label, "pad_label", 0, LARGEST_LABEL)
        if self.ignore_index < num_classes:
            raise ValueError(
                f"ignore_index is {ignore_index}, which is one of the {num_classes} classes and would count in the metrics; "
                f"a label from {num_classes} to {LARGEST_LABEL} was wanted."
            )
        if num_classes <= self.pad_label != self.ignore_index:
            raise ValueError(
                f"pad_label is {pad_label}, but one of the {num_classes} classes or ignore_index ({ignore_index}) was wanted."
            )
        self.mean, self.std = colour_statistics(mean, std, 3)
        self.transforms = transforms

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int = 0) -> Any:
        """(images, masks) as a step takes them, made on the device of `batch`; what is no `ImageBatch` stays as it is."""
        if not isinstance(batch, ImageBatch):
            return batch
        images, masks = batch.images, batch.targets
        if batch.crops is None:
            masks = masks.long()
        else:
            images = resample_images(images, batch.crops, self.image_size)
            masks = resample_masks(masks, batch.crops, self.image_size, self.pad_label)
        prepared: Any = normalise(images, *self._statistics_on(images.device), self.pixel_scale), masks
        return prepared if self.trainer is None else self.trainer.precision_plugin.convert_input(prepared)

    def hand_out_keys(self) -> tuple[int, dict[str, Any]]:
        """Refused: every training image is scaled and cropped at random."""
        raise ValueError(
            f"{type(self).__name__} scales and crops training images at random, so no image comes a second time and nothing "
            "can be kept about it; leave the teacher cache out."
        )

    def settings(self) -> dict[str, Any]:
        """What a `PairReader` needs to know of this module."""
        return {
            "size": self.image_size,
            **{name: getattr(self, name) for name in ("short_side", "flip", "blur", "transforms")},
        }


class PairReader(Reader):
    """Pairs of image and mask of different sizes, in a batch whose windows are cut out on the device.

    A batch has the images in the upper left corners of arrays that fit the largest of them, and for each one its window of
    `mask_augmentation`. Subclasses say what the pairs are.

    Args:
        size: (h, w) of the windows.
        short_side, flip, blur, transforms: as `SegmentationData` takes them.
    """

    def __init__(
        self,
        size: tuple[int, int],
        short_side: tuple[int, int] = (256, 1024),
        flip: float = 0.5,
        blur: float = 0.5,
        transforms: PairTransform | None = None,
    ) -> None:
        self.size, self.short_side, self.flip, self.blur, self.transforms = size, short_side, flip, blur, transforms

    @abstractmethod
    def pair(self, row: int) -> tuple[Pixels, Pixels]:
        """Image (H, W, 3) and mask (H, W) of this row, checked."""

    def read(self, request: Request) -> tuple[ImageBatch, tuple[int, ...]]:
        pairs = [self.pair(row) for row in request.rows.tolist()]
        if request.training and self.transforms is not None:
            return self._transformed(request, pairs), ()
        heights, widths = zip(*(mask.shape for _, mask in pairs), strict=True)
        images = numpy.zeros((len(pairs), max(heights), max(widths), 3), dtype=numpy.uint8)
        masks = numpy.zeros(images.shape[:3], dtype=numpy.uint8)
        for row, (image, mask) in enumerate(pairs):
            images[row, : heights[row], : widths[row]], masks[row, : heights[row], : widths[row]] = image, mask
        if request.training:
            drawn = request.draw(draw_pairs).tolist()
            windows = [
                training_window(*pair, self.size, self.short_side, self.flip, self.blur)
                for pair in zip(heights, widths, drawn, strict=True)
            ]
        else:
            windows = [whole_window(*pair, self.size) for pair in zip(heights, widths, strict=True)]
        # Channels stay last in memory, as the images come; the device puts them in front.
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2)
        return ImageBatch(pixels, torch.from_numpy(masks), torch.tensor(windows), None), ()

    def _transformed(self, request: Request, pairs: list[tuple[Pixels, Pixels]]) -> ImageBatch:
        assert self.transforms is not None
        wrap_image, wrap_mask = _tv_tensors()
        images, masks = [], []
        with torch.random.fork_rng(devices=[]):
            for position, (pixels, labels) in enumerate(pairs):
                place = position * request.world + request.rank
                seed = stream_seed(request.seed, Purpose.AUGMENTATION, request.epoch, request.batch, place)
                torch.manual_seed(seed)
                given = torch.from_numpy(pixels.copy()).permute(2, 0, 1), torch.from_numpy(labels.copy())
                image, mask = self.transforms(wrap_image(given[0]), wrap_mask(given[1]))
                for name, made, shape in (("image", image, (3, *self.size)), ("mask", mask, self.size)):
                    if tuple(made.shape) != shape or made.dtype != torch.uint8:
                        raise ValueError(
                            f"transforms made of {self.name(int(request.rows[position]))} a {made.dtype} {name} of shape "
                            f"{tuple(made.shape)}, but uint8 of shape {shape} was wanted; end with a crop to crop_size, and "
                            "leave the conversion to floats and the normalisation out, which the data module does itself."
                        )
                images.append(image.as_subclass(Tensor))
                masks.append(mask.as_subclass(Tensor))
        return ImageBatch(torch.stack(images), torch.stack(masks), None, None)


def _tv_tensors() -> tuple[Callable[[Tensor], Any], Callable[[Tensor], Any]]:
    """What makes an image and a mask for transforms of torchvision: nothing where it is not installed."""
    try:
        from torchvision import tv_tensors
    except ImportError:
        return lambda image: image, lambda mask: mask
    return tv_tensors.Image, tv_tensors.Mask
