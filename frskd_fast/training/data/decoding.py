"""Image files with Pillow, whose many kinds of errors become those of `errors`."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from .errors import CorruptImageError, DataFileError, MissingDataError

if TYPE_CHECKING:
    from PIL.Image import Image


@contextmanager
def errors_of(path: str, advice: str = "") -> Iterator[None]:
    """Turn the errors of reading and decoding this file into sentences; `advice` follows "Repair or remove it"."""
    try:
        yield
    except FileNotFoundError as error:
        raise MissingDataError(
            f"{path} is in the list of images but was not found; unpack the data set's archive again."
        ) from error
    except (MemoryError, ImportError, DataFileError):
        raise  # the machine's, not the file's, or a sentence already
    except Exception as error:  # decoders raise nearly anything
        if isinstance(error, OSError) and error.errno is not None:
            raise DataFileError(f"{path} could not be read: {error}; check the disk and the permissions.") from error
        raise CorruptImageError(
            f"{path} could not be decoded as an image ({str(error) or type(error).__name__}). Repair or remove it{advice}."
        ) from error


def check_regular(path: str) -> None:
    """Refuse what is no file: to open a pipe waits for whoever writes into it, and a device may do anything."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise DataFileError(f"{path} is no regular file, but an image was wanted; remove it.")


def load(path: str) -> Image:
    """The image in the mode of its file, decoded whole."""
    try:
        from PIL import Image as PILImage
    except ImportError as error:
        raise ImportError(
            "Image files are decoded with Pillow, but it could not be imported; run `pip install pillow`."
        ) from error
    check_regular(path)
    with open(path, "rb") as file:
        opened = PILImage.open(file)
        opened.load()
    return opened


def load_as(path: str, mode: str = "RGB") -> Image:
    """The image in another mode, "RGB" or "L".

    Raises:
        DataFileError: when its values have more than 8 bits, whose range the file does not tell: Pillow would cut them off
            at 255.
    """
    image = load(path)
    if image.mode[0] in "IF":
        raise DataFileError(
            f"{path} is an image of mode {image.mode}, but one byte for each colour was wanted; bring its values to 0 .. 255 "
            "and save it with 8 bits."
        )
    # convert would copy an image that has the mode already
    return image if image.mode == mode else image.convert(mode)
