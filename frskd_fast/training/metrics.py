"""Sums that stay on the device: means of the loss parts over an epoch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric


class MeanOfParts(Metric):
    """mean_p = sum over batches of (images in the batch * part_p) / number of images, for P scalars at once.

    One addition for each batch, nothing is read back before `compute()`, and one reduction over all processes there.

    Args:
        names: names of the P scalars, in the order in which `update` gets them.

    Example:
        >>> mean = MeanOfParts(["loss", "kd"])
        >>> mean.update([torch.tensor(1.0), torch.tensor(4.0)], 3)
        >>> mean.update([torch.tensor(5.0), torch.tensor(0.0)], 1)
        >>> mean.means()
        {'loss': 2.0, 'kd': 3.0}
    """

    full_state_update = False
    sums: Tensor
    images: Tensor

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        self.names = list(names)
        # In float64, so that a mean over many batches has the digits of its parts.
        self.add_state("sums", torch.zeros(len(self.names), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("images", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, parts: Sequence[Tensor], images: int) -> None:
        """Add one batch: its P scalars and its number of images."""
        self.sums += torch.stack([part.detach().double() for part in parts]) * images
        self.images += images

    def compute(self) -> Tensor:
        """The P means, float64."""
        return self.sums / self.images.clamp(min=1)

    def means(self) -> dict[str, float]:
        """The means by name, on the host: this waits for the device."""
        return dict(zip(self.names, self.compute().reshape(-1).tolist(), strict=True))

    def saved(self) -> dict[str, Any]:
        """The sums in plain containers, for a checkpoint."""
        return {
            "names": list(self.names),
            "sums": self.sums.to("cpu", copy=True),
            "images": self.images.to("cpu", copy=True),
        }

    @classmethod
    def restored(cls, saved: dict[str, Any]) -> MeanOfParts:
        """What `saved` describes; a copy, on the CPU."""
        mean = cls(saved["names"])
        mean.sums = saved["sums"].clone()
        mean.images = saved["images"].clone()
        mean._update_count = 1  # else compute() warns that nothing was added
        return mean
