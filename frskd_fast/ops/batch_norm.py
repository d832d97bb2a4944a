"""BatchNorm folded into the reading of a fusion node: an affine map per channel, and the running statistics it owes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from frskd_fast import _dispatch
from frskd_fast.ops import _table
from frskd_fast.reference import fusion as reference
from frskd_fast.reference.dtypes import accumulate_dtype


class Normalisation(NamedTuple):
    """What BatchNorm does to one input: statistics (>= 2, C) of the batch or running ones, gamma and beta (C,)."""

    statistics: Tensor
    gamma: Tensor
    beta: Tensor
    trains: bool  # the statistics are those of the input itself, and the gradient goes through them


class RunningUpdate(NamedTuple):
    """What a BatchNorm has to remember of a batch; applied by ``update_running_statistics``."""

    batch_norm: nn.BatchNorm2d
    statistics: Tensor  # (3, C)
    elements: int  # of a channel, which the statistics are taken over


@_table.register("fusion")
def batch_statistics(inputs: Sequence[Tensor], epsilons: Sequence[float], impl: str) -> list[Tensor]:
    """(3, C) for each input: mean, 1 / sqrt(variance + epsilon), biased variance."""
    return [x.new_empty((3, x.shape[1]), dtype=accumulate_dtype(x.dtype)) for x in inputs]


def has_hooks(module: nn.Module) -> bool:
    """Whether calling ``module`` does more than its forward."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def foldable(module: nn.Module | None) -> bool:
    """Whether ``module`` computes exactly nn.BatchNorm2d; subclasses (as SyncBatchNorm) and hooked modules run as they are."""
    return type(module) is nn.BatchNorm2d and not has_hooks(module)


class Folding:
    """The normalisations of one forward pass by implementation ``impl``, and the running updates that they owe at its end."""

    def __init__(self, impl: str) -> None:
        self.impl = impl
        self._updates: list[RunningUpdate] = []

    def fold(
        self, module: nn.Module | None, x: Tensor, module_name: str, x_name: str, copies: int = 1
    ) -> tuple[Tensor, Normalisation | None]:
        """The map to be read in place of ``module(x)``, and the affine map to be applied while it is read.

        That is ``x`` itself where ``module`` can be folded in; any other module (SyncBatchNorm, hooks) runs as it is.

        Args:
            module: a normalisation; None where ``x`` is not normalised.
            x: (N, C, H, W).
            module_name, x_name: what messages call the two.
            copies: how many times each element of ``x`` counts in the unbiased variance (4 where the original normalises a
                map that was up-sampled twofold first).
        """
        if module is None:
            return x, None
        if not foldable(module):
            return _applied(module, x, module_name, x_name), None
        assert isinstance(module, nn.BatchNorm2d)
        if module.num_features != x.shape[1]:
            raise ValueError(
                f"{module_name} has {module.num_features} channels, but {x_name} has {x.shape[1]} and the same number was "
                "wanted."
            )
        return x, self._normalisation_of(module, x, copies)

    def finish(self) -> None:
        """Make the updates of running statistics."""
        update_running_statistics(self._updates)
        self._updates = []

    def _normalisation_of(self, batch_norm: nn.BatchNorm2d, x: Tensor, copies: int) -> Normalisation:
        dtype = accumulate_dtype(x.dtype)
        gamma = batch_norm.weight.to(dtype) if batch_norm.weight is not None else x.new_ones(x.shape[1], dtype=dtype)
        beta = batch_norm.bias.to(dtype) if batch_norm.bias is not None else x.new_zeros(x.shape[1], dtype=dtype)
        if not batch_norm.training and batch_norm.running_mean is not None:
            assert batch_norm.running_var is not None
            mean, variance = batch_norm.running_mean.to(dtype), batch_norm.running_var.to(dtype)
            return Normalisation(torch.stack([mean, torch.rsqrt(variance + batch_norm.eps)]), gamma, beta, False)
        elements = x.shape[0] * x.shape[2] * x.shape[3] * copies
        if elements <= 1:
            raise ValueError(
                f"a BatchNorm in training mode got an input of shape {tuple(x.shape)}, but more than one value per channel was "
                "wanted; use a larger batch, or eval()."
            )
        if _dispatch.is_plain(self.impl):
            statistics = reference.batch_statistics(x, batch_norm.eps)
        else:
            statistics = batch_statistics([x.detach()], [batch_norm.eps], self.impl)[0]
        if batch_norm.training and batch_norm.track_running_stats and batch_norm.running_mean is not None:
            self._updates.append(RunningUpdate(batch_norm, statistics.detach(), elements))
        return Normalisation(statistics, gamma, beta, True)


def _applied(module: nn.Module, x: Tensor, module_name: str, x_name: str) -> Tensor:
    """A normalisation that cannot be folded in, applied as it is."""
    if not isinstance(module, nn.Module):
        raise TypeError(f"{module_name} is a {type(module).__name__}, but a torch.nn.Module or None was wanted.")
    out = module(x)
    if not isinstance(out, Tensor) or out.shape != x.shape:
        came = f"a map of shape {tuple(out.shape)}" if isinstance(out, Tensor) else f"a {type(out).__name__}"
        raise ValueError(
            f"{module_name} made {came} of {x_name}, but its own shape {tuple(x.shape)} was wanted; pass a module that only "
            "normalises."
        )
    # Under autocast some normalisations give float32 for a half-precision map.
    return out.to(x.dtype)


@torch.no_grad()
def update_running_statistics(updates: Sequence[RunningUpdate]) -> None:
    """running = (1 - momentum) * running + momentum * batch for mean and unbiased variance, as nn.BatchNorm2d does.

    All the updates of a forward pass together take three calls. They stand apart from the nodes, which are computed again in
    backward.
    """
    if len({id(update.batch_norm) for update in updates}) < len(updates):
        # A module that serves several inputs has to make its updates one after the other.
        for update in updates:
            update_running_statistics([update])
        return
    means, variances, counters = [], [], []
    new_means, new_variances = [], []
    momenta = {update.batch_norm.momentum for update in updates}
    for batch_norm, statistics, elements in updates:
        assert batch_norm.running_mean is not None and batch_norm.running_var is not None
        means.append(batch_norm.running_mean)
        variances.append(batch_norm.running_var)
        new_means.append(statistics[0].to(batch_norm.running_mean.dtype))
        new_variances.append((statistics[2] * (elements / max(elements - 1, 1))).to(batch_norm.running_var.dtype))
        if batch_norm.num_batches_tracked is not None:
            counters.append(batch_norm.num_batches_tracked)
    if counters:
        torch._foreach_add_(counters, 1)
    momentum = momenta.pop() if len(momenta) == 1 else None
    if momentum is not None:
        torch._foreach_lerp_(means, new_means, momentum)
        torch._foreach_lerp_(variances, new_variances, momentum)
        return
    for update, mean, variance, new_mean, new_variance in zip(
        updates, means, variances, new_means, new_variances, strict=True
    ):
        batch_norm = update.batch_norm
        if batch_norm.momentum is None:
            # The average of all batches so far; the counter stays on its device.
            assert batch_norm.num_batches_tracked is not None
            share = batch_norm.num_batches_tracked.to(mean.dtype).reciprocal()
            mean.add_((new_mean - mean) * share)
            variance.add_((new_variance - variance) * share)
        else:
            mean.lerp_(new_mean, batch_norm.momentum)
            variance.lerp_(new_variance, batch_norm.momentum)
