"""Pairs of image file and mask file, decoded when a batch needs them; a folder of one's own with such pairs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy

from .base import Part, whole_number
from .decoding import errors_of, load, load_as
from .errors import DataFileError, MissingDataError
from .listing import SUFFIXES, entries, is_image
from .segmentation import PairReader, Pixels, SegmentationData

FilePair = tuple[str, str]  # paths of image and mask
MASK_MODES = ("L", "P")  # a byte for each pixel: the class, or the index of a palette's colour
NAMED_LABELS = 5  # of those that a message lists


class MaskFolderData(SegmentationData):
    """x = (window(pixels) / 255 - mean) / std and window(mask), of images and masks in folders of their own.

    `root` holds `train/images/NAME.jpg` and `train/masks/NAME.png`, the same in `val/`, and perhaps in `test/`. An image and
    its mask have the same name but for the suffix, and the same size. Images may be of any format that Pillow reads; masks
    are of a lossless one, usually PNG, with one byte for each pixel: the class 0 .. K - 1 or `ignore_index`. Such a file may
    be grey or have a palette, whose colours do not matter. Where there is only one of `val` and `test`, it is both.

    Args:
        root: the folder described above. Nothing is downloaded.
        classes: their number K, or their names in the order of the labels.
        common: as `SegmentationData` takes them: crop_size, short_side, flip, blur, pad_label, ignore_index, mean, std,
            transforms, batch_size, evaluation_batch_size, seed, workers, drop_last, ...

    Raises:
        MissingDataError, DataFileError, CorruptImageError: what file, what was found, what was wanted.
        ImportError: when Pillow is missing.

    Example:
        >>> from frskd_fast.training.data import MaskFolderData
        >>> data = MaskFolderData("roads", classes=["field", "road", "house"], crop_size=256, short_side=(192, 384))
        >>> data.num_classes, data.class_names, data.image_size
        (3, ('field', 'road', 'house'), (256, 256))
    """

    def __init__(self, root: str, classes: int | list[str], **common: Any) -> None:
        named = not isinstance(classes, int)
        count = len(classes) if isinstance(classes, (list, tuple)) else classes
        super().__init__(whole_number(count, "classes", 1, 255), **common)
        self.root = str(root)
        self.class_names = tuple(map(str, classes)) if named else None  # type: ignore[arg-type]

    def make_reader(self, part: Part) -> PairReader | None:
        """The pairs of one part; they are decoded when a batch needs them."""
        names = {"train": ("train",), "validation": ("val", "test"), "test": ("test", "val")}[part]
        for name in names:
            folder = Path(self.root) / name
            if folder.is_dir():
                return PairFileReader(pairs_in(folder), self.num_classes, self.ignore_index, **self.settings())
        raise MissingDataError(
            f"{Path(self.root) / names[0]} is not a folder. {names[0]}/images/NAME.jpg and {names[0]}/masks/NAME.png were "
            "wanted below root; pass the folder that holds train and val."
        )


class PairFileReader(PairReader):
    """Images with masks in files.

    Args:
        pairs: paths of each image and its mask.
        classes: K; masks have labels 0 .. K - 1 and `ignore_index`.
        ignore_index: label of pixels that do not count.
        settings: as `PairReader` takes them.
    """

    def __init__(self, pairs: list[FilePair], classes: int, ignore_index: int, **settings: Any) -> None:
        super().__init__(**settings)
        # Arrays of bytes: Python's strings would be copied into every worker by their reference counts.
        self._images, self._masks = (numpy.array([*map(os.fsencode, paths)]) for paths in zip(*pairs, strict=True))
        self.classes, self.ignore_index = classes, ignore_index
        for path in (self.name(0), self.mask_name(0)):
            if not os.path.isfile(path):
                raise MissingDataError(
                    f"{path}, of the first pair of the list, was not found; unpack the data set's archive again."
                )

    def __len__(self) -> int:
        return len(self._images)

    def name(self, row: int) -> str:
        """The path of the image."""
        return os.fsdecode(self._images[row])

    def mask_name(self, row: int) -> str:
        """The path of its mask."""
        return os.fsdecode(self._masks[row])

    def pair(self, row: int) -> tuple[Pixels, Pixels]:
        image_path, mask_path = self.name(row), self.mask_name(row)
        with errors_of(image_path):
            pixels = numpy.asarray(load_as(image_path))
        mask = self._mask(mask_path)
        if mask.shape != pixels.shape[:2]:
            found = [f"{width} x {height}" for height, width in (mask.shape, pixels.shape[:2])]
            raise DataFileError(
                f"{mask_path} has {found[0]} pixels and its image {image_path} {found[1]}; a mask of the size of its image "
                "was wanted."
            )
        return pixels, mask

    def _mask(self, path: str) -> Pixels:
        with errors_of(path):
            image = load(path)
            if image.format == "JPEG":
                raise DataFileError(
                    f"{path} is a JPEG file, which changes the labels of a mask; save the mask as a PNG from its source."
                )
            if image.mode not in MASK_MODES:
                raise DataFileError(
                    f"{path} has the mode {image.mode}, but a mask with one byte for each pixel, its class, was wanted (grey "
                    "or with a palette); turn its colours or values into class indices and save them as an 8-bit PNG."
                )
            mask: Pixels = numpy.asarray(image)
        wrong = (mask >= self.classes) & (mask != self.ignore_index)
        if wrong.any():
            labels = numpy.unique(mask[wrong])
            named = ", ".join(map(str, labels[:NAMED_LABELS])) + (", ..." if len(labels) > NAMED_LABELS else "")
            raise DataFileError(
                f"{path} has the labels {named}, but 0 .. {self.classes - 1} and ignore_index {self.ignore_index} were wanted; "
                "check the number of classes, and that the mask holds class indices and not colours or grey levels."
            )
        return mask


def pairs_in(folder: Path) -> list[FilePair]:
    """The files of `folder/images`, each with the one of `folder/masks` whose name is the same but for the suffix, sorted."""
    images, masks = (_by_stem(folder / name) for name in ("images", "masks"))
    for found, other, what in ((images, masks, "mask"), (masks, images, "image")):
        alone = sorted(found.keys() - other.keys())
        if alone:
            raise MissingDataError(
                f"{found[alone[0]]} has no {what}: {folder / (what + 's') / alone[0]}.* was not found ({len(alone)} such files "
                f"in {found[alone[0]].parent}). Add what is missing, or move these files away."
            )
    return [(str(path), str(masks[stem])) for stem, path in sorted(images.items())]


def _by_stem(folder: Path) -> dict[str, Path]:
    if not folder.is_dir():
        raise MissingDataError(
            f"{folder} is not a folder; {folder.parent.name}/images/NAME.jpg and {folder.parent.name}/masks/NAME.png were "
            "wanted below root."
        )
    files: dict[str, Path] = {}
    for entry in entries(folder):
        path = Path(entry.path)
        if not path.name.startswith(".") and is_image(entry):
            if path.stem in files:
                raise DataFileError(f"{files[path.stem]} and {path} have the same name; one of them was wanted.")
            files[path.stem] = path
    if not files:
        raise DataFileError(f"{folder} has no image; files that end in one of {', '.join(SUFFIXES)} were wanted.")
    return files
