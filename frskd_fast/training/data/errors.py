"""Errors of the readers: sentences that name the file, what was found, what was wanted and what to do."""

from __future__ import annotations


class DataFileError(ValueError):
    """A file of a data set is not what its reader needs."""


class MissingDataError(DataFileError, FileNotFoundError):
    """A file or folder of a data set is not there."""


class CorruptImageError(DataFileError):
    """An image file could not be decoded."""
