"""A whole training step of FFL, two ResNet-32 with a shared trunk: in the original's order of operations, and ours.

A step is forward, loss and backward of the networks and the fusion module; the optimisers are left out. The original's
networks have ReLUs and poolings of their own; here both run those of the library, whose layers are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench import inputs, originals
from bench.case import Case, Operands, Selection
from bench.cases.self_teacher import half_precision

BATCH = 128  # of the recipe
STEP_BATCH = 32
DEPTH, TINY_DEPTH = 32, 8
PLAIN = ("plain",)
OURS = ("auto compiled",)


def original(images: Tensor, targets: Tensor, network: nn.Module, fusion: nn.Module) -> Tensor:
    """FFL in the original's order of operations."""
    with half_precision(images):
        logits, maps = network(images)
        return originals.ffl(logits, fusion(*maps), targets)


def plain() -> Callable[..., Tensor]:
    """One of the two networks by itself."""
    built: list[Any] = []

    def step(images: Tensor, targets: Tensor, network: Any, fusion: nn.Module) -> Tensor:
        if not built or built[0] is not network:
            built[:] = [network, network.subnetwork(0)]
        with half_precision(images):
            return F.cross_entropy(built[1](images)[1], targets)

    return step


def ours(layout: str, name: str) -> Callable[..., Tensor]:
    """The task, with every operation by the implementation that `name` begins with; also one network by itself."""
    import frskd_fast
    from frskd_fast.tasks import FFLTask

    if name in PLAIN:
        return plain()
    implementation, *form = name.split()
    built: list[Any] = []

    def task_of(network: nn.Module, fusion: nn.Module) -> Any:
        """The task of these networks, built once for as long as they come."""
        if not built or built[0] is not network:
            task = FFLTask(network, channels_last=layout == "channels_last")
            task.net.fusion = fusion
            if layout == "channels_last":
                fusion.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            if "compiled" in form:
                task.compile()
            built[:] = [network, task]
        return built[1]

    def step(images: Tensor, targets: Tensor, network: nn.Module, fusion: nn.Module) -> Tensor:
        with frskd_fast.use_impl(implementation), half_precision(images):
            loss: Tensor = task_of(network, fusion)(images, targets)["loss"]
            return loss

    return step


def operands(depth: int, images: Tensor, targets: Tensor) -> Operands:
    """A batch and fresh networks."""
    from frskd_fast.models import FFLResNet, FusionModule

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(inputs.SEED)
        network = FFLResNet(depth, inputs.CLASSES)
        fusion = FusionModule(network.channels, inputs.CLASSES)
    return {"images": images, "targets": targets, "network": network, "fusion": fusion}


def digits(batch: int) -> Operands:
    """A batch of digit images."""
    images, targets, _ = inputs.digit_images(batch)
    return operands(DEPTH, images, targets)


def tiny() -> Operands:
    """Small networks on two small images of noise."""
    noise = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(inputs.SEED))
    return operands(TINY_DEPTH, noise, torch.arange(2))


def cases(selection: Selection) -> Iterator[Case]:
    """dtype x layout; what is compiled is measured where compiling was asked for."""
    batch = selection.batch or STEP_BATCH
    for dtype in selection.dtypes_of_networks():
        for layout in selection.layouts:
            yield Case(
                suite="methods",
                shape=f"FFL step N={batch}",
                dtype=dtype,
                layout=layout,
                backward=True,
                bytes_moved=0,
                operands=partial(digits, batch),
                tiny=tiny,
                differentiated=("network", "fusion"),
                original=original,
                ours=partial(ours, layout),
                chain=True,
                compiles=selection.compiles_network(dtype, layout),
                operations=("mutual_logits",),
                more=(*PLAIN, *OURS),
                images=batch,
            )
