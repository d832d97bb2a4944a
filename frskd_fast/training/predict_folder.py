"""`frskd-fast predict --images FOLDER`: the masks of a folder of images, by the student in a checkpoint."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .export import Export, ExportError, load_student
from .masks import MaskFolder

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")


class PredictionError(ValueError):
    """What kept masks from being written, as a sentence."""


@torch.no_grad()
def write_masks(
    exported: Export,
    images: str | Path,
    out: str | Path,
    batch_size: int = 8,
    device: str | torch.device = "cpu",
) -> int:
    """mask = argmax_k of the student's map at the image's own size, bilinear: OUT/NAME.png for each image NAME.*.

    An image is brought to the size of the training's evaluation for the network, which is what its metrics were measured
    at; its aspect ratio may change on the way there and is back in the mask.

    Args:
        exported: the student, as `load_student` gives it.
        images: folder of images; other files in it are left alone.
        out: folder of the masks, which is made here.
        batch_size: images at a time in the network.
        device: of the network.

    Returns:
        The number of masks.

    Raises:
        PredictionError: as a sentence, and then nothing has been written.
    """
    if exported.predicts != "maps":
        raise PredictionError(
            f"The student in the checkpoint ({exported.backbone}) says one class for each image, so there are no masks to "
            "write; frskd-fast predict --config RECIPE writes the classes of a data set's images."
        )
    if Path(out).exists():
        raise PredictionError(f"--out is {out}, which is there already; give a folder that is not.")
    files = _listed(Path(images))
    folder = MaskFolder(out, exported.num_classes)
    student = exported.student.to(device)
    folder.begin()
    try:
        for start in range(0, len(files), batch_size):
            some = files[start : start + batch_size]
            read = [_read(file, exported) for file in some]
            maps = student(torch.stack([pixels for pixels, _ in read]).to(device))
            for file, one, (_, size) in zip(some, maps.split(1), read, strict=True):
                scores = torch.nn.functional.interpolate(one.float(), size=size, mode="bilinear", align_corners=False)
                folder.write(file.stem, scores.argmax(1)[0])
        folder.finish()
    finally:
        folder.abandon()
    return len(files)


def _listed(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise PredictionError(f"--images is {folder}, which is no folder; give one that holds images.")
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES)
    if not files:
        raise PredictionError(f"--images is {folder}, which holds no file that ends in {', '.join(SUFFIXES)}.")
    by_stem: dict[str, Path] = {}
    for file in files:
        if by_stem.setdefault(file.stem, file) is not file:
            raise PredictionError(
                f"{by_stem[file.stem]} and {file} would have one mask, {file.stem}.png; rename one of them."
            )
    return files


def _read(file: Path, exported: Export) -> tuple[Tensor, tuple[int, int]]:
    """The image as the network takes it (C, H, W), normalised, and its own height and width."""
    from PIL import Image

    try:
        with Image.open(file) as opened:
            image = opened.convert("L" if exported.channels == 1 else "RGB")
    except MemoryError:
        raise  # the machine's, not the file's
    except Exception as error:  # decoders raise nearly anything
        raise PredictionError(
            f"{file} could not be decoded ({error}); remove it or mend it. Nothing was written."
        ) from error
    height, width = exported.size
    pixels: Any = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR), np.float32) / 255
    tensor = torch.from_numpy(pixels).reshape(height, width, exported.channels).permute(2, 0, 1)
    if exported.mean:
        mean, std = (torch.tensor(values).reshape(-1, 1, 1) for values in (exported.mean, exported.std))
        tensor = (tensor - mean) / std
    return tensor, (image.height, image.width)


def main(arguments: Sequence[str] | None = None) -> int:
    """`frskd-fast predict --images`: see --help."""
    parser = argparse.ArgumentParser(
        prog="frskd-fast predict",
        description="Write the mask of each image of a folder: class indices, with a palette.",
    )
    parser.add_argument("--images", required=True, help="folder of images")
    parser.add_argument("--checkpoint", required=True, help="a run's last.ckpt")
    parser.add_argument("--out", required=True, help="folder for the masks, PNGs of the images' names and sizes")
    parser.add_argument("--size", type=int, nargs="+", help="side, or height and width, for the network")
    parser.add_argument(
        "--batch_size", type=int, default=8, help="images at a time in the network (default %(default)s)"
    )
    parser.add_argument("--trust", action="store_true", help="call classes that the checkpoint names by import path")
    options = parser.parse_args(arguments)
    if options.batch_size < 1 or len(options.size or [1]) > 2:
        parser.error("--batch_size must be 1 or more, and --size one or two numbers.")
    size = None if options.size is None else (options.size[0], options.size[-1])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        exported = load_student(options.checkpoint, size=size, trust=options.trust)
        count = write_masks(exported, options.images, options.out, options.batch_size, device)
    except (ExportError, PredictionError) as error:
        print(f"frskd-fast predict: {error}", file=sys.stderr)
        return 1
    print(f"Predictions: {options.out}, {count} masks.")
    return 0
