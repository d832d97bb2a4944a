"""Which of a network's feature maps make a pyramid: each half the size of the one before, rounded up."""

import itertools
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from frskd_fast.ops._checks import check_positive_integer

# FRSKD's residual networks hand out four maps. A finer one costs the self-teacher more than all the others together.
MAX_LEVELS = 4


def describe_sizes(maps: Sequence[Any]) -> str:
    """The sizes of maps for an error, such as "56 x 56, 28 x 28, a vector of 512".

    Example:
        >>> import torch
        >>> describe_sizes([torch.zeros(2, 8, 4, 6), torch.zeros(2, 16)])
        '4 x 6, a tensor of shape (2, 16)'
    """

    def describe(feature: Any) -> str:
        if not isinstance(feature, Tensor):
            return f"a {type(feature).__name__}"
        if feature.dim() != 4:
            return f"a tensor of shape {tuple(feature.shape)}"
        return f"{feature.shape[2]} x {feature.shape[3]}"

    return ", ".join(describe(feature) for feature in maps)


def _size(feature: Any) -> tuple[int, int] | None:
    if not isinstance(feature, Tensor) or feature.dim() != 4:
        return None
    return feature.shape[2], feature.shape[3]


def _halves(finer: tuple[int, int], coarser: tuple[int, int]) -> bool:
    return coarser == ((finer[0] + 1) // 2, (finer[1] + 1) // 2)


def pyramid_levels(maps: Sequence[Any], max_levels: int = MAX_LEVELS) -> list[int]:
    """Positions of the longest run of maps in which each size is half of the one before, rounded up.

    Of maps of one size the last (deepest) is taken; pooled vectors and maps that do not fit are left out; of runs equally
    long the one that ends last is taken, and of a run longer than `max_levels` its coarsest levels.

    Args:
        maps: tensors in the network's order; those of shape (N, C, H, W) count.
        max_levels: at least 2.

    Returns:
        Increasing positions in `maps`, two or more.

    Raises:
        ValueError: when no two maps fit, naming the sizes.

    Example:
        >>> import torch
        >>> stem, first, second, third = (torch.zeros(1, 4, side, side) for side in (15, 15, 8, 4))
        >>> pyramid_levels([stem, first, second, third, torch.zeros(1, 4)])
        [1, 2, 3]
    """
    check_positive_integer("max_levels", max_levels)
    if max_levels < 2:
        raise ValueError("max_levels is 1, but at least 2 was wanted: a pyramid fuses levels.")
    sizes = [_size(feature) for feature in maps]
    longest: list[int] = []
    for end in range(len(maps) - 1, -1, -1):
        run: list[int] = []
        coarser = None
        for position in range(end, -1, -1):
            size = sizes[position]
            if size is not None and (coarser is None or (size != coarser and _halves(size, coarser))):
                run.insert(0, position)
                coarser = size
        if len(run) > len(longest):
            longest = run
    if len(longest) < 2:
        raise ValueError(
            f"the feature maps are {describe_sizes(maps)}, but two or more were wanted of which each is half the size "
            "of the one before, rounded up; name layers of different resolution, finest first."
        )
    return longest[-max_levels:]


def check_levels(maps: Sequence[Any], levels: Sequence[int]) -> list[int]:
    """`levels` as positions in `maps`, if they make a pyramid.

    Raises:
        TypeError, ValueError: on a position that is not there, and on sizes that do not halve (rounded up).
    """
    if not isinstance(levels, list | tuple) or not all(
        isinstance(level, int) and not isinstance(level, bool) for level in levels
    ):
        raise TypeError(f"levels is {levels!r}, but a list of positions among the feature maps was wanted.")
    if len(levels) < 2:
        raise ValueError(f"levels is {list(levels)}, but two positions or more were wanted: a pyramid fuses levels.")
    for level in levels:
        if not -len(maps) <= level < len(maps):
            raise ValueError(
                f"levels holds {level}, but there are {len(maps)} feature maps: {describe_sizes(maps)}; count from 0."
            )
    positions = [level % len(maps) for level in levels]
    sizes = [_size(maps[position]) for position in positions]
    for finer, coarser in itertools.pairwise(sizes):
        if finer is None or coarser is None or not _halves(finer, coarser):
            raise ValueError(
                f"levels={list(levels)} chooses feature maps of {describe_sizes([maps[p] for p in positions])}, but each "
                "was wanted to be half the size of the one before, rounded up; leave levels out to have them chosen."
            )
    return positions
