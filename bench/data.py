"""Images per second of every reader, from file to normalised batch: `python bench/data.py`.

The files are synthetic and written into a temporary folder first. What is timed is a training epoch as a step sees it:
reading or decoding, random numbers, crop and flip, normalisation, mixup where it says so; the network is left out. The
first epoch of a reader starts the worker processes and is not counted.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    # Last, so that an installed frskd_fast with its compiled libraries comes before the checkout.
    sys.path.append(str(ROOT))

import numpy  # noqa: E402
import torch  # noqa: E402

import frskd_fast  # noqa: E402
from bench.machine import cpu_name  # noqa: E402
from frskd_fast.training.data import CIFARData, DigitsData, ImageData, ImageFolderData  # noqa: E402

CLASSES = 10


class Row(NamedTuple):
    """One reader: how many images an epoch of it has, and how many a second came out."""

    reader: str
    workers: int
    batch_size: int
    images: int
    images_per_second: float
    slowest: float
    epochs: int


def pictures(count: int, height: int, width: int, seed: int) -> numpy.ndarray[Any, Any]:
    """Coloured clouds (N, H, W, 3): smooth like photographs, so that JPEG files get a usual size, with some grain."""
    random = numpy.random.default_rng(seed)
    coarse = torch.from_numpy(random.uniform(0, 255, (count, 3, max(2, height // 8), max(2, width // 8))))
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic", align_corners=False)
    grain = torch.from_numpy(random.normal(0, 6, (count, 3, height, width)))
    return (smooth + grain).clamp(0, 255).byte().permute(0, 2, 3, 1).contiguous().numpy()


def write_cifar(root: Path, count: int) -> None:
    """CIFAR-100's training file with `count` images."""
    folder = root / "cifar-100-python"
    folder.mkdir(parents=True)
    data = pictures(count, 32, 32, 0).transpose(0, 3, 1, 2).reshape(count, -1)
    content = {"data": data, "fine_labels": [number % 100 for number in range(count)]}
    (folder / "train").write_bytes(pickle.dumps(content, protocol=4))


def write_files(root: Path, count: int, width: int, height: int, suffix: str) -> None:
    """`count` training images in class folders, made of at most 256 different pictures, and one to validate on."""
    from PIL import Image

    several = pictures(min(count, 256), height, width, 1)
    for part, images in (("train", count), ("val", 1)):
        for number in range(images):
            folder = root / part / f"class_{number % CLASSES}"
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(several[number % len(several)]).save(folder / f"{number:06d}{suffix}", quality=90)


def measure(name: str, data: ImageData, seconds: float) -> Row:
    """Epochs after the first, at least three of them and for at least `seconds`; the rate is that of the median epoch."""
    loader = data.train_dataloader()
    images, rates = 0, []
    started = time.perf_counter()
    for epoch in range(1_000_000):
        loader.set_epoch(epoch)
        epoch_started = time.perf_counter()
        images = 0
        for batch in loader:
            prepared, _ = data.on_after_batch_transfer(batch)
            images += len(prepared)
        if epoch:
            rates.append(images / (time.perf_counter() - epoch_started))
        else:
            started = time.perf_counter()
        if len(rates) >= 3 and time.perf_counter() - started >= seconds:
            break
    data.teardown("fit")
    return Row(name, loader.workers, data.batch_size, images, statistics.median(rates), min(rates), len(rates))


def readers(root: Path, workers: int, scale: float) -> list[tuple[str, Callable[[], ImageData]]]:
    """Every reader by name, over files that were just written."""
    small, medium, large = (max(64, round(count * scale)) for count in (10_000, 4_000, 256))
    write_cifar(root, small)
    write_files(root / "jpeg32", small, 32, 32, ".jpg")
    write_files(root / "png32", small, 32, 32, ".png")
    write_files(root / "jpeg64", medium, 64, 64, ".JPEG")
    write_files(root / "photos", large, 500, 375, ".jpg")

    def files(folder: str, **arguments: Any) -> Callable[[], ImageData]:
        return lambda: ImageFolderData(str(root / folder), workers=workers, **arguments)

    return [
        ("CIFAR, crop and flip", lambda: CIFARData(str(root))),
        ("CIFAR, crop, flip and mixup", lambda: CIFARData(str(root), mixup=0.2)),
        ("CIFAR, crop, flip and cutmix", lambda: CIFARData(str(root), cutmix=1.0)),
        ("digits, shift", lambda: DigitsData(labels_per_class=40)),
        ("JPEG files of 32 px, crop and flip", files("jpeg32", image_size=32, resize=32, augmentation="padded_crop")),
        ("PNG files of 32 px, crop and flip", files("png32", image_size=32, resize=32, augmentation="padded_crop")),
        ("JPEG files of 64 px, resized crop to 32", files("jpeg64", image_size=32, resize=32)),
        ("JPEG files of 500 x 375, resized crop to 224", files("photos", batch_size=32)),
    ]


def table(rows: Sequence[Row]) -> str:
    """The rows for a terminal, or for a Markdown file."""
    lines = [["reader", "workers", "batch", "images", "images/s", "slowest epoch"]]
    for row in rows:
        rates = [f"{row.images_per_second:,.0f}", f"{row.slowest:,.0f}"]
        lines.append([row.reader, str(row.workers), str(row.batch_size), str(row.images), *rates])
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    text = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    ]
    text.insert(1, "| " + " | ".join("-" * width for width in widths) + " |")
    return "\n".join(text)


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the files, measure every reader and print the table."""
    parser = argparse.ArgumentParser(description="Images per second of every reader of frskd_fast, on synthetic files.")
    parser.add_argument(
        "--workers", type=int, default=2, help="processes that decode image files (default %(default)s)"
    )
    parser.add_argument("--seconds", type=float, default=1.5, help="at least this long a reader (default %(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    parser.add_argument(
        "--quick", action="store_true", help="few images, three epochs: a check that it runs, no result"
    )
    settings = parser.parse_args(arguments)
    if settings.workers < 0:
        parser.error(f"--workers is {settings.workers}; it must be at least 0.")
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*intact but hold")
        made = readers(Path(folder), settings.workers, 0.01 if settings.quick else 1.0)
        rows = [measure(name, make(), 0.0 if settings.quick else settings.seconds) for name, make in made]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    environment = {
        "cpu": cpu_name(),
        "cores": cores,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "frskd_fast": frskd_fast.__version__,
    }
    if settings.json:
        print(json.dumps({"environment": environment, "rows": [row._asdict() for row in rows]}, indent=1))
    else:
        print(table(rows))
        print(f"{environment['cpu']}, {cores} cores, {environment['threads']} threads, PyTorch {environment['torch']}")


if __name__ == "__main__":
    main()
