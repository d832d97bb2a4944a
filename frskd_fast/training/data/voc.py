"""PASCAL VOC 2007 and 2012 for semantic segmentation, from the folders that its authors' archives unpack to."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from .base import Part
from .errors import DataFileError, MissingDataError
from .mask_files import FilePair, PairFileReader
from .segmentation import SegmentationData

CLASSES = (
    "background aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person "
    "pottedplant sheep sofa train tvmonitor"
).split()
# Year and list of images; the archive that holds them, and the number of images in the list.
TRAINING = (
    ("2007", "trainval", "VOCtrainval_06-Nov-2007.tar", 422),
    ("2012", "trainval", "VOCtrainval_11-May-2012.tar", 2913),
)
TEST = (("2007", "test", "VOCtest_06-Nov-2007.tar", 210),)
PAGE = "http://host.robots.ox.ac.uk/pascal/VOC"


class VOCData(SegmentationData):
    """x = (window(pixels) / 255 - mean) / std and window(mask): 20 kinds of objects and the background.

    Training images are the lists `Segmentation/trainval.txt` of VOC 2007 (422 images) and 2012 (2913), those for
    validation and test `test.txt` of VOC 2007 (210). Masks are the palette indices of `SegmentationClass`; 255, the border
    of objects, does not count. This is the split of the paper, whose test images are in its training set: VOC 2012 has all
    images of VOC 2007, under names that begin with `2007_`. To measure on images that were not trained on, set
    `leave_out_test_images`; published figures do not.

    Args:
        root: a folder that holds `VOC2007` and `VOC2012`, or holds `VOCdevkit` with them; the archives may also lie unpacked
            side by side, each in a folder of its own. Nothing is downloaded.
        leave_out_test_images: train without the 210 images of VOC 2012 that are test images of VOC 2007.
        drop_last: as `ImageData` takes it, by default as in the original.
        common: as `SegmentationData` takes them: crop_size, short_side, flip, blur, pad_label, batch_size, seed, ...

    Raises:
        MissingDataError, DataFileError, CorruptImageError: what file, what was found, what was wanted.
        ImportError: when Pillow is missing.

    Example:
        >>> from frskd_fast.training.data import VOCData
        >>> data = VOCData("datasets", batch_size=16)
        >>> data.num_classes, data.image_size, data.ignore_index, data.class_names[15]
        (21, (512, 512), 255, 'person')

    Source: Everingham et al., IJCV 2010; splits and augmentation of FRSKD's released segmentation code.
    """

    def __init__(
        self, root: str = "data", leave_out_test_images: bool = False, drop_last: bool = True, **common: Any
    ) -> None:
        super().__init__(len(CLASSES), drop_last=drop_last, **common)
        self.root, self.leave_out_test_images = str(root), bool(leave_out_test_images)
        self.class_names = tuple(CLASSES)

    def make_reader(self, part: Part) -> PairFileReader:
        """The pairs of one part; they are decoded when a batch needs them."""
        if part == "validation":
            test = self.reader("test")
            assert isinstance(test, PairFileReader)
            return test
        pairs = [
            pair for listed in (TRAINING if part == "train" else TEST) for pair in listed_pairs(self.root, *listed)
        ]
        if part == "train" and self.leave_out_test_images:
            tested = {f"2007_{Path(image).name}" for listed in TEST for image, _ in listed_pairs(self.root, *listed)}
            pairs = [pair for pair in pairs if Path(pair[0]).name not in tested]
        return PairFileReader(pairs, self.num_classes, self.ignore_index, **self.settings())


def listed_pairs(root: str, year: str, name: str, archive: str, count: int) -> list[FilePair]:
    """The images and masks of `VOC<year>/ImageSets/Segmentation/<name>.txt`, wherever below root that is."""
    path = Path("ImageSets", "Segmentation", f"{name}.txt")
    places = [folder for depth in ("", "*/", "*/*/") for folder in sorted(Path(root).glob(f"{depth}VOC{year}"))]
    folder = next((folder for folder in places if (folder / path).is_file()), None)
    if folder is None:
        raise MissingDataError(
            f"VOC{year}/{path.as_posix()} was not found below {root}. Download {archive} from {PAGE}, unpack it into {root}, "
            "where it makes the folder VOCdevkit, and pass that folder or the one above as root."
        )
    try:
        names = (folder / path).read_text(encoding="utf-8").split()
    except UnicodeDecodeError as error:
        raise DataFileError(f"{folder / path} is no text file ({error}); unpack {archive} again.") from error
    if not names:
        raise DataFileError(f"{folder / path} lists no images; unpack {archive} again.")
    if len(names) != count:
        warnings.warn(
            f"{folder / path} is intact but holds {len(names)} images, where the original has {count}; figures will not "
            "compare with published ones.",
            stacklevel=2,
        )
    return [
        (str(folder / "JPEGImages" / f"{name}.jpg"), str(folder / "SegmentationClass" / f"{name}.png"))
        for name in names
    ]
