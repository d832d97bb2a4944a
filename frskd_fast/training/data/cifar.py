"""CIFAR-10 and CIFAR-100 from the Python pickles of their authors, read without running anything that they ask for."""

from __future__ import annotations

import math
import pickle
import re
import tarfile
import warnings
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy
import numpy.typing
import torch
from torch import Tensor

from .augmentation import PADDING_MODES
from .base import ImageData, Part, colour_statistics, probability, whole_number
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
    parts: dict[str, tuple[str, ...]]
    label_key: str


SOURCES = {
    10: _Source(
        "cifar-10-batches-py",
        "cifar-10-python.tar.gz",
        {"train": tuple(f"data_batch_{number}" for number in range(1, 6)), "test": ("test_batch",)},
        "labels",
    ),
    100: _Source(
        "cifar-100-python",
        "cifar-100-python.tar.gz",
        {"train": ("train",), "test": ("test",)},
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
        common: as `ImageData` takes them: batch_size, seed, mixup, cutmix, ...

    Raises:
        MissingDataError: when files are missing: where they were looked for and what should be there.
        DataFileError: when a file is truncated or is something else.

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
        **common: Any,
    ) -> None:
        super().__init__(**common)
        if classes not in SOURCES:
            raise ValueError(f"classes is {classes!r}, but CIFAR has 10 or 100.")
        self.root = str(root)
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
            return ArrayReader(*read_cifar(self.root, self.num_classes, "test"))
        if part == "validation" and not self.validation_images:
            test = self.reader("test")
            assert isinstance(test, ArrayReader)
            return test
        if self._training_arrays is None:
            self._training_arrays = read_cifar(self.root, self.num_classes, "train")
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


def read_cifar(root: str, classes: int, part: str) -> tuple[Tensor, Tensor]:
    """Images and labels of one part of CIFAR, checked.

    Args:
        root: as `CIFARData` takes it.
        classes: 10 or 100.
        part: "train" or "test".

    Returns:
        images uint8 (N, 3, 32, 32) and labels int64 (N,) in 0 .. classes - 1.

    Raises:
        MissingDataError, DataFileError: as `CIFARData` raises them.
    """
    source = SOURCES[classes]
    images, labels = [], []
    for name in source.parts[part]:
        some_images, some_labels = _read_file(Path(root), source, name, classes)
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


def _read_file(
    root: Path, source: _Source, name: str, classes: int
) -> tuple[numpy.typing.NDArray[numpy.uint8], numpy.typing.NDArray[numpy.int64]]:
    content, where = _load(root, source, name)
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
    if not isinstance(raw_labels, (list, numpy.ndarray)) or not all(
        isinstance(label, (int, numpy.integer)) for label in raw_labels
    ):
        raise DataFileError(
            f"{where} has {source.label_key!r} that is no list of numbers; {wanted} was wanted. {advice}"
        )
    if len(raw_labels) != len(data) or not len(data):
        raise DataFileError(
            f"{where} has {len(data)} images and {len(raw_labels)} labels, but equally many were wanted, and some. {advice}"
        )
    # Before they become numbers of 64 bits, which the file's need not fit into.
    if min(raw_labels) < 0 or max(raw_labels) >= classes:
        raise DataFileError(
            f"{where} has labels from {min(raw_labels)} to {max(raw_labels)}, but 0 to {classes - 1} were wanted. {advice}"
        )
    return data, numpy.asarray(raw_labels, dtype=numpy.int64)


def _load(root: Path, source: _Source, name: str) -> tuple[Any, str]:
    """The content of one pickle, and how a message calls it."""
    for path in (root / source.folder / name, root / name if root.name == source.folder else None):
        if path is not None and path.is_file():
            with path.open("rb") as file:
                return _unpickle(file, str(path), source), str(path)
    for archive in (root, root / source.archive):
        if archive.is_file():
            return _load_from_archive(archive, source, name)
    raise MissingDataError(
        f"{root / source.folder / name} was not found, nor the archive {source.archive} in {root}. Download the Python "
        f"version of the data set from its authors' page, and pass as root the folder into which {source.archive} was "
        "unpacked, or the archive itself."
    )


def _load_from_archive(archive: Path, source: _Source, name: str) -> tuple[Any, str]:
    where = f"{source.folder}/{name} in {archive}"
    try:
        with tarfile.open(archive) as tar:
            file = tar.extractfile(f"{source.folder}/{name}")
            if file is None:
                raise KeyError(name)
            return _unpickle(file, where, source), where
    except KeyError:
        raise MissingDataError(
            f"{archive} has no member {source.folder}/{name}; {source.archive} of CIFAR's authors was wanted."
        ) from None
    except (tarfile.TarError, EOFError, OSError) as error:
        raise DataFileError(
            f"{archive} could not be read as an archive ({error}); it is truncated or something else. Download "
            f"{source.archive} again."
        ) from error


class _DType:
    """What a pickle says of a NumPy dtype. Its state is not looked at: with one, NumPy could be led to foreign memory."""

    def __init__(self, code: Any, *copy: Any) -> None:
        self.code = code.decode("latin1") if isinstance(code, bytes) else str(code)

    def __setstate__(self, state: Any) -> None:
        self.little_endian = state[1] in ("<", "|", b"<", b"|")

    little_endian = True

    def checked(self) -> numpy.dtype[Any]:
        """The dtype, of plain numbers alone."""
        if re.fullmatch("[biuf][1248]", self.code) is None or self.code == "f1":
            raise pickle.UnpicklingError(f"it has an array of dtype {self.code!r}, but numbers were wanted")
        return numpy.dtype(self.code).newbyteorder("<" if self.little_endian else ">")


class _Array:
    """What a pickle says of a NumPy array."""

    def __init__(self, content: Any = b"", dtype: Any = None, shape: Any = (), order: Any = "C") -> None:
        self.content, self.dtype, self.shape, self.fortran = content, dtype, shape, order in ("F", b"F")

    def __setstate__(self, state: Any) -> None:
        _, self.shape, self.dtype, self.fortran, self.content = state

    def made(self) -> numpy.typing.NDArray[Any]:
        """The array, once its size is that of the bytes in the file."""
        if not isinstance(self.dtype, _DType) or not isinstance(self.content, bytes | bytearray):
            raise pickle.UnpicklingError("it has an array without bytes or without a dtype")
        dtype = self.dtype.checked()
        if dtype.itemsize * math.prod(self.shape) != len(self.content):
            raise pickle.UnpicklingError(f"it has an array of shape {self.shape} with {len(self.content)} bytes")
        flat = numpy.frombuffer(self.content, dtype)
        return flat.reshape(self.shape, order="F" if self.fortran else "C")


def _encoded(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"it has a text encoded as {encoding!r}")
    return text.encode("latin1")


# What the files of CIFAR ask for, under its names of yesterday and today, and what they get in its place.
STAND_INS: dict[tuple[str, str], Any] = {
    ("numpy.core.multiarray", "_reconstruct"): lambda kind, shape, code: _Array(),
    ("numpy._core.multiarray", "_reconstruct"): lambda kind, shape, code: _Array(),
    ("numpy.core.numeric", "_frombuffer"): _Array,
    ("numpy._core.numeric", "_frombuffer"): _Array,
    ("numpy", "ndarray"): None,
    ("numpy", "dtype"): _DType,
    ("_codecs", "encode"): _encoded,
    ("builtins", "bytes"): lambda: b"",
}


class _RestrictedUnpickler(pickle.Unpickler):
    """Plain values and arrays of numbers: no function or class outside of this file is ever called."""

    def find_class(self, module: str, name: str) -> Any:
        # Python 2's name of the module, where the translation of old names does not reach.
        wanted = (module.replace("__builtin__", "builtins"), name)
        if wanted not in STAND_INS:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no file of CIFAR needs")
        return STAND_INS[wanted]


def _unpickle(file: IO[bytes], where: str, source: _Source) -> Any:
    try:
        content = _RestrictedUnpickler(file, encoding="bytes").load()
        if isinstance(content, dict):
            content = {key: value.made() if isinstance(value, _Array) else value for key, value in content.items()}
        return content
    except tarfile.TarError:
        raise
    except Exception as error:  # a damaged pickle raises nearly anything
        raise DataFileError(
            f"{where} could not be read as a pickle of CIFAR ({str(error) or type(error).__name__}); it is truncated, damaged "
            f"or something else. Replace it with the file of that name from {source.archive} of CIFAR's authors."
        ) from error
