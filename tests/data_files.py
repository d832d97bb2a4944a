"""Writes small, valid files in the layout of every data set that has a reader, so that no test needs a download."""

from __future__ import annotations

import pickle
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy
from PIL import Image

SIDE = 32


class _Python2Pickler(pickle._Pickler):  # type: ignore[name-defined,misc]
    """Writes what Python 2 wrote: byte strings by the old opcodes, NumPy's functions under their old name.

    The CIFAR archives were made so, and nothing in today's ``pickle`` writes those opcodes.
    """

    dispatch: ClassVar[dict[type, Any]] = dict(pickle._Pickler.dispatch)  # type: ignore[attr-defined]

    def save_byte_string(self, value: bytes | str) -> None:
        raw = value if isinstance(value, bytes) else value.encode("latin1")
        if len(raw) < 256:
            self.write(pickle.SHORT_BINSTRING + bytes([len(raw)]) + raw)
        else:
            self.write(pickle.BINSTRING + struct.pack("<i", len(raw)) + raw)
        self.memoize(value)

    dispatch[bytes] = save_byte_string
    dispatch[str] = save_byte_string

    def save_global(self, value: Any, name: str | None = None) -> None:
        if getattr(value, "__name__", "") == "_reconstruct":
            self.write(pickle.GLOBAL + b"numpy.core.multiarray\n_reconstruct\n")
            self.memoize(value)
        else:
            super().save_global(value, name)


def write_python2_pickle(path: Path, value: Any) -> None:
    """``value`` as Python 2's ``cPickle.dump(value, file, 2)`` would have written it."""
    with path.open("wb") as file:
        _Python2Pickler(file, protocol=2).dump(value)


def _labels(count: int, classes: int) -> list[int]:
    return [number % classes for number in range(count)]


def _rows(labels: Sequence[int], seed: int) -> numpy.ndarray[Any, Any]:
    """Noise (N, 3072) around a brightness that depends on the class, so that a network can learn it."""
    random = numpy.random.default_rng(seed)
    centres = 40 + 170 * (numpy.asarray(labels, dtype=float) % 10) / 9
    return numpy.clip(random.normal(centres[:, None], 20, (len(labels), 3 * SIDE * SIDE)), 0, 255).astype("uint8")


def write_cifar100(root: Path, train: int = 40, test: int = 20, classes: int = 100) -> Path:
    """``root/cifar-100-python/{train,test,meta}``; returns ``root``."""
    folder = root / "cifar-100-python"
    folder.mkdir(parents=True)
    for name, count in (("train", train), ("test", test)):
        labels = _labels(count, classes)
        content = {
            b"filenames": [b"image_%d.png" % number for number in range(count)],
            b"batch_label": b"training batch 1 of 1",
            b"fine_labels": labels,
            b"coarse_labels": [label // 5 for label in labels],
            b"data": _rows(labels, count),
        }
        write_python2_pickle(folder / name, content)
    names = {
        b"fine_label_names": [b"fine_%02d" % number for number in range(classes)],
        b"coarse_label_names": [b"coarse_%02d" % number for number in range(20)],
    }
    write_python2_pickle(folder / "meta", names)
    return root


def write_cifar10(root: Path, train: int = 40, test: int = 20) -> Path:
    """``root/cifar-10-batches-py/{data_batch_1..5,test_batch,batches.meta}``; returns ``root``."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    parts = [(f"data_batch_{number}", train // 5) for number in range(1, 6)] + [("test_batch", test)]
    for seed, (name, count) in enumerate(parts):
        labels = _labels(count, 10)
        content = {
            b"batch_label": name.encode(),
            b"labels": labels,
            b"data": _rows(labels, seed),
            b"filenames": [b"image_%d.png" % number for number in range(count)],
        }
        write_python2_pickle(folder / name, content)
    names = {b"num_cases_per_batch": train // 5, b"label_names": [b"class_%d" % n for n in range(10)], b"num_vis": 3072}
    write_python2_pickle(folder / "batches.meta", names)
    return root


def write_image(path: Path, label: int, seed: int, size: tuple[int, int] = (64, 64), mode: str = "RGB") -> None:
    """One image file of ``size`` (width, height); its format follows the name, JPEG for ``.JPEG`` and ``.jpg``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    random = numpy.random.default_rng([seed, label])
    values = numpy.clip(random.normal(40 + 170 * (label % 10) / 9, 20, (size[1], size[0], 3)), 0, 255).astype("uint8")
    Image.fromarray(values).convert(mode).save(path)


def write_image_folder(
    root: Path,
    classes: int = 3,
    size: tuple[int, int] = (40, 36),
    images: int = 4,
    parts: Sequence[str] = ("train", "val"),
    suffix: str = ".jpg",
) -> Path:
    """``root/<part>/class_<c>/<n>.jpg``; returns ``root``."""
    for seed, part in enumerate(parts):
        for label in range(classes):
            for number in range(images):
                path = root / part / f"class_{label}" / f"{number}{suffix}"
                write_image(path, label, 1000 * seed + number, size)
    return root


def write_tiny_imagenet(root: Path, classes: int = 3, images: int = 4) -> Path:
    """``root/{train/<wnid>/images,val/images,test/images}``, ``wnids.txt`` and ``val_annotations.txt``."""
    # The file of the identifiers is not sorted; the order of the classes is.
    identifiers = [f"n{90000000 - number:08d}" for number in range(classes)]
    for label, identifier in enumerate(identifiers):
        for number in range(images):
            mode = "L" if number == 1 else "RGB"  # the set has some grey images
            path = root / "train" / identifier / "images" / f"{identifier}_{number}.JPEG"
            write_image(path, label, number, mode=mode)
        boxes = "".join(f"{identifier}_{number}.JPEG\t0\t10\t63\t58\n" for number in range(images))
        (root / "train" / identifier / f"{identifier}_boxes.txt").write_text(boxes, encoding="utf-8")
    lines = []
    for number in range(classes * 2):
        write_image(root / "val" / "images" / f"val_{number}.JPEG", number % classes, 500 + number)
        lines.append(f"val_{number}.JPEG\t{identifiers[number % classes]}\t0\t32\t44\t62\n")
    (root / "val" / "val_annotations.txt").write_text("".join(lines), encoding="utf-8")
    write_image(root / "test" / "images" / "test_0.JPEG", 0, 900)
    (root / "wnids.txt").write_text("".join(f"{name}\n" for name in identifiers), encoding="utf-8")
    (root / "words.txt").write_text("".join(f"{name}\tthing\n" for name in identifiers), encoding="utf-8")
    return root


def write_cub200(root: Path, classes: int = 3, images: int = 4) -> Path:
    """``images.txt``, ``image_class_labels.txt``, ``train_test_split.txt``, ``classes.txt`` and ``images/``."""
    listed, labels, split = [], [], []
    number = 0
    for label in range(classes):
        for image in range(images):
            number += 1
            name = f"{label + 1:03d}.Bird_{label}/Bird_{label}_{image:04d}.jpg"
            write_image(root / "images" / name, label, number, (70, 50))
            listed.append(f"{number} {name}\n")
            labels.append(f"{number} {label + 1}\n")
            split.append(f"{number} {int(image % 2 == 0)}\n")
    (root / "images.txt").write_text("".join(listed), encoding="utf-8")
    (root / "image_class_labels.txt").write_text("".join(labels), encoding="utf-8")
    (root / "train_test_split.txt").write_text("".join(split), encoding="utf-8")
    names = "".join(f"{label + 1} {label + 1:03d}.Bird_{label}\n" for label in range(classes))
    (root / "classes.txt").write_text(names, encoding="utf-8")
    return root


def write_mit67(root: Path, classes: int = 3, images: int = 4) -> Path:
    """``Images/<scene>/*.jpg``, ``TrainImages.txt`` and ``TestImages.txt``; one "jpg" is a GIF, as in the original."""
    lists: dict[str, list[str]] = {"TrainImages.txt": [], "TestImages.txt": []}
    for label in range(classes):
        for number in range(images):
            name = f"scene_{label}/photo {number}.jpg"  # names with spaces are in the set
            path = root / "Images" / name
            write_image(path, label, number, (60, 80))
            if label == number == 0:
                Image.open(path).save(path, format="GIF")
            lists["TrainImages.txt" if number % 2 == 0 else "TestImages.txt"].append(name)
    for file, names in lists.items():
        (root / file).write_text("\n".join(names), encoding="utf-8")
    return root


def write_stanford40(root: Path, classes: int = 3, images: int = 4) -> Path:
    """``JPEGImages/*.jpg`` and ``ImageSplits/{<action>_train,<action>_test,train,test,actions}.txt``."""
    splits = root / "ImageSplits"
    splits.mkdir(parents=True)
    together: dict[str, list[str]] = {"train": [], "test": []}
    actions = [f"doing_{label}" for label in range(classes)]
    for label, action in enumerate(actions):
        parts: dict[str, list[str]] = {"train": [], "test": []}
        for number in range(images):
            name = f"{action}_{number + 1:03d}.jpg"
            write_image(root / "JPEGImages" / name, label, number, (80, 60))
            parts["train" if number % 2 == 0 else "test"].append(name)
        for part, names in parts.items():
            (splits / f"{action}_{part}.txt").write_text("".join(f"{name}\n" for name in names), encoding="utf-8")
            together[part] += names
    for part, names in together.items():
        (splits / f"{part}.txt").write_text("".join(f"{name}\n" for name in names), encoding="utf-8")
    table = "action_name\tnumber\n" + "".join(f"{action}\t{images}\n" for action in actions)
    (splits / "actions.txt").write_text(table, encoding="utf-8")
    return root


def write_dogs(root: Path, classes: int = 3, images: int = 4) -> Path:
    """``Images/<wnid>-<breed>/*.jpg``, ``train_list.mat`` and ``test_list.mat`` (needs SciPy)."""
    from scipy.io import savemat

    parts: dict[str, tuple[list[str], list[int]]] = {"train": ([], []), "test": ([], [])}
    for label in range(classes):
        for number in range(images):
            name = f"n0208562{label}-Breed_{label}/n0208562{label}_{number}.jpg"
            write_image(root / "Images" / name, label, number, (50, 70))
            names, labels = parts["train" if number % 2 == 0 else "test"]
            names.append(name)
            labels.append(label + 1)
    for part, (names, labels) in parts.items():
        cells = numpy.empty((len(names), 1), dtype=object)
        cells[:, 0] = names
        content = {"file_list": cells, "annotation_list": cells, "labels": numpy.array(labels, "uint8")[:, None]}
        savemat(root / f"{part}_list.mat", content)
    return root


def write_stl10(folder: Path, images: int = 12) -> Path:
    """`stl10_binary/`: images with their brightness by class, channels column by column, classes from 1."""
    below = folder / "stl10_binary"
    below.mkdir()
    random = numpy.random.default_rng(5)
    for part in ("train", "test"):
        labels = numpy.asarray(_labels(images, 10))
        pixels = random.integers(0, 20, (images, 96, 96, 3)) + (20 * labels)[:, None, None, None]
        pixels[:, :48, :, 0] += 20  # the upper half is redder
        pixels.astype("uint8").transpose(0, 3, 2, 1).tofile(below / f"{part}_X.bin")
        (labels + 1).astype("uint8").tofile(below / f"{part}_y.bin")
    return folder


def write_voc(root: Path, images: int = 3) -> Path:
    """VOC 2007 and 2012 as their archives unpack, with a few images and masks each."""
    from PIL import Image

    for year, lists in (("2007", ("trainval", "test")), ("2012", ("trainval",))):
        folder = root / "VOCdevkit" / f"VOC{year}"
        for name in ("ImageSets/Segmentation", "JPEGImages", "SegmentationClass"):
            (folder / name).mkdir(parents=True)
        for part in lists:
            names = [f"{part}_{number}" for number in range(images)]
            (folder / "ImageSets" / "Segmentation" / f"{part}.txt").write_text(
                "\n".join(names) + "\n", encoding="utf-8"
            )
            for number, name in enumerate(names):
                write_image(folder / "JPEGImages" / f"{name}.jpg", number, number, (50, 40))
                mask = Image.new("P", (50, 40), number)
                mask.paste(255, (0, 0, 50, 2))
                mask.putpalette(list(range(256)) * 3)
                mask.save(folder / "SegmentationClass" / f"{name}.png")
    return root
