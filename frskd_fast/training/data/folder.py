"""Images in files: listed at the start, decoded in worker processes, cropped at random to one size."""

from __future__ import annotations

import hashlib
import io
import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy
import torch

from .augmentation import draw_resized_crops, random_resized_crop, resize_and_centre_crop
from .base import ImageData, Part, colour_statistics, probability, whole_number
from .decoding import check_regular, errors_of, load_as
from .errors import CorruptImageError, DataFileError, MissingDataError
from .layouts import LAYOUTS, Images, Listing
from .loader import ImageBatch, Reader, Request, draw_crops_for, keys_of

if TYPE_CHECKING:
    from PIL.Image import Image

LayoutName = Literal["folders", "imagenet", "tiny_imagenet", "cub200", "mit67", "stanford40", "dogs"]
Augmentation = Literal["resized_crop", "padded_crop", "none"]
OnCorrupt = Literal["error", "skip"]
Decoder = Literal["auto", "pil", "torchvision"]


class ImageFolderData(ImageData):
    """x = (random_resized_crop(pixels) / 255 - mean) / std in training, the centre of the resized image otherwise.

    | layout | what root holds | classes | image_size, resize |
    | --- | --- | --- | --- |
    | `folders` | `train/<class>/...`, `val/<class>/...`, perhaps `test/<class>/...` | as there are folders | 224, 256 |
    | `imagenet` | the same | 1000 | 224, 256 |
    | `tiny_imagenet` | `train/<wnid>/images/`, `val/images/`, `val/val_annotations.txt` | 200 | 32, 32 |
    | `cub200` | `images.txt`, `image_class_labels.txt`, `train_test_split.txt`, `images/` | 200 | 224, 256 |
    | `mit67` | `TrainImages.txt`, `TestImages.txt`, `Images/` | 67 | 224, 256 |
    | `stanford40` | `ImageSplits/<action>_train.txt`, ..., `JPEGImages/` | 40 | 224, 256 |
    | `dogs` | `train_list.mat`, `test_list.mat` (or in `lists/`; needs SciPy), `Images/` | 120 | 224, 256 |

    Where a data set has one part besides the training images, it is both validation and test, as in the paper.

    Args:
        root: the folder described above. Nothing is downloaded.
        layout: a row of the table.
        classes: number of classes; None takes the table's, for `folders` the number of folders in `train`, which are
            counted when `num_classes` is first asked for. Fewer classes on disk than that are warned of, more are an error.
        image_size: side of the images that the network sees; None: the table's.
        resize: length of the shorter side before the centre is cut out; None: the table's, or 8 / 7 of another image_size.
        augmentation: of training. "resized_crop": a random window (`resized_crop_window`) resized and flipped, in the
            workers. "padded_crop": the resized centre, then a random crop with `padding` zeros around it, and a flip, on
            the device; for small images that have the right size already. "none".
        scale, ratio: of the random window: share of the image's area, width / height.
        padding: of "padded_crop", in pixels.
        flip: probability of a horizontal flip in training.
        on_corrupt: what to do with an image that cannot be decoded. "error" raises `CorruptImageError` with its name.
            "skip" takes the next readable image of the list in training and leaves it out in evaluation; one warning at
            the end of the epoch counts and names them. A file that is missing is an error either way.
        decoder: "pil"; "torchvision", for JPEG and PNG; "auto" takes torchvision where it works. Decoders may differ in the
            last bit of a pixel.
        mean, std: of images in 0 .. 1; None: the layout's, ImageNet's for all but TinyImageNet.
        workers: as `ImageData` takes it; by default one for each core.
        common: as `ImageData` takes them: batch_size, seed, mixup, cutmix, ...

    Raises:
        MissingDataError, DataFileError, CorruptImageError: what file, what was found, what was wanted.
        ImportError: when Pillow (or, for dogs, SciPy) is missing.

    Example:
        >>> from frskd_fast.training.data import ImageFolderData
        >>> data = ImageFolderData("tiny-imagenet-200", layout="tiny_imagenet")
        >>> data.num_classes, data.image_size, data.mean
        (200, (32, 32), (0.4802, 0.4481, 0.3975))

    Source: Ji et al., CVPR 2021, section 4.1, and the transforms of its released code.
    """

    def __init__(
        self,
        root: str = "data",
        layout: LayoutName = "folders",
        classes: int | None = None,
        image_size: int | None = None,
        resize: int | None = None,
        augmentation: Augmentation = "resized_crop",
        scale: tuple[float, float] = (0.08, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        padding: int = 4,
        flip: float = 0.5,
        on_corrupt: OnCorrupt = "error",
        decoder: Decoder = "auto",
        mean: tuple[float, float, float] | None = None,
        std: tuple[float, float, float] | None = None,
        workers: int = -1,
        **common: Any,
    ) -> None:
        super().__init__(workers=workers, **common)
        _one_of(layout, tuple(LAYOUTS), "layout")
        chosen = LAYOUTS[layout]
        self.root, self.layout = str(root), layout
        self._classes = chosen.classes if classes is None else whole_number(classes, "classes", 1)
        side = chosen.image_size if image_size is None else whole_number(image_size, "image_size", 1)
        self.image_size, self.channels = (side, side), 3
        if resize is None:
            resize = chosen.resize if side == chosen.image_size else max(side, round(side * 8 / 7))
        self.resize = whole_number(resize, "resize", side)
        self.augmentation = _one_of(augmentation, ("resized_crop", "padded_crop", "none"), "augmentation")
        if self.crop_each_view and augmentation != "padded_crop":
            raise ValueError(
                f"crop_each_view is set and augmentation is {augmentation!r}, but views are cropped apart on the device, by "
                "'padded_crop' alone; take that, or set crop_each_view to false."
            )
        self.scale, self.ratio = _interval(scale, "scale", 1.0), _interval(ratio, "ratio")
        self.padding = whole_number(padding, "padding", 0)
        self.flip = probability(flip, "flip")
        self.on_corrupt = _one_of(on_corrupt, ("error", "skip"), "on_corrupt")
        self.decoder = _one_of(decoder, ("auto", "pil", "torchvision"), "decoder")
        self.mean, self.std = colour_statistics(mean or chosen.mean, std or chosen.std, 3)
        self._listing: Listing | None = None

    @property
    def num_classes(self) -> int:  # type: ignore[override]
        """Number of classes; for the layout `folders` without `classes` the folders are counted."""
        if self._classes is None:
            self._classes = len(self.listing().classes)
        return self._classes

    def listing(self) -> Listing:
        """All images of the data set, read from disk once."""
        if self._listing is None:
            self._listing = LAYOUTS[self.layout].read(Path(self.root))
            found = len(self._listing.classes)
            wanted = found if self._classes is None else self._classes
            if found > wanted:
                raise DataFileError(
                    f"{self.root} has {found} classes, but {wanted} were wanted; pass classes={found}, or check root and "
                    "layout."
                )
            if found < wanted:
                warnings.warn(
                    f"{self.root} has {found} classes, but {wanted} were wanted; the network has outputs that no image "
                    "belongs to, and accuracies will not compare with published ones.",
                    stacklevel=2,
                )
        return self._listing

    def make_reader(self, part: Part) -> FileReader:
        """The files of one part; they are decoded when a batch needs them."""
        listing = self.listing()
        images = {
            "train": listing.train,
            "validation": listing.validation if listing.validation is not None else listing.test,
            "test": listing.test if listing.test is not None else listing.validation,
        }[part]
        assert images is not None
        names = ("augmentation", "scale", "ratio", "padding", "flip", "crop_each_view", "on_corrupt", "decoder")
        settings = {name: getattr(self, name) for name in names}
        return FileReader(self.root, images, self.image_size, self.resize, **settings)


class FileReader(Reader):
    """Images in files, decoded when a batch needs them; arguments as `ImageFolderData` takes them.

    Args:
        root: the folder from which paths are counted.
        images: path and class of each image.
        size: (H, W) of the images in a batch.
        resize: length of the shorter side before the centre is cut out.
    """

    def __init__(
        self,
        root: str,
        images: Images,
        size: tuple[int, int],
        resize: int,
        *,
        augmentation: str = "resized_crop",
        scale: tuple[float, float] = (0.08, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        padding: int = 4,
        flip: float = 0.5,
        crop_each_view: bool = False,
        on_corrupt: str = "error",
        decoder: str = "auto",
    ) -> None:
        self.root = root
        # One array of bytes: a million Python strings would be copied into every worker by their reference counts.
        self._paths = numpy.array([os.fsencode(path) for path, _ in images])
        self.labels = torch.tensor([label for _, label in images], dtype=torch.int64)
        self.size, self.resize = size, resize
        self.augmentation, self.scale, self.ratio = augmentation, scale, ratio
        self.padding, self.flip, self.crop_each_view = padding, flip, crop_each_view
        self.on_corrupt = on_corrupt
        self._decode_with_torchvision = decoder != "pil" and torchvision_decodes(required=decoder == "torchvision")
        first = self.name(0)
        if not os.path.isfile(first):
            raise MissingDataError(
                f"{first}, the first image of the list, was not found; unpack the images into {root}, or pass another root."
            )

    def __len__(self) -> int:
        return len(self._paths)

    def name(self, row: int) -> str:
        """The path of the image."""
        return os.path.join(self.root, os.fsdecode(self._paths[row]))

    @property
    def looks(self) -> int:
        if self.augmentation == "padded_crop" and not self.padding:
            return 2 if self.flip else 1
        return 1 if self.augmentation == "none" else 0

    def fingerprint(self) -> str:
        """Of the paths, size and time of change of each file, the size of the images and the decoder; nothing is read."""
        decoder = "torchvision" if self._decode_with_torchvision else "pil"
        root = os.path.realpath(self.root)
        digest = hashlib.sha256(f"{root} {self.size} {self.resize} {decoder} {self.on_corrupt}".encode())
        for row in range(len(self)):
            name = self.name(row)
            try:
                status = os.stat(name)
            except OSError as error:
                raise MissingDataError(
                    f"{name} is in the list of images but could not be found ({error}); unpack the data set's archive again."
                ) from error
            digest.update(f"{os.fsdecode(self._paths[row])}\0{status.st_size} {status.st_mtime_ns}\0".encode())
        return digest.hexdigest()

    def read(self, request: Request) -> tuple[ImageBatch, tuple[int, ...]]:
        resized = request.training and self.augmentation == "resized_crop"
        uniforms = request.draw(draw_resized_crops).tolist() if resized else None
        pixels = numpy.empty((len(request.rows), *self.size, 3), dtype=numpy.uint8)
        rows: list[int] = []
        corrupt: list[int] = []
        for position, wanted in enumerate(request.rows.tolist()):
            found = self._first_readable(wanted, corrupt, replace=request.training)
            if found is None:
                continue
            row, image = found
            if uniforms is None:
                image = resize_and_centre_crop(image, self.resize, self.size)
            else:
                image = random_resized_crop(image, self.size, uniforms[position], self.scale, self.ratio, self.flip)
            pixels[len(rows)] = numpy.asarray(image)
            rows.append(row)
        if not rows:
            raise CorruptImageError(
                f"None of the {len(request.rows)} images of a batch could be decoded, the first of them "
                f"{self.name(int(request.rows[0]))}; repair or remove them."
            )
        # Channels stay last in memory, as the images come; the device puts them in front.
        images = torch.from_numpy(pixels[: len(rows)]).permute(0, 3, 1, 2)
        crops = None
        if self.augmentation == "padded_crop":
            crops = draw_crops_for(request, self.padding, self.flip, self.crop_each_view)
        keys = keys_of(self.looks, numpy.array(rows, dtype=numpy.int64), crops)
        return ImageBatch(images, self.labels[rows], crops, request.mixing_seed(), keys), tuple(corrupt)

    def _first_readable(self, wanted: int, corrupt: list[int], replace: bool) -> tuple[int, Image] | None:
        """The image `wanted`, or where it is corrupt and may be replaced, the next one that is not."""
        for distance in range(len(self) if replace else 1):
            row = (wanted + distance) % len(self)
            try:
                return row, self._decode(self.name(row))
            except CorruptImageError:
                if self.on_corrupt == "error":
                    raise
                corrupt.append(row)
        if replace:
            raise CorruptImageError(f"None of the {len(self)} images below {self.root} could be decoded.")
        return None

    def _decode(self, path: str) -> Image:
        with errors_of(path, ", or pass on_corrupt='skip' to go on without such images"):
            check_regular(path)
            if self._decode_with_torchvision and path.lower().endswith((".jpg", ".jpeg", ".png")):
                image = _decode_with_torchvision(path)
                if image is not None:
                    return image
            return load_as(path)


def torchvision_decodes(required: bool = False) -> bool:
    """Whether torchvision is installed with decoders that run; an ImportError where `required` and it is not."""
    try:
        from PIL import Image as PILImage
        from torchvision.io import ImageReadMode, decode_image

        file = io.BytesIO()
        PILImage.new("RGB", (1, 1)).save(file, "PNG")
        decode_image(torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8), mode=ImageReadMode.RGB)
    except Exception as error:  # a torchvision of another torch raises a RuntimeError when it is imported
        if required:
            raise ImportError(
                f"decoder is 'torchvision', but it could not decode a picture here ({error}); install the torchvision that "
                "belongs to this torch, or pass decoder='pil'."
            ) from error
        return False
    return True


def _decode_with_torchvision(path: str) -> Image | None:
    """The image in RGB, or None where PIL has to try: torchvision knows fewer kinds of JPEG, and fewer formats."""
    from PIL import Image as PILImage
    from torchvision.io import ImageReadMode, decode_image, read_file

    try:
        pixels = decode_image(read_file(path), mode=ImageReadMode.RGB)
    except RuntimeError:
        return None
    if pixels.dtype != torch.uint8:  # a PNG of 16 bits
        return None
    return PILImage.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())


def _one_of(value: Any, wanted: tuple[str, ...], name: str) -> Any:
    if value not in wanted:
        raise ValueError(f"{name} is {value!r}, but one of {', '.join(map(repr, wanted))} was wanted.")
    return value


def _interval(value: tuple[float, float], name: str, most: float = float("inf")) -> tuple[float, float]:
    low, high = map(float, value)
    if not 0.0 < low <= high <= most:
        limit = "" if most == float("inf") else f" and at most {most}"
        raise ValueError(f"{name} is {value!r}, but two positive numbers were wanted, the smaller first{limit}.")
    return low, high
