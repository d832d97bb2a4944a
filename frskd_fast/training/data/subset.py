"""A part of a training set with the classes in equal shares, the same one that others have published figures for."""

from __future__ import annotations

import torch
from torch import Tensor


def stratified_rows(labels: Tensor, fraction: float) -> Tensor:
    """rows = the training rows of `StratifiedShuffleSplit(n_splits=1, test_size=1 - fraction, random_state=0)`, sorted.

    Args:
        labels: int64 (N,).
        fraction: share of the images, 0 < fraction < 1; every class keeps this share of its own.

    Raises:
        ImportError: when scikit-learn, which draws the split, is missing.
        ValueError: when the fraction leaves too few images.

    Source: Yang et al., IJCAI 2021 (arXiv 2107.13715), the few-shot experiment of its released code.
    """
    try:
        from sklearn.model_selection import StratifiedShuffleSplit  # type: ignore[import-untyped, unused-ignore]
    except ImportError as error:
        raise ImportError(
            f"label_fraction is {fraction}, and such a part is drawn by scikit-learn, but it could not be imported; run `pip "
            "install scikit-learn`."
        ) from error
    split = StratifiedShuffleSplit(n_splits=1, test_size=1 - fraction, random_state=0)
    try:
        ((rows, _),) = split.split(labels.numpy(), labels.numpy())
    except ValueError as error:
        raise ValueError(
            f"label_fraction is {fraction}, but {len(labels)} images cannot be divided so ({error}); take another fraction."
        ) from error
    return torch.from_numpy(rows).sort().values
