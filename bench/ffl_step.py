"""The training step of FFL: two ResNet-32 with a shared trunk, and the fusion module.

The original's networks have ReLUs and poolings of their own; here both run those of the library, whose layers are the same.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench import inputs, originals
from bench.cases.self_teacher import half_precision
from bench.method_step import Step

if TYPE_CHECKING:
    from frskd_fast.tasks import FFLTask

BATCH = 128  # of the recipe
DEPTH, TINY_DEPTH = 32, 8


def original(images: Tensor, targets: Tensor, network: nn.Module, fusion: nn.Module) -> Tensor:
    """FFL in the original's order of operations."""
    with half_precision(images):
        logits, maps = network(images)
        return originals.ffl(logits, fusion(*maps), targets)


def plain(images: Tensor, targets: Tensor, network: Any, fusion: nn.Module) -> Tensor:
    """One of the two networks by itself."""
    with half_precision(images):
        return F.cross_entropy(network.subnetwork(0)(images)[1], targets)


def networks(images: Tensor, small: bool) -> dict[str, nn.Module]:
    """Fresh ones."""
    from frskd_fast.models import FFLResNet, FusionModule

    network = FFLResNet(TINY_DEPTH if small else DEPTH, inputs.CLASSES)
    return {"network": network, "fusion": FusionModule(network.channels, inputs.CLASSES)}


def task(images: Tensor, channels_last: bool, network: nn.Module, fusion: nn.Module) -> FFLTask:
    """Ours, with this fusion module."""
    from frskd_fast.tasks import FFLTask

    built = FFLTask(network, channels_last=channels_last)
    built.net.fusion = fusion
    if channels_last:
        fusion.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return built


STEP = Step("FFL", 32, networks, ("network", "fusion"), original, task, {"plain": plain}, ("mutual_logits",))
