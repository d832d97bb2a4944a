"""CIFAR-10 and CIFAR-100 from the Python pickles of their authors, read without running anything that they ask for."""

from __future__ import annotations

import hashlib
import tarfile
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import numpy.typing
import torch
from torch import Tensor

from .augmentation import PADDING_MODES
from .base import ImageData, Part, colour_statistics, probability, whole_number
from .cifar_pickle import unpickled
from .errors import DataFileError, MissingDataError
from .loader import ArrayReader
from .subset import stratified_rows

SIDE = 32
PIXELS = 3 * SIDE * SIDE
IMAGES = {"train": 50_000, "test": 10_000}  # of both originals
SPLIT_SEED = 210308273  # of the images that validation_images holds out: the same for every seed of a run


class _Source(NamedTuple):
    folder: str
    archive: str
    parts: dict[str, dict[str, str]]  # the files of each part, with their MD5 as published
    label_key: str


SOURCES = {
    10: _Source(
        "cifar-10-batches-py",
        "cifar-10-python.tar.gz",
        {
            "train": {
                "data_batch_1": "c99cafc152244af753f735de768cd75f",
                "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
                "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
                "data_batch_4": "634d18415352ddfa80567beed471001a",
                "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
            },
            "test": {"test_batch": "40351d587109b95175f43aff81a1287e"},
        },
        "labels",
    ),
    100: _Source(
        "cifar-100-python",
        "cifar-100-python.tar.gz",
        {
            "train": {"train": "16019d7e3df5f24257cddd939b257f8d"},
            "test": {"test": "f0ef6b0ae62326f3e7ffdfab6717acfc"},
        },
        "fine_labels",
    ),
}


class CIFARData(ImageData):
    """x = (crop(pixels) / 255 - mean) / std with a random 32 x 32 crop of the image padded by 4 pixels, and a flip.

    Args:
        root: the folder that holds `cifar-100-python/` (or `cifar-10-batches-py/`), that folder itself, or the archive
            `cifar-100-python.tar.gz` (`cifar-10-python.tar.gz`) or the folder in which it lies. Nothing is downloaded.
        classes: 100 or 10.
        padding: pixels added on each side, of which the crop may take some.
        padding_mode: what they are, as torchvision calls it: "constant" for zeros (black, before the normalisation), "reflect"
            for the image mirrored, "symmetric" for the image mirrored with its edge repeated.
        flip: probability of a horizontal flip in training.
        validation_images: training images held out for validation, always the same whatever the seed, so that settings
            can be chosen without the test set. 0 validates on the test set, as the paper does.
        label_fraction: share of the training images that is kept, with the classes in equal shares (`stratified_rows`), as
            in published few-shot figures; 1 keeps all. Needs scikit-learn.
        mean, std: of images in 0 .. 1; the paper's numbers, which it uses for both sets.
        verify: refuse a file that has as many images as the published one but another checksum. False is for a data set of
            one's own in this form. Files with fewer or more images are warned of in either case.
        common: as `ImageData` takes them: batch_size, seed, mixup, cutmix, ...

    Raises:
        MissingDataError: when files are missing: where they were looked for and what should be there.
        DataFileError: when a file is truncated, changed or is something else.

    Example:
        >>> from frskd_fast.training.data import CIFARData
        >>> data = CIFARData("datasets", classes=100, mixup=0.2)
        >>> data.num_classes, data.image_size, data.channels
        (100, (32, 32), 3)

    Source: Ji et al., CVPR 2021, section 4.1; the numbers are those of its released code.
    """

    def __init__(
        self,
        root: str = "data",
        classes: int = 100,
        padding: int = 4,
        flip: float = 0.5,
        validation_images: int = 0,
        label_fraction: float = 1.0,
        mean: tuple[float, float, float] = (0.4914, 0.4822, 0.4465),
        std: tuple[float, float, float] = (0.2023, 0.1994, 0.2010),
        padding_mode: str = "constant",
        verify: bool = True,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        if classes not in SOURCES:
            raise ValueError(f"classes is {classes!r}, but CIFAR has 10 or 100.")
        self.root, self.verify = str(root), bool(verify)
        self.num_classes, self.image_size, self.channels = classes, (SIDE, SIDE), 3
        self.padding, self.flip = whole_number(padding, "padding", 0), probability(flip, "flip")
        if padding_mode not in PADDING_MODES:
            raise ValueError(f"padding_mode is {padding_mode!r}, but {', '.join(map(repr, PADDING_MODES))} was wanted.")
        self.padding_mode = padding_mode
        self.validation_images = whole_number(validation_images, "validation_images", 0)
        self.label_fraction = probability(label_fraction, "label_fraction")
        if not self.label_fraction:
            raise ValueError("label_fraction is 0, but a share of the training images in (0, 1] was wanted.")
        self.mean, self.std = colour_statistics(mean, std, 3)
        self._training_arrays: tuple[Tensor, Tensor] | None = None

    def make_reader(self, part: Part) -> ArrayReader:
        """Images and labels of one part, in memory."""
        if part == "test":
            return ArrayReader(*read_cifar(self.root, self.num_classes, "test", self.verify))
        if part == "validation" and not self.validation_images:
            test = self.reader("test")
            assert isinstance(test, ArrayReader)
            return test
        if self._training_arrays is None:
            self._training_arrays = read_cifar(self.root, self.num_classes, "train", self.verify)
        images, labels = self._training_arrays
        if self.validation_images >= len(images):
            raise ValueError(
                f"validation_images is {self.validation_images}, but there are only {len(images)} training images in all."
            )
        if self.validation_images:
            order = torch.randperm(len(images), generator=torch.Generator().manual_seed(SPLIT_SEED))
            held_out, rest = order[: self.validation_images], order[self.validation_images :]
            rows = held_out if part == "validation" else rest.sort().values
            images, labels = images[rows], labels[rows]
        if part == "train" and self.label_fraction < 1:
            rows = stratified_rows(labels, self.label_fraction)
            images, labels = images[rows], labels[rows]
        return ArrayReader(images, labels, self.padding, self.flip, self.crop_each_view)


def read_cifar(root: str, classes: int, part: str, verify: bool = True) -> tuple[Tensor, Tensor]:
    """Images and labels of one part of CIFAR, checked.

    Args:
        root: as `CIFARData` takes it.
        classes: 10 or 100.
        part: "train" or "test".
        verify: as `CIFARData` takes it.

    Returns:
        images uint8 (N, 3, 32, 32) and labels int64 (N,) in 0 .. classes - 1.

    Raises:
        MissingDataError, DataFileError: as `CIFARData` raises them.
    """
    source = SOURCES[classes]
    images, labels = [], []
    for name, published in source.parts[part].items():
        content, where = _load(Path(root), source, name)
        some_images, some_labels = _checked(content, where, source, classes)
        if verify and len(some_images) == IMAGES[part] // len(source.parts[part]):
            _verify(content, where, source, published)
        images.append(some_images)
        labels.append(some_labels)
    all_images = numpy.ascontiguousarray(numpy.concatenate(images))
    found, wanted = len(all_images), IMAGES[part]
    if found != wanted:
        warnings.warn(
            f"The {part} files of CIFAR-{classes} in {root} are intact but hold {found} images, where the original has "
            f"{wanted}; accuracies will not compare with published ones.",
            stacklevel=2,
        )
    return torch.from_numpy(all_images).view(-1, 3, SIDE, SIDE), torch.from_numpy(numpy.concatenate(labels))


def _verify(content: bytes, where: str, source: _Source, published: str) -> None:
    found = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if found != published:
        raise DataFileError(
            f"{where} has as many images as the file of CIFAR's authors, but its MD5 is {found} and not {published}: it is "
            f"damaged or was changed. Replace it with the one from {source.archive}, or pass verify=False (--data.verify "
            "false) if it is a data set of your own."
        )


def _checked(
    raw: bytes, where: str, source: _Source, classes: int
) -> tuple[numpy.typing.NDArray[numpy.uint8], numpy.typing.NDArray[numpy.int64]]:
    """Images and labels in a pickle."""
    content = _unpickled(raw, where, source)
    wanted = f"a dictionary with 'data' (N x {PIXELS} bytes) and {source.label_key!r} (N numbers below {classes})"
    advice = f"Replace it with the file of that name from {source.archive} of CIFAR's authors."
    if not isinstance(content, dict):
        raise DataFileError(f"{where} holds a {type(content).__name__}, but {wanted} was wanted. {advice}")
    entries = {key.decode("latin1") if isinstance(key, bytes) else str(key): value for key, value in content.items()}
    missing = [key for key in ("data", source.label_key) if key not in entries]
    if missing:
        raise DataFileError(f"{where} has the entries {sorted(entries)}, but {wanted} was wanted. {advice}")
    data, raw_labels = entries["data"], entries[source.label_key]
    if not isinstance(data, numpy.ndarray) or data.dtype != numpy.uint8 or data.ndim != 2 or data.shape[1] != PIXELS:
        found = f"{data.dtype} of shape {data.shape}" if isinstance(data, numpy.ndarray) else type(data).__name__
        raise DataFileError(f"{where} has 'data' that is {found}, but {wanted} was wanted. {advice}")
    flat = isinstance(raw_labels, list) or (isinstance(raw_labels, numpy.ndarray) and raw_labels.ndim == 1)
    if not flat or not all(isinstance(label, (int, numpy.integer)) for label in raw_labels):
        raise DataFileError(
            f"{where} has {source.label_key!r} that is no list of numbers; {wanted} was wanted. {advice}"
        )
    if len(raw_labels) != len(data) or not len(data):
        raise DataFileError(
            f"{where} has {len(data)} images and {len(raw_labels)} labels, but equally many were wanted, and some. {advice}"
        )
    # Before they become numbers of 64 bits, which the file's need not fit into.
    least, most = min(raw_labels), max(raw_labels)
    if least < 0 or most >= classes:
        raise DataFileError(
            f"{where} has labels from {_short(least)} to {_short(most)}, but 0 to {classes - 1} were wanted. {advice}"
        )
    return data, numpy.asarray(raw_labels, dtype=numpy.int64)


def _short(number: int) -> str:
    """The number, or its size where Python would not write so many digits."""
    return str(number) if int(number).bit_length() < 128 else f"a number of {int(number).bit_length()} bits"


def _load(root: Path, source: _Source, name: str) -> tuple[bytes, str]:
    """One pickle, and how a message calls it."""
    for path in (root / source.folder / name, root / name if root.name == source.folder else None):
        if path is not None and path.is_file():
            try:
                return path.read_bytes(), str(path)
            except OSError as error:
                raise DataFileError(
                    f"{path} could not be read: {error}; check the disk and the permissions."
                ) from error
    for archive in (root, root / source.archive):
        if archive.is_file():
            return _load_from_archive(archive, source, name)
    raise MissingDataError(
        f"{root / source.folder / name} was not found, nor the archive {source.archive} in {root}. Download the Python "
        f"version of the data set from its authors' page, and pass as root the folder into which {source.archive} was "
        "unpacked, or the archive itself."
    )


def _load_from_archive(archive: Path, source: _Source, name: str) -> tuple[bytes, str]:
    where = f"{source.folder}/{name} in {archive}"
    try:
        with tarfile.open(archive) as tar:
            file = tar.extractfile(f"{source.folder}/{name}")
            if file is None:
                raise KeyError(name)
            return file.read(), where
    except KeyError:
        raise MissingDataError(
            f"{archive} has no member {source.folder}/{name}; {source.archive} of CIFAR's authors was wanted."
        ) from None
    except (tarfile.TarError, EOFError, OSError) as error:
        raise DataFileError(
            f"{archive} could not be read as an archive ({error}); it is truncated or something else. Download "
            f"{source.archive} again."
        ) from error


def _unpickled(raw: bytes, where: str, source: _Source) -> Any:
    try:
        return unpickled(raw)
    except Exception as error:  # a damaged pickle raises nearly anything
        raise DataFileError(
            f"{where} could not be read as a pickle of CIFAR ({str(error) or type(error).__name__}); it is truncated, damaged "
            f"or something else. Replace it with the file of that name from {source.archive} of CIFAR's authors."
        ) from error
