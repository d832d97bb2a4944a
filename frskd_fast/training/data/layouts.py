"""Which images belong to which class and part, in the layouts in which the data sets are distributed."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from .errors import DataFileError, MissingDataError
from .listing import SUFFIXES, DataFolders, entries, is_folder

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

Images = list[tuple[str, int]]  # path from the root, with slashes, and class


class Listing(NamedTuple):
    """The images of every part; `validation` or `test` is None where the data set has no such part of its own."""

    classes: list[str]
    train: Images
    validation: Images | None
    test: Images | None


class Layout(NamedTuple):
    """How one data set lies on disk, and what its images are turned into.

    Attributes:
        read: the listing of a root folder.
        classes: number of classes of the original; None where every data set has its own.
        image_size: side of what the network sees, in pixels.
        resize: length of the shorter side before the centre is cut out, in evaluation.
        mean, std: of images in 0 .. 1.
    """

    read: Callable[[Path], Listing]
    classes: int | None
    image_size: int = 224
    resize: int = 256
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD


def class_folders(root: Path) -> Listing:
    """`train/<class>/...`, `val/<class>/...` and, if there, `test/<class>/...`; classes in the order of their names."""
    if not (root / "train").is_dir():
        raise MissingDataError(
            f"{root / 'train'} is not a folder. The layout 'folders' wants train/<class>/<image> and val/<class>/<image> "
            "below root; pass the folder that holds train, or the layout that fits."
        )
    classes = _subfolders(root / "train")
    if not classes:
        raise DataFileError(f"{root / 'train'} has no folders, but one folder of images for each class was wanted.")
    train = _images_by_class(root, "train", classes, every_class=True)
    validation = _images_by_class(root, "val", classes) if (root / "val").is_dir() else None
    test = _images_by_class(root, "test", classes) if (root / "test").is_dir() else None
    if validation is None and test is None:
        raise MissingDataError(
            f"{root} has neither a folder val nor test; val/<class>/<image> with the classes of train was wanted."
        )
    return Listing(classes, train, validation, test)


def tiny_imagenet(root: Path) -> Listing:
    """`train/<wnid>/images/*.JPEG` and `val/images/*.JPEG` with the wnids in `val/val_annotations.txt`."""
    if not (root / "train").is_dir():
        raise MissingDataError(
            f"{root / 'train'} is not a folder; pass the unpacked folder tiny-imagenet-200 as root, with train, val and "
            "val/val_annotations.txt in it."
        )
    classes = _subfolders(root / "train")
    train = _images_by_class(root, "train", classes, every_class=True)
    annotations = root / "val" / "val_annotations.txt"
    numbers = {name: number for number, name in enumerate(classes)}
    validation = []
    for line, (image, wnid) in _table(annotations, 2, separator="\t"):
        _known(wnid, numbers, annotations, line)
        validation.append((f"val/images/{image}", numbers[wnid]))
    return Listing(classes, train, _not_empty(validation, annotations), None)


def cub200(root: Path) -> Listing:
    """`images.txt`, `image_class_labels.txt` and `train_test_split.txt`: images by number, `images/<path>`."""
    paths = {number: path for _, (number, path) in _table(root / "images.txt", 2)}
    train: Images = []
    test: Images = []
    labels: dict[str, int] = {}
    names: dict[int, str] = {}
    for line, (number, label) in _table(root / "image_class_labels.txt", 2):
        labels[number] = _class_number(label, root / "image_class_labels.txt", line) - 1
    split = root / "train_test_split.txt"
    for line, (number, in_training) in _table(split, 2):
        if number not in paths or number not in labels or in_training not in ("0", "1"):
            raise DataFileError(
                f"{split}, line {line}, says {number} {in_training}, but the number of an image in images.txt and "
                "image_class_labels.txt was wanted, and 0 or 1; unpack CUB_200_2011 again."
            )
        names[labels[number]] = paths[number].split("/")[0]
        (train if in_training == "1" else test).append((f"images/{paths[number]}", labels[number]))
    classes = [names.get(number, f"class {number + 1}") for number in range(max(names, default=-1) + 1)]
    return Listing(classes, _not_empty(train, split), None, _not_empty(test, split))


def mit67(root: Path) -> Listing:
    """`TrainImages.txt` and `TestImages.txt` with lines `<scene>/<image>`, below `Images/`."""
    names = {part: [line for _, line in _lines(root / f"{part}Images.txt")] for part in ("Train", "Test")}
    classes = sorted({name.split("/")[0] for name in names["Train"]})
    numbers = {name: number for number, name in enumerate(classes)}
    parts: dict[str, Images] = {}
    for part, listed in names.items():
        path = root / f"{part}Images.txt"
        for line, name in enumerate(listed, 1):
            _known(name.split("/")[0], numbers, path, line)
        parts[part] = _not_empty([(f"Images/{name}", numbers[name.split("/")[0]]) for name in listed], path)
    return Listing(classes, parts["Train"], None, parts["Test"])


def stanford40(root: Path) -> Listing:
    """`ImageSplits/<action>_train.txt` and `<action>_test.txt` with names below `JPEGImages/`."""
    folder = root / "ImageSplits"
    if not folder.is_dir():
        raise MissingDataError(
            f"{folder} is not a folder; pass as root the folder that holds ImageSplits and JPEGImages of Stanford 40."
        )
    classes = sorted(path.name.removesuffix("_train.txt") for path in folder.glob("*_train.txt"))
    parts: dict[str, Images] = {"train": [], "test": []}
    for number, action in enumerate(classes):
        for part, images in parts.items():
            names = [name for _, name in _lines(folder / f"{action}_{part}.txt")]
            images += [(f"JPEGImages/{name}", number) for name in names]
    return Listing(classes, _not_empty(parts["train"], folder), None, _not_empty(parts["test"], folder))


def dogs(root: Path) -> Listing:
    """`train_list.mat` and `test_list.mat` (in root or in `lists/`) with names below `Images/` and classes from 1."""
    try:
        from scipy.io import loadmat  # type: ignore[import-untyped, unused-ignore]
    except ImportError as error:
        raise ImportError(
            "The lists of Stanford Dogs are MATLAB files, which SciPy reads, but it could not be imported; run "
            "`pip install scipy`."
        ) from error
    parts: dict[str, Images] = {}
    names: dict[int, str] = {}
    for part in ("train", "test"):
        path = _first_file(root / f"{part}_list.mat", root / "lists" / f"{part}_list.mat")
        try:
            content = loadmat(path)
            files = [_text(cell) for cell in content["file_list"].ravel()]
            labels = [int(label) - 1 for label in content["labels"].ravel()]
        except Exception as error:  # a damaged file raises nearly anything
            raise DataFileError(
                f"{path} could not be read as a list of Stanford Dogs with file_list and labels "
                f"({str(error) or type(error).__name__}); unpack lists.tar again."
            ) from error
        if len(files) != len(labels) or min(labels, default=0) < 0:
            raise DataFileError(
                f"{path} has {len(files)} files and {len(labels)} labels, the smallest {min(labels, default=0) + 1}; "
                "equally many and labels from 1 were wanted. Unpack lists.tar again."
            )
        parts[part] = _not_empty([(f"Images/{name}", label) for name, label in zip(files, labels, strict=True)], path)
        names.update({label: name.split("/")[0] for name, label in zip(files, labels, strict=True)})
    classes = [names.get(number, f"class {number + 1}") for number in range(max(names) + 1)]
    return Listing(classes, parts["train"], None, parts["test"])


LAYOUTS = {
    "folders": Layout(class_folders, None),
    "imagenet": Layout(class_folders, 1000),
    "tiny_imagenet": Layout(tiny_imagenet, 200, 32, 32, (0.4802, 0.4481, 0.3975), (0.2770, 0.2691, 0.2821)),
    "cub200": Layout(cub200, 200),
    "mit67": Layout(mit67, 67),
    "stanford40": Layout(stanford40, 40),
    "dogs": Layout(dogs, 120),
}


def _subfolders(folder: Path) -> list[str]:
    return [entry.name for entry in entries(folder) if is_folder(entry) and not entry.name.startswith(".")]


def _images_by_class(root: Path, part: str, classes: list[str], every_class: bool = False) -> Images:
    """The images below `root/part/<class>`, at any depth, in the order of their names."""
    numbers = {name: number for number, name in enumerate(classes)}
    found = _subfolders(root / part)
    unknown = [name for name in found if name not in numbers]
    if unknown:
        raise DataFileError(
            f"{root / part} has the folder {unknown[0]!r}, which train has not; the same classes as in train were wanted."
        )
    folders = DataFolders(folder for folder in (root / "train", root / "val", root / "test") if folder.is_dir())
    images: Images = []
    for name in found:
        before = len(images)
        start = root / part / name
        for path in folders.images_below(start):
            below = path[len(str(start)) :].replace(os.sep, "/")
            images.append((f"{part}/{name}{below}", numbers[name]))
        if every_class and len(images) == before:
            raise DataFileError(
                f"{root / part / name} has no image; files that end in one of {', '.join(SUFFIXES)} were wanted, or no "
                "such folder."
            )
    if not images:
        raise DataFileError(
            f"{root / part} has no images in class folders; {part}/<class>/<image> was wanted. Move each image into the "
            "folder of its class."
        )
    return images


def _lines(path: Path) -> Iterable[tuple[int, str]]:
    """Numbers from 1 and text of the lines that are not empty."""
    if not path.is_file():
        raise MissingDataError(
            f"{path} was not found; it is part of the data set's archive. Pass as root the folder that holds it, or the "
            "layout that fits."
        )
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataFileError(f"{path} is no text file ({error}); unpack the data set's archive again.") from error
    return [(number, line.strip()) for number, line in enumerate(text.splitlines(), 1) if line.strip()]


def _table(path: Path, columns: int, separator: str | None = None) -> Iterable[tuple[int, list[str]]]:
    """The first columns of the lines; the last one that is asked for may hold spaces when there are no more."""
    for number, line in _lines(path):
        values = line.split(separator, columns - 1) if separator is None else line.split(separator)[:columns]
        if len(values) != columns:
            raise DataFileError(
                f"{path}, line {number}, is {line!r}, but {columns} values were wanted; unpack the data set's archive again."
            )
        yield number, values


def _class_number(text: str, path: Path, line: int) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise DataFileError(f"{path}, line {line}, has the class {text!r}, but a number from 1 was wanted.")
    return int(text)


def _known(name: str, numbers: dict[str, int], path: Path, line: int) -> None:
    if name not in numbers:
        raise DataFileError(
            f"{path}, line {line}, names the class {name!r}, which the training images have not; check that the whole "
            "archive was unpacked."
        )


def _not_empty(images: Images, path: Path) -> Images:
    if not images:
        raise DataFileError(f"{path} lists no images; unpack the data set's archive again.")
    return images


def _first_file(*paths: Path) -> Path:
    for path in paths:
        if path.is_file():
            return path
    raise MissingDataError(
        f"{paths[0]} was not found, nor {paths[1]}; unpack lists.tar of Stanford Dogs into root, beside Images."
    )


def _text(cell: Any) -> str:
    """The string in a cell of a MATLAB array, which SciPy wraps in arrays of one element."""
    while not isinstance(cell, str):
        cell = cell.item() if cell.ndim == 0 else cell[0]
    return cell
