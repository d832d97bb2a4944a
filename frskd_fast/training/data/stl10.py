"""STL-10 from the binary files of its authors, shrunk to the side that a network for small images takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy
import numpy.typing
import torch

from .augmentation import draw_resized_crops, random_resized_crop, resize_and_centre_crop
from .base import ImageData, Part, colour_statistics, probability, whole_number
from .errors import DataFileError, MissingDataError
from .loader import ImageBatch, Reader, Request

SIDE = 96
FOLDER = "stl10_binary"
ARCHIVE = f"{FOLDER}.tar.gz"
Pixels = numpy.typing.NDArray[numpy.uint8]


class STL10Data(ImageData):
    """x = (random_resized_crop(pixels) / 255 - mean) / std in training, the resized image otherwise: 10 classes.

    5,000 labelled training and 8,000 test images of 96 x 96 pixels; the 100,000 without a label are not read. The test
    images are for validation, too.

    Args:
        root: the folder that holds `stl10_binary/`, or that folder itself, with train_X.bin, train_y.bin, test_X.bin and
            test_y.bin. Nothing is downloaded.
        image_size: side of the images that the network sees.
        flip: probability of a horizontal flip in training.
        mean, std: of images in 0 .. 1.
        workers: as `ImageData` takes it; by default one for each core.
        common: as `ImageData` takes them: batch_size, seed, ...

    Raises:
        MissingDataError, DataFileError: what file, what was found, what was wanted.

    Example:
        >>> from frskd_fast.training.data import STL10Data
        >>> data = STL10Data("datasets")
        >>> data.num_classes, data.image_size
        (10, (32, 32))

    Source: Coates, Lee and Ng, AISTATS 2011; the numbers are those of the linear probe in HSAKD's released code.
    """

    def __init__(
        self,
        root: str = "data",
        image_size: int = 32,
        flip: float = 0.5,
        mean: tuple[float, float, float] = (0.5, 0.5, 0.5),
        std: tuple[float, float, float] = (0.5, 0.5, 0.5),
        workers: int = -1,
        **common: Any,
    ) -> None:
        super().__init__(workers=workers, **common)
        if self.crop_each_view:
            raise ValueError("crop_each_view is set, but STL-10's images are cropped in the workers; set it to false.")
        side = whole_number(image_size, "image_size", 1, SIDE)
        self.root, self.num_classes, self.image_size, self.channels = str(root), 10, (side, side), 3
        self.flip = probability(flip, "flip")
        self.mean, self.std = colour_statistics(mean, std, 3)

    def make_reader(self, part: Part) -> Reader:
        """Pixels and labels of one part, in memory."""
        if part == "validation":
            test = self.reader("test")
            assert test is not None
            return test
        return STL10Reader(*read_stl10(self.root, part), self.image_size, self.flip)


class STL10Reader(Reader):
    """Pixels uint8 (N, 96, 96, 3) in memory, and labels (N,), cropped or resized to `size` when a batch needs them."""

    def __init__(self, pixels: Pixels, labels: torch.Tensor, size: tuple[int, int], flip: float) -> None:
        self.pixels, self.labels, self.size, self.flip = pixels, labels, size, flip

    def __len__(self) -> int:
        return len(self.pixels)

    def read(self, request: Request) -> tuple[ImageBatch, tuple[int, ...]]:
        from PIL import Image

        uniforms = request.draw(draw_resized_crops).tolist() if request.training else None
        made = numpy.empty((len(request.rows), *self.size, 3), dtype=numpy.uint8)
        for position, row in enumerate(request.rows.tolist()):
            image = Image.fromarray(self.pixels[row])
            if uniforms is None:
                image = resize_and_centre_crop(image, self.size[0], self.size)
            else:
                image = random_resized_crop(image, self.size, uniforms[position], flip=self.flip)
            made[position] = numpy.asarray(image)
        images = torch.from_numpy(made).permute(0, 3, 1, 2)
        return ImageBatch(images, self.labels[torch.from_numpy(request.rows)], None, request.mixing_seed()), ()


def read_stl10(root: str, part: str) -> tuple[Pixels, torch.Tensor]:
    """Pixels uint8 (N, 96, 96, 3) and labels int64 (N,) in 0 .. 9 of "train" or "test", checked."""
    folder = Path(root) if Path(root).name == FOLDER else Path(root) / FOLDER
    content = []
    for name in (f"{part}_X.bin", f"{part}_y.bin"):
        if not (folder / name).is_file():
            raise MissingDataError(
                f"{folder / name} was not found. Download the binary files of STL-10 from its authors' page, and pass as "
                f"root the folder into which {ARCHIVE} was unpacked."
            )
        content.append(numpy.fromfile(folder / name, dtype=numpy.uint8))
    pixels, labels = content
    image = 3 * SIDE * SIDE
    if not len(labels) or len(pixels) != len(labels) * image or labels.min() < 1 or labels.max() > 10:
        raise DataFileError(
            f"{folder} has {len(pixels)} bytes of pixels and {len(labels)} labels for {part!r}, but {image} bytes for each "
            f"label and labels from 1 to 10 were wanted. Unpack {ARCHIVE} of STL-10's authors again."
        )
    # Each channel is stored column by column.
    turned = pixels.reshape(-1, 3, SIDE, SIDE).transpose(0, 3, 2, 1)
    return numpy.ascontiguousarray(turned), torch.from_numpy(labels.astype(numpy.int64) - 1)
