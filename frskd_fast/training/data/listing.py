"""What lies in the folders of a data set: every folder once, and images as regular files alone."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable
from pathlib import Path

from .errors import DataFileError

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".pgm", ".ppm", ".tif", ".tiff", ".webp")


def entries(folder: str | Path) -> list[os.DirEntry[str]]:
    """What a folder holds, in the order of the names.

    Raises:
        DataFileError: when it cannot be listed.
    """
    try:
        with os.scandir(folder) as found:
            return sorted(found, key=lambda entry: entry.name)
    except OSError as error:
        raise DataFileError(
            f"{folder} could not be listed ({error.strerror}); check its permissions and the disk, or move it away."
        ) from error


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether this is a folder, or a link to one."""
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def is_image(entry: os.DirEntry[str], suffixes: tuple[str, ...] = SUFFIXES) -> bool:
    """Whether this is a file with the name of an image.

    Raises:
        DataFileError: when it has the name but is neither a file nor a folder.
    """
    if not entry.name.lower().endswith(suffixes) or is_folder(entry):
        return False
    if not os.path.isfile(entry.path) if entry.is_symlink() else not entry.is_file():
        raise DataFileError(
            f"{entry.path} has the name of an image but is no regular file (a broken link, a pipe, a socket or a device); "
            "remove it."
        )
    return True


class DataFolders:
    """The folders of training, validation and test images.

    Args:
        parts: those that are there, each with a folder, or a link to one, for each class.
    """

    def __init__(self, parts: Iterable[Path]) -> None:
        self._parts = [os.path.realpath(part) for part in parts]
        linked = (os.path.realpath(entry.path) for part in self._parts for entry in entries(part) if entry.is_symlink())
        self._own = [*self._parts, *linked]

    def images_below(self, folder: Path) -> list[str]:
        """Paths of the images of one class, at any depth: those in its folder by name, then those of each subfolder.

        Links to folders are followed out of the data set, and each folder is read once. A link that leads into one of the
        parts, or to a folder that holds one, is left out with a warning: those images have a class and a part.

        Raises:
            DataFileError: when a folder cannot be read, or that of the class is a link to one that holds the parts.
        """
        start = os.path.realpath(folder)
        if any(_is_within(part, start) for part in self._parts):
            raise DataFileError(
                f"{folder} leads to {start}, which holds the images of all classes; remove this link, or put a folder of "
                "images in its place."
            )
        images: list[str] = []
        left_out: list[str] = []
        seen: set[tuple[int, int]] = set()
        waiting = [str(folder)]
        while waiting:
            path = waiting.pop()
            listed = entries(path)
            status = os.stat(path)
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            images += [entry.path for entry in listed if is_image(entry)]
            for entry in reversed([entry for entry in listed if is_folder(entry)]):
                (left_out if entry.is_symlink() and self._leads_back(entry.path) else waiting).append(entry.path)
        if left_out:
            warnings.warn(
                f"{left_out[0]} is a link to {os.path.realpath(left_out[0])}, back into the data set, and is left out "
                f"({len(left_out)} such links below {folder}); remove it.",
                stacklevel=2,
            )
        return images

    def _leads_back(self, path: str) -> bool:
        target = os.path.realpath(path)
        return any(_is_within(target, own) or _is_within(own, target) for own in self._own)


def _is_within(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip(os.sep) + os.sep)
