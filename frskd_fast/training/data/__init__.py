"""Data modules for Lightning that need no download: CIFAR's pickles, image files, scikit-learn's digits."""

from .base import ImageData
from .cifar import CIFARData, read_cifar
from .digit_scenes import DigitScenesData
from .digits import DigitsData
from .errors import CorruptImageError, DataFileError, MissingDataError
from .folder import FileReader, ImageFolderData
from .loader import ArrayReader, ImageBatch, ImageLoader, Reader, Request
from .mask_files import MaskFolderData, PairFileReader
from .segmentation import PairReader, SegmentationData
from .stem import stem_stride, warn_if_stem_mismatch
from .stl10 import STL10Data
from .voc import VOCData

__all__ = [
    "ArrayReader",
    "CIFARData",
    "CorruptImageError",
    "DataFileError",
    "DigitScenesData",
    "DigitsData",
    "FileReader",
    "ImageBatch",
    "ImageData",
    "ImageFolderData",
    "ImageLoader",
    "MaskFolderData",
    "MissingDataError",
    "PairFileReader",
    "PairReader",
    "Reader",
    "Request",
    "STL10Data",
    "SegmentationData",
    "VOCData",
    "read_cifar",
    "stem_stride",
    "warn_if_stem_mismatch",
]
