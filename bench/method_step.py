"""A method's whole training step as rows of the suite `methods`: in the original's order of operations, ours, and plain.

A step is forward, loss and backward of all that learns, with the forward of what does not; the optimiser is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bench import inputs, originals
from bench.case import Case, Operands, Selection
from bench.cases.self_teacher import half_precision

CACHED, COMPILED = "auto teacher cached", "auto compiled"


class Step(NamedTuple):
    """What the rows of one method's step are made of; all functions of a batch take the networks by their names."""

    name: str
    batch: int
    networks: Callable[[Tensor, bool], dict[str, nn.Module]]  # fresh ones for these images, small ones on request
    differentiated: tuple[str, ...]  # which of them learn
    original: Callable[..., Tensor]
    task: Callable[..., Any]  # (images, channels_last, **networks) -> the task
    plain: dict[str, Callable[..., Tensor]]  # rows that compute something else, for comparison
    operations: tuple[str, ...]
    cached: bool = False  # whether there is a teacher whose outputs can be kept
    # (batch, small) -> images and targets; None for digit images and their classes
    data: Callable[[int, bool], tuple[Tensor, Tensor]] | None = None
    more: tuple[str, ...] = ()  # further rows of ours, but those that name the layout of the case


def ours(step: Step, layout: str, name: str) -> Callable[..., Tensor]:
    """The task, with every operation by the implementation that `name` begins with; also the plain rows.

    "compiled", "channels_last" and "teacher cached" behind it say how the task is used.
    """
    import frskd_fast
    from frskd_fast import mixing

    if name in step.plain:
        return step.plain[name]
    implementation, *form = name.split()
    built: list[Any] = []

    def run(images: Tensor, targets: Tensor, **networks: nn.Module) -> Tensor:
        with frskd_fast.use_impl(implementation), half_precision(images):
            if not built or built[0] != networks:  # once for as long as they come
                task = step.task(images, "channels_last" in (layout, *form), **networks)
                if "compiled" in form:
                    task.compile()
                built[:] = [networks, task, None]
            task = built[1]
            views = mixing.rotate4(images) if task.views == "rotations" else images
            if "cached" not in form:
                return task(views, targets)["loss"]
            if built[2] is None:
                with torch.no_grad():
                    built[2] = task.teacher_outputs(views)
            return task(views, targets, built[2])["loss"]

    return run


def operands(step: Step, batch: int) -> Operands:
    """A batch, and the networks."""
    images, targets = step.data(batch, False) if step.data else inputs.digit_images(batch)[:2]
    return with_networks(step, images, targets, small=False)


def tiny(step: Step) -> Operands:
    """Two small images of noise or small data of the step's own, and small networks."""
    if step.data:
        return with_networks(step, *step.data(2, True), small=True)
    noise = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(inputs.SEED))
    return with_networks(step, noise, torch.arange(2), small=True)


def with_networks(step: Step, images: Tensor, targets: Tensor, small: bool) -> Operands:
    """The batch and its networks, always the same."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(inputs.SEED)
        return {"images": images, "targets": targets, **step.networks(images, small)}


def cases(step: Step, selection: Selection) -> Iterator[Case]:
    """dtype x layout; what is compiled is measured where compiling was asked for."""
    batch = selection.batch or step.batch
    for dtype in selection.dtypes_of_networks():
        for layout in selection.layouts:
            yield Case(
                suite="methods",
                shape=f"{step.name} step N={batch}",
                dtype=dtype,
                layout=layout,
                backward=True,
                bytes_moved=0,
                operands=partial(operands, step, batch),
                tiny=partial(tiny, step),
                differentiated=step.differentiated,
                original=step.original,
                ours=partial(ours, step, layout),
                chain=True,
                compiles=selection.compiles_network(dtype, layout),
                operations=step.operations,
                more=(
                    *step.plain,
                    *([CACHED] if step.cached else []),
                    *(row for row in step.more if layout not in row),
                    COMPILED,
                ),
                images=batch,
            )


def with_statistics(network: nn.Module, images: Tensor) -> nn.Module:
    """The network in evaluation mode, its BatchNorms with the statistics of `images`: untrained, its maps would explode."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    with torch.no_grad():
        network(originals.rotated(images))
    return network.eval()
