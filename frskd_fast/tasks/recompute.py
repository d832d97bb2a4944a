"""A module whose forward pass keeps nothing for backward and is computed a second time there, with the same results."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from frskd_fast import _dispatch

# These take cumulative averages without a counter for a momentum of 0.
COUNTERLESS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def recomputed(module: nn.Module, function: Callable[..., Any], *arguments: Any, draws_random_numbers: bool) -> Any:
    """`function(*arguments)`, a forward pass through `module`, of which only the arguments are kept for backward.

    Losses, gradients and statistics are those of the plain call; with random numbers their state is saved, which reads it
    from the device.
    """
    settings: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": draws_random_numbers}
    if not torch.compiler.is_compiling():
        # A traced graph writes the running statistics once, after the forward pass, and repeats in backward only what the
        # gradients need.
        settings["context_fn"] = functools.partial(_contexts, module)
    return checkpoint(function, *arguments, **settings)


def _contexts(
    module: nn.Module,
) -> tuple[contextlib.AbstractContextManager[None], contextlib.AbstractContextManager[None]]:
    # The backward pass may run outside of the `use_impl` block that the forward pass stood in.
    return contextlib.nullcontext(), _repeated(module, _dispatch.forced())


@contextlib.contextmanager
def _repeated(module: nn.Module, impl: str) -> Iterator[None]:
    """A forward pass inside computes what the first one did and changes nothing."""
    with _dispatch.use_impl(impl), _unchanged_buffers(module):
        yield


@contextlib.contextmanager
def _unchanged_buffers(module: nn.Module) -> Iterator[None]:
    """A forward pass inside leaves every buffer of `module` as it was, the statistics of its BatchNorms among them.

    A BatchNorm with momentum 0 and without a counter writes its running statistics back unchanged, which costs nothing;
    it must still have them, since the second pass has to save the same tensors for backward as the first. Buffers of
    other modules (InstanceNorm averages its statistics anew) are replaced by copies meanwhile.
    """
    momenta: list[tuple[_BatchNorm, float | None]] = []
    buffers: list[tuple[dict[str, Tensor | None], str, Tensor]] = []
    try:
        for part in module.modules():
            if isinstance(part, _BatchNorm):
                momenta.append((part, part.momentum))
                part.momentum = 0.0
                names = ["num_batches_tracked"]
            else:
                names = list(part._buffers)
            for name in names:
                buffer = part._buffers.get(name)
                if buffer is not None:
                    buffers.append((part._buffers, name, buffer))
                    # SyncBatchNorm insists on its counter.
                    part._buffers[name] = None if type(part) in COUNTERLESS else buffer.clone()
        yield
    finally:
        for batch_norm, momentum in momenta:
            batch_norm.momentum = momentum
        for owner, name, buffer in buffers:
            owner[name] = buffer
