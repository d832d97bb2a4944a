"""Masks as files: PNGs of class indices with a palette, a whole folder of them or none."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from .errors import Refusal

MOST_CLASSES = 256  # that an index of a PNG tells apart


def palette() -> Any:
    """uint8 (256, 3): colours of the class indices, those of PASCAL VOC. 0 is black.

    Bit 7 - j of red, green and blue is bit 3j, 3j + 1 and 3j + 2 of the index.

    Example:
        >>> palette()[[0, 1, 15, 255]].tolist()
        [[0, 0, 0], [128, 0, 0], [192, 128, 128], [224, 224, 192]]
    """
    index = np.arange(MOST_CLASSES)
    colours = np.zeros((MOST_CLASSES, 3), np.uint8)
    for bit in range(3):
        for channel in range(3):
            colours[:, channel] |= ((index >> (3 * bit + channel) & 1) << (7 - bit)).astype(np.uint8)
    return colours


class MaskFolder:
    """A folder of PNGs that appears under its name when `finish` is called, with all of them.

    Args:
        folder: its name. A folder of masks that is there is replaced; one that holds anything else is refused.
        num_classes: number of classes, at most 256.

    Example:
        >>> import tempfile
        >>> import torch
        >>> masks = MaskFolder(Path(tempfile.mkdtemp()) / "masks", num_classes=2)
        >>> masks.begin(), masks.write("one", torch.tensor([[0, 1]])), masks.finish()
        (None, None, False)
        >>> [file.name for file in masks.folder.iterdir()]
        ['one.png']
    """

    def __init__(self, folder: str | os.PathLike[str], num_classes: int) -> None:
        if num_classes > MOST_CLASSES:
            raise ValueError(
                f"num_classes is {num_classes}, but a mask is written as a PNG of one byte for each pixel, which tells at "
                f"most {MOST_CLASSES} classes apart."
            )
        self.folder = Path(folder)
        self.partial = self.folder.with_name(f".{self.folder.name}.partial")
        self._palette = palette().tobytes()

    def begin(self) -> None:
        """Make the folder in which the files wait, empty.

        Raises:
            Refusal: where the masks are to lie, something else does.
        """
        others = self.folder.is_dir() and sorted(file for file in self.folder.iterdir() if file.suffix != ".png")
        if others or self.folder.is_file():
            raise Refusal(
                f"{others[0] if others else self.folder} is no mask, but masks replace what is in {self.folder}; move it away."
            )
        self.abandon()
        self.partial.mkdir(parents=True)

    def write(self, name: str, mask: Tensor) -> None:
        """Add NAME.png, a mask (H, W) of class indices."""
        from PIL import Image

        image = Image.fromarray(mask.cpu().numpy().astype(np.uint8))
        image.putpalette(self._palette)
        image.save(self.partial / f"{name}.png")

    def finish(self) -> bool:
        """Put the files in place; returns whether they replaced a folder of masks."""
        replaced = self.folder.is_dir()
        if replaced:
            shutil.rmtree(self.folder)
        self.partial.rename(self.folder)
        return replaced

    def abandon(self) -> None:
        """Leave nothing."""
        shutil.rmtree(self.partial, ignore_errors=True)
