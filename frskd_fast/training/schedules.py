"""Schedules of the learning rate by epochs, with a linear warm-up; any class of PyTorch's can take their place.

During W warm-up epochs the rate of epoch e is lr * (e + 1) / (W + 1). Step the schedulers once an epoch.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, MultiStepLR, SequentialLR


def multistep(
    optimizer: Optimizer, milestones: Sequence[int] = (100, 150), gamma: float = 0.1, warmup_epochs: int = 0
) -> LRScheduler:
    """rate(e) = lr * gamma^(milestones <= e).

    Args:
        optimizer: whose learning rate to change.
        milestones: epochs, counted from 0 whether or not there is a warm-up, from which on the rate is multiplied by gamma
            once more. Without any it is constant.
        gamma: the factor.
        warmup_epochs: W; 0 is none.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
        >>> steps = multistep(optimizer, milestones=[2], warmup_epochs=1)
        >>> rates = []
        >>> for _ in range(4):
        ...     rates.append(round(steps.get_last_lr()[0], 6)); optimizer.step(); steps.step()
        >>> rates
        [0.5, 1.0, 0.1, 0.1]
    """
    main = MultiStepLR(optimizer, [max(int(milestone) - warmup_epochs, 0) for milestone in milestones], gamma)
    return _after_warmup(optimizer, main, warmup_epochs)


def cosine(optimizer: Optimizer, max_epochs: int | None = None, warmup_epochs: int = 0) -> LRScheduler:
    """rate(e) = lr * (1 + cos(pi (e - W) / (E - W))) / 2.

    Args:
        optimizer: whose learning rate to change.
        max_epochs: E. The trainer gives the number of its epochs where this is None.
        warmup_epochs: W; 0 is none.
    """
    if max_epochs is None or max_epochs < 1:
        raise ValueError(f"max_epochs is {max_epochs}, but a cosine ends with them; give trainer.max_epochs a number.")
    main = CosineAnnealingLR(optimizer, max(max_epochs - warmup_epochs, 1))
    return _after_warmup(optimizer, main, warmup_epochs)


def _after_warmup(optimizer: Optimizer, main: LRScheduler, warmup_epochs: int) -> LRScheduler:
    if warmup_epochs < 0:
        raise ValueError(f"warmup_epochs is {warmup_epochs}, but 0 or more was wanted.")
    if not warmup_epochs:
        return main
    warmup = LinearLR(optimizer, 1 / (warmup_epochs + 1), 1.0, warmup_epochs)
    return SequentialLR(optimizer, [warmup, main], [warmup_epochs])
