"""Random numbers of training as a pure function of what they are for."""

from __future__ import annotations

from enum import IntEnum

import numpy
import torch


class Purpose(IntEnum):
    """What a stream of random numbers is for; two purposes never share one."""

    ORDER = 1
    AUGMENTATION = 2
    MIXING = 3
    SCENES = 4


def stream_seed(seed: int, purpose: Purpose, epoch: int = 0, batch: int = 0, rank: int = 0) -> int:
    """64 bits of `numpy.random.SeedSequence((seed, purpose, epoch, batch, rank))`.

    Args:
        seed: of the run, 0 <= seed < 2^32; so are the other numbers.
        purpose: what the random numbers are for.
        epoch, batch, rank: which epoch, position in it, and process; 0 where the purpose does not depend on them.

    Returns:
        An int for `torch.Generator.manual_seed`.

    Example:
        >>> stream_seed(10, Purpose.ORDER, epoch=3) == stream_seed(10, Purpose.ORDER, epoch=3)
        True
        >>> stream_seed(10, Purpose.ORDER, epoch=3) == stream_seed(10, Purpose.ORDER, epoch=4)
        False
    """
    # Always five words below 2^32 each: a shorter sequence would be the same as one with zeros behind it.
    words = numpy.random.SeedSequence((seed, int(purpose), epoch, batch, rank)).generate_state(2, numpy.uint32)
    return int(words[0]) << 32 | int(words[1])


def stream(seed: int, purpose: Purpose, epoch: int = 0, batch: int = 0, rank: int = 0) -> torch.Generator:
    """A CPU generator at the start of the stream that `stream_seed` names; arguments as there."""
    return torch.Generator().manual_seed(stream_seed(seed, purpose, epoch, batch, rank))
