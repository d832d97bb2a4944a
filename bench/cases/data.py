"""Images per second of every reader, from file to normalised batch, by `python bench/run.py data`.

The files are synthetic and written into a temporary folder first. What is timed is a training epoch as a step sees it:
reading or decoding, random numbers, crop and flip, normalisation, mixup where it says so; the network is left out. The
first epoch of a reader starts the worker processes and is not counted.
"""

from __future__ import annotations

import pickle
import tempfile
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import numpy
import torch

from bench.case import Program, Selection

ONLY_BY_NAME = True
CLASSES = 10
FEWEST_EPOCHS, MOST_EPOCHS = 3, 1000


def pictures(count: int, height: int, width: int) -> numpy.ndarray[Any, Any]:
    """Coloured clouds (N, H, W, 3): smooth like photographs, so that JPEG files get a usual size, with some grain."""
    random = numpy.random.default_rng(0)
    coarse = torch.from_numpy(random.uniform(0, 255, (count, 3, max(2, height // 8), max(2, width // 8))))
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic", align_corners=False)
    grain = torch.from_numpy(random.normal(0, 6, (count, 3, height, width)))
    return (smooth + grain).clamp(0, 255).byte().permute(0, 2, 3, 1).contiguous().numpy()


def cifar(root: Path, count: int, **arguments: Any) -> Any:
    """The reader of CIFAR-100's training file, with `count` images."""
    from frskd_fast.training.data import CIFARData

    folder = root / "cifar-100-python"
    folder.mkdir(parents=True)
    data = pictures(count, 32, 32).transpose(0, 3, 1, 2).reshape(count, -1)
    content = {"data": data, "fine_labels": [number % 100 for number in range(count)]}
    (folder / "train").write_bytes(pickle.dumps(content, protocol=4))
    return CIFARData(str(root), **arguments)


def digits(root: Path, count: int) -> Any:
    """The reader of scikit-learn's digits."""
    from frskd_fast.training.data import DigitsData

    return DigitsData(labels_per_class=count // 10)


def files(root: Path, count: int, width: int, height: int, suffix: str, **arguments: Any) -> Any:
    """The reader of `count` images in class folders, made of at most 256 different pictures, and one to validate on."""
    from PIL import Image

    from frskd_fast.training.data import ImageFolderData

    several = pictures(min(count, 256), height, width)
    for part, images in (("train", count), ("val", 1)):
        for number in range(images):
            folder = root / part / f"class_{number % CLASSES}"
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(several[number % len(several)]).save(folder / f"{number:06d}{suffix}", quality=90)
    return ImageFolderData(str(root), **arguments)


def masks(root: Path, count: int, width: int, height: int, **arguments: Any) -> Any:
    """The reader of `count` images with masks, made of at most 64 different pictures."""
    from PIL import Image

    from frskd_fast.training.data import MaskFolderData

    several = pictures(min(count, 64), height, width)
    for kind in ("images", "masks"):
        (root / "train" / kind).mkdir(parents=True)
    for number in range(count):
        picture = several[number % len(several)]
        Image.fromarray(picture).save(root / "train" / "images" / f"{number}.jpg", quality=90)
        Image.fromarray(picture[:, :, 0] // 16 % CLASSES).save(root / "train" / "masks" / f"{number}.png")
    return MaskFolderData(str(root), CLASSES, **arguments)


def epochs(reader: Any, count: int, settings: Any) -> dict[str, list[float]]:
    """Milliseconds of the epochs after the first."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*intact but hold")
        data = reader(Path(folder), count)
        loader = data.train_dataloader()
        times: list[float] = []
        for epoch in range(1 + (settings.repeats or MOST_EPOCHS)):
            loader.set_epoch(epoch)
            begin = time.perf_counter()
            for batch in loader:
                data.on_after_batch_transfer(batch)
            times.append(1e3 * (time.perf_counter() - begin))
            if not settings.repeats and epoch >= FEWEST_EPOCHS and sum(times[1:]) >= 1e3 * settings.target_seconds:
                break
        data.teardown("fit")
    return {"reader": times[1:]}


def cases(selection: Selection) -> list[Program]:
    """Every reader; image files are decoded by two worker processes, in a quick run (few images) by none."""
    scale, workers = (0.01, 0) if selection.quick else (1.0, 2)
    small, medium, large = (max(64, round(count * scale)) for count in (10_000, 4_000, 256))
    batch: dict[str, Any] = {"batch_size": selection.batch} if selection.batch else {}
    crop = {"image_size": 32, "resize": 32, "workers": workers, **batch}
    padded = {**crop, "augmentation": "padded_crop"}
    photos = {"batch_size": 32, "workers": workers, **batch}
    readers = (
        ("CIFAR, crop and flip", small, partial(cifar, **batch)),
        ("CIFAR, crop, flip and mixup", small, partial(cifar, mixup=0.2, **batch)),
        ("CIFAR, crop, flip and cutmix", small, partial(cifar, cutmix=1.0, **batch)),
        ("digits, shift", 400, digits),
        ("JPEG files of 32 px, crop and flip", small, partial(files, width=32, height=32, suffix=".jpg", **padded)),
        ("PNG files of 32 px, crop and flip", small, partial(files, width=32, height=32, suffix=".png", **padded)),
        (
            "JPEG files of 64 px, resized crop to 32",
            medium,
            partial(files, width=64, height=64, suffix=".JPEG", **crop),
        ),
        (
            "JPEG files of 500 x 375, resized crop to 224",
            large,
            partial(files, width=500, height=375, suffix=".jpg", **photos),
        ),
        (
            "JPEG files of 500 x 375 with masks, window of 512",
            8 if selection.quick else large,
            partial(masks, width=500, height=375, **{**photos, "batch_size": selection.batch or 8}),
        ),
    )
    return [Program("data", name, partial(epochs, reader, count), images=count) for name, count, reader in readers]
