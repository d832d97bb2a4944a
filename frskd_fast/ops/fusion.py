"""Operation ``fusion``: a weighted sum of feature maps (a BiFPN node) with BatchNorm, resampling and activations folded in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from frskd_fast import _dispatch
from frskd_fast.ops import _checks, _library
from frskd_fast.ops._autograd import once_differentiable
from frskd_fast.reference import fusion as reference
from frskd_fast.reference.dtypes import accumulate_dtype

DEAD_NODES = ("zero", "uniform")
MOST_INPUTS = 4


class Settings(NamedTuple):
    """The numbers of one node; all plain Python, so that a traced graph holds them as constants."""

    resamples: tuple[int, ...]
    pre: int
    act: int
    weighting: int
    epsilon: float


def raw_statistics(inputs: Sequence[Tensor], epsilons: Sequence[float], impl: str) -> list[Tensor]:
    """(3, C) for each input: mean, 1 / sqrt(variance + epsilon), biased variance."""
    statistics: list[Tensor] = _dispatch.raw("fusion", impl).batch_statistics(inputs, epsilons)
    return statistics


def raw_forward(
    inputs: Sequence[Tensor],
    statistics: Sequence[Tensor],
    gammas: Sequence[Tensor],
    betas: Sequence[Tensor],
    weight: Tensor,
    resamples: Sequence[int],
    pre: int,
    act: int,
    weighting: int,
    epsilon: float,
    size: Sequence[int],
    impl: str,
    depthwise: Tensor | None = None,
) -> Tensor:
    """The fused map by implementation ``impl``, or its depthwise convolution (``convolves_fused_map``)."""
    _dispatch.record("fusion", impl)
    convolution = () if depthwise is None else (depthwise,)
    out: Tensor = _dispatch.raw("fusion", impl).forward(
        inputs, statistics, gammas, betas, weight, resamples, pre, act, weighting, epsilon, size, *convolution
    )
    return out


def raw_backward(
    grad: Tensor,
    inputs: Sequence[Tensor],
    statistics: Sequence[Tensor],
    gammas: Sequence[Tensor],
    betas: Sequence[Tensor],
    weight: Tensor,
    resamples: Sequence[int],
    pre: int,
    act: int,
    weighting: int,
    epsilon: float,
    trains: Sequence[bool],
    need_inputs: Sequence[bool],
    need_weight: bool,
    impl: str,
    depthwise: Tensor | None = None,
) -> list[Tensor]:
    """Gradients of the needed inputs, then gradients of gamma and beta of each normalised input, then the weight's (or empty).

    ``trains[i]`` says that the statistics of input i are those of this batch and depend on it. With ``depthwise``, ``grad`` is
    the gradient of the fused map's convolution, and the gradient of ``depthwise`` comes last.
    """
    raw = _dispatch.raw("fusion", impl)
    node = (inputs, statistics, gammas, betas, weight)
    settings = (resamples, pre, act, weighting, epsilon)
    weight_gradient = weight.new_empty(0)
    sums = [weight_gradient] * len(inputs)
    normalised = [statistic.numel() > 0 for statistic in statistics]
    depthwise_gradient: list[Tensor] = []
    if depthwise is not None:
        depthwise_gradient = [torch.empty_like(depthwise)]
        map_gradient = torch.empty_like(grad)
        found = raw.backward_sums(grad, *node, *settings, depthwise, *depthwise_gradient, map_gradient)
        (sums, weight_gradient), grad, need_weight = found, map_gradient, False
    elif any(normalised):
        sums, weight_gradient = raw.backward_sums(grad, *node, *settings)
        need_weight = False
    used = [s if trained else weight.new_empty(0) for s, trained in zip(sums, trains, strict=True)]
    gradients: list[Tensor] = []
    if need_weight or any(need_inputs):
        gradients, found = raw.backward(grad, *node, used, *settings, need_inputs, need_weight)
        weight_gradient = found if need_weight else weight_gradient
    for s, is_normalised in zip(sums, normalised, strict=True):
        if is_normalised:
            gradients += [s[1].clone(), s[0].clone()]
    return [*gradients, weight_gradient, *depthwise_gradient]


def _fake_statistics(inputs: Sequence[Tensor], epsilons: Sequence[float], impl: str) -> list[Tensor]:
    return [x.new_empty((3, x.shape[1]), dtype=accumulate_dtype(x.dtype)) for x in inputs]


def _fake_forward(
    inputs: Sequence[Tensor],
    statistics: Sequence[Tensor],
    gammas: Sequence[Tensor],
    betas: Sequence[Tensor],
    weight: Tensor,
    resamples: Sequence[int],
    pre: int,
    act: int,
    weighting: int,
    epsilon: float,
    size: Sequence[int],
    impl: str,
    depthwise: Tensor | None = None,
) -> Tensor:
    return reference.empty_output(inputs[0], size)


def _fake_backward(
    grad: Tensor,
    inputs: Sequence[Tensor],
    statistics: Sequence[Tensor],
    gammas: Sequence[Tensor],
    betas: Sequence[Tensor],
    weight: Tensor,
    resamples: Sequence[int],
    pre: int,
    act: int,
    weighting: int,
    epsilon: float,
    trains: Sequence[bool],
    need_inputs: Sequence[bool],
    need_weight: bool,
    impl: str,
    depthwise: Tensor | None = None,
) -> list[Tensor]:
    gradients = [torch.empty_like(x) for x, needed in zip(inputs, need_inputs, strict=True) if needed]
    normalised = [gamma for gamma in gammas if gamma.numel() > 0]
    for gamma in normalised:
        gradients += [torch.empty_like(gamma), torch.empty_like(gamma)]
    depthwise_gradient = [] if depthwise is None else [torch.empty_like(depthwise)]
    found = need_weight or normalised or depthwise is not None
    return [*gradients, torch.empty_like(weight) if found else weight.new_empty(0), *depthwise_gradient]


_NODE = "Tensor[] inputs, Tensor[] statistics, Tensor[] gammas, Tensor[] betas, Tensor weight"
_SETTINGS = "int[] resamples, int pre, int act, int weighting, float epsilon"
_statistics_operator = _library.register(
    "fusion_statistics(Tensor[] inputs, float[] epsilons, str impl) -> Tensor[]", raw_statistics, _fake_statistics
)
_forward_operator = _library.register(
    f"fusion_forward({_NODE}, {_SETTINGS}, SymInt[] size, str impl, Tensor? depthwise=None) -> Tensor",
    raw_forward,
    _fake_forward,
)
_backward_operator = _library.register(
    f"fusion_backward(Tensor grad, {_NODE}, {_SETTINGS}, bool[] trains, bool[] need_inputs, bool need_weight, str impl, "
    "Tensor? depthwise=None) -> Tensor[]",
    raw_backward,
    _fake_backward,
)


def _forward_call(*args: Any) -> Tensor:
    """``raw_forward``, through the registered operator while tracing."""
    out: Tensor = _forward_operator(*args) if torch.compiler.is_compiling() else raw_forward(*args)
    return out


def _backward_call(*args: Any) -> list[Tensor]:
    """``raw_backward``, through the registered operator while tracing."""
    found: list[Tensor] = _backward_operator(*args) if torch.compiler.is_compiling() else raw_backward(*args)
    return found


def _node(
    normalised: Sequence[bool], weight: Tensor, tensors: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor], Tensor]:
    """Inputs, statistics, gammas and betas (empty where an input is not normalised) and the weight."""
    count = len(normalised)
    inputs, rest = list(tensors[:count]), iter(tensors[count:])
    empty = weight.new_empty(0)
    channels = [[next(rest) for _ in range(3)] if is_normalised else [empty] * 3 for is_normalised in normalised]
    statistics, gammas, betas = ([entry[k] for entry in channels] for k in range(3))
    return inputs, statistics, gammas, betas, weight


def weight_gradient(x: Tensor, grad: Tensor, weight: Tensor) -> Tensor:
    """d loss / d weight of a 1x1 convolution: grad^T x over all pixels, (out, in, 1, 1)."""
    rows_of = (tensor.permute(0, 2, 3, 1) for tensor in (x, grad))
    x_rows, grad_rows = (rows.reshape(-1, rows.shape[3]) for rows in rows_of)
    return torch.mm(grad_rows.t(), x_rows).view(weight.shape)


def pointwise_backward(
    x: Tensor, weight: Tensor, grad: Tensor, need_x: bool, need_weight: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of a 1x1 convolution.

    On a CPU the matrix product of channels_last maps is up to 1.5 times as fast as the convolution's own weight gradient.
    """
    channels_last = x.is_contiguous(memory_format=torch.channels_last)
    product = need_weight and x.device.type == "cpu" and channels_last
    x_gradient, by_convolution = None, None
    if need_x or (need_weight and not product):
        x_gradient, by_convolution, _ = torch.ops.aten.convolution_backward(
            grad,
            x,
            weight,
            None,
            [1, 1],
            [0, 0],
            [1, 1],
            False,
            [0, 0],
            1,
            [need_x, need_weight and not product, False],
        )
    return x_gradient, weight_gradient(x, grad, weight) if product else by_convolution


def _convolved(x: Tensor, weight: Tensor) -> Tensor:
    """A depthwise 3x3 convolution by (C, 1, 3, 3), or a pointwise one by (out, C, 1, 1)."""
    if weight.shape[2] == 1:
        return torch.nn.functional.conv2d(x, weight)
    return torch.nn.functional.conv2d(x, weight, padding=1, groups=x.shape[1])


def _convolution_backward(
    x: Tensor, weight: Tensor, grad: Tensor, need_weight: bool
) -> tuple[Tensor | None, Tensor | None]:
    if weight.shape[2] == 1:
        return pointwise_backward(x, weight, grad, True, need_weight)
    x_gradient, gradient, _ = torch.ops.aten.convolution_backward(
        grad, x, weight, None, [1, 1], [1, 1], [1, 1], False, [0, 0], x.shape[1], [True, need_weight, False]
    )
    return x_gradient, gradient


def _holds_whole_pixels(x: Tensor) -> bool:
    """Whether the channels of each pixel lie together, as in channels_last and in slices of its channels."""
    channels, height, width = x.shape[1:]
    # No generator: PyTorch 2.14 does not trace one whose comparisons need a guard.
    nested = (height == 1 or x.stride(2) >= channels) and (width == 1 or x.stride(3) >= channels)
    return not x.is_contiguous() and channels > 1 and x.stride(1) == 1 and nested


def convolves_fused_map(inputs: Sequence[Tensor], settings: Settings, convolution: Tensor, impl: str) -> bool:
    """Whether the node's kernel applies a depthwise ``convolution`` itself, to rows that never leave the cache.

    The CPU kernels do, to maps in channels_last; then the fused map is never written, in either direction.
    """
    depthwise = convolution.shape[2] == 3 and settings.act == reference.ACTIVATIONS.index("none")
    return impl == "cpu" and depthwise and all(map(_holds_whole_pixels, inputs))


class _Fusion(torch.autograd.Function):
    """Saves the inputs as they came (raw convolution outputs where BatchNorm is folded in) and a few numbers per channel.

    With a convolution behind it, the fused map is not kept: fusing again costs less than its memory.
    """

    @staticmethod
    def forward(
        ctx: Any,
        normalised: tuple[bool, ...],  # for each input
        settings: Settings,
        size: tuple[int, int],
        trains: tuple[bool, ...],
        impl: str,
        convolution: Tensor | None,  # (C, 1, 3, 3) or (out, C, 1, 1)
        weight: Tensor,
        *tensors: Tensor,  # the inputs, then statistics, gamma and beta of each normalised one
    ) -> Tensor:
        node = _node(normalised, weight, tensors)
        ctx.save_for_backward(weight, convolution, *tensors)
        ctx.settings = (normalised, settings, size, trains, impl)
        if convolution is not None and convolves_fused_map(node[0], settings, convolution, impl):
            return _forward_call(*node, *settings, size, impl, convolution.to(weight.dtype).contiguous())
        out = _forward_call(*node, *settings, size, impl)
        return out if convolution is None else _convolved(out, convolution)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        normalised, settings, size, trains, impl = ctx.settings
        weight, convolution, *tensors = ctx.saved_tensors
        node = _node(normalised, weight, tensors)
        need_convolution, need_weight, *need_tensors = ctx.needs_input_grad[5:]
        need_inputs = need_tensors[: len(normalised)]
        convolution_gradient = None
        depthwise: tuple[Tensor, ...] = ()
        if convolution is not None and convolves_fused_map(node[0], settings, convolution, impl):
            depthwise = (convolution.to(weight.dtype).contiguous(),)
            if not _holds_whole_pixels(grad):
                grad = grad.contiguous(memory_format=torch.channels_last)
        elif convolution is not None:
            fused = _forward_call(*node, *settings, size, impl)
            x_gradient, convolution_gradient = _convolution_backward(fused, convolution, grad, need_convolution)
            assert x_gradient is not None
            grad = x_gradient
        found = iter(_backward_call(grad, *node, *settings, trains, need_inputs, need_weight, impl, *depthwise))
        gradients: list[Tensor | None] = [next(found) if needed else None for needed in need_inputs]
        for is_normalised in normalised:
            gradients += [None, next(found), next(found)] if is_normalised else []
        weight_gradient = next(found)
        if depthwise and need_convolution:
            convolution_gradient = next(found).to(convolution.dtype)
        return (*[None] * 5, convolution_gradient, weight_gradient if need_weight else None, *gradients)


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


def has_hooks(module: nn.Module) -> bool:
    """Whether calling ``module`` does more than its forward."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def foldable(module: nn.Module | None) -> bool:
    """Whether ``module`` computes exactly nn.BatchNorm2d; subclasses (as SyncBatchNorm) and hooked modules run as they are."""
    return type(module) is nn.BatchNorm2d and not has_hooks(module)


def normalisation_of(
    batch_norm: nn.BatchNorm2d, x: Tensor, impl: str, copies: int = 1
) -> tuple[Normalisation, RunningUpdate | None]:
    """The affine map that ``batch_norm`` applies to ``x``, and the update of its running statistics that is still to be made.

    ``copies``: how many times each element of ``x`` counts in the unbiased variance (4 where the original normalises a map that
    was up-sampled twofold first).
    """
    dtype = accumulate_dtype(x.dtype)
    ones = batch_norm.weight.to(dtype) if batch_norm.weight is not None else x.new_ones(x.shape[1], dtype=dtype)
    zeros = batch_norm.bias.to(dtype) if batch_norm.bias is not None else x.new_zeros(x.shape[1], dtype=dtype)
    trains = batch_norm.training or batch_norm.running_mean is None
    if not trains:
        mean, variance = batch_norm.running_mean, batch_norm.running_var
        assert mean is not None and variance is not None
        statistics = torch.stack([mean.to(dtype), torch.rsqrt(variance.to(dtype) + batch_norm.eps)])
        return Normalisation(statistics, ones, zeros, False), None
    count = x.shape[0] * x.shape[2] * x.shape[3]
    if count * copies <= 1:
        raise ValueError(
            f"a BatchNorm in training mode got an input of shape {tuple(x.shape)}, but more than one value per channel was "
            "wanted; use a larger batch, or eval()."
        )
    if impl == "reference":
        statistics = reference.batch_statistics(x, batch_norm.eps)
    elif torch.compiler.is_compiling():
        statistics = _statistics_operator([x.detach()], [batch_norm.eps], impl)[0]
    else:
        statistics = raw_statistics([x.detach()], [batch_norm.eps], impl)[0]
    update = None
    if batch_norm.training and batch_norm.track_running_stats and batch_norm.running_mean is not None:
        update = RunningUpdate(batch_norm, statistics.detach(), count * copies)
    return Normalisation(statistics, ones, zeros, True), update


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


def fuse(
    inputs: Sequence[Tensor],
    normalisations: Sequence[Normalisation | None],
    weight: Tensor,  # (K,), of accumulate dtype
    settings: Settings,
    size: tuple[int, int],
    impl: str,
    convolution: Tensor | None = None,  # (C, 1, 3, 3) or (out, C, 1, 1)
) -> Tensor:
    """The node by implementation ``impl``, then its convolution if one is given; the arguments are already checked."""
    statistics = [None if n is None else n.statistics for n in normalisations]
    gammas = [None if n is None else n.gamma for n in normalisations]
    betas = [None if n is None else n.beta for n in normalisations]
    if impl == "reference":
        if not torch.compiler.is_compiling():
            _dispatch.record("fusion", impl)
        fused = reference.fuse(
            inputs,
            statistics,
            gammas,
            betas,
            weight,
            [reference.RESAMPLES[resample] for resample in settings.resamples],
            reference.ACTIVATIONS[settings.pre],
            reference.ACTIVATIONS[settings.act],
            reference.WEIGHTINGS[settings.weighting],
            settings.epsilon,
            size,
        )
        return fused if convolution is None else _convolved(fused, convolution)
    normalised = tuple(normalisation is not None for normalisation in normalisations)
    trains = tuple(n is not None and n.trains for n in normalisations)
    # An autograd.Function that torch.compile traces may get no tensor twice.
    distinct = [x.view_as(x) if any(x is other for other in inputs[:k]) else x for k, x in enumerate(inputs)]
    channels = [tensor for n in normalisations if n is not None for tensor in (n.statistics, n.gamma, n.beta)]
    if convolution is not None:
        convolution = convolution.to(inputs[0].dtype)
    out: Tensor = _Fusion.apply(normalised, settings, size, trains, impl, convolution, weight, *distinct, *channels)
    return out


def _applied(module: Any, x: Tensor, position: int) -> Tensor:
    """A normalisation that cannot be folded in, applied as it is."""
    if not isinstance(module, nn.Module):
        raise TypeError(
            f"batch_norms[{position}] is a {type(module).__name__}, but a torch.nn.Module or None was wanted."
        )
    out = module(x)
    if not isinstance(out, Tensor) or out.shape != x.shape:
        came = f"a map of shape {tuple(out.shape)}" if isinstance(out, Tensor) else f"a {type(out).__name__}"
        raise ValueError(
            f"batch_norms[{position}] made {came} of inputs[{position}], but its own shape {tuple(x.shape)} was wanted; pass a "
            "module that only normalises."
        )
    # Under autocast a GroupNorm, say, gives float32 for a half-precision map.
    return out.to(x.dtype)


def _names(names: tuple[str, ...]) -> str:
    return ", ".join(map(repr, names))


def _position(value: Any, names: tuple[str, ...], argument: str) -> int:
    if value not in names:
        raise ValueError(f"{argument} is {value!r}, but one of {_names(names)} was wanted.")
    return names.index(value)


def _checked_size(maps: Sequence[Tensor], resample: Sequence[str], size: Any) -> tuple[int, int]:
    """(H, W) of the output: ``size``, else that of the first input that is not up-sampled."""
    if size is not None:
        if (
            not isinstance(size, Sequence)
            or len(size) != 2
            or not all(isinstance(side, int | torch.SymInt) and side > 0 for side in size)
        ):
            raise ValueError(f"size is {size!r}, but two positive integers (height, width) were wanted.")
        wanted = (size[0], size[1])
    else:
        for x, name in zip(maps, resample, strict=True):
            if name != "up":
                height, width = x.shape[2:] if name == "none" else reference.pooled_size(x.shape[2:])
                wanted = (height, width)
                break
        else:
            raise ValueError("every input is up-sampled, so the output's size is unknown; pass size=(height, width).")
    for position, (x, name) in enumerate(zip(maps, resample, strict=True)):
        given = tuple(x.shape[2:])
        if name == "up":
            if given[0] > wanted[0] or given[1] > wanted[1]:
                raise ValueError(
                    f"inputs[{position}] has {given} pixels and is to be up-sampled, but at most {wanted}, the output's, were "
                    "wanted; pool it, or pass another size."
                )
        elif (given if name == "none" else reference.pooled_size(given)) != wanted:
            what = "unchanged" if name == "none" else "halved by pooling (rounded up)"
            raise ValueError(
                f"inputs[{position}] has {given} pixels, {what}, but the output has {wanted} and equal sizes were wanted; set "
                f"resample[{position}] to 'up' or 'pool', or resize it first."
            )
    return wanted


def checked_maps(inputs: Any) -> list[Tensor]:
    """The inputs as a list of one to four feature maps of one batch, channel count, dtype and device."""
    if isinstance(inputs, Tensor) or not isinstance(inputs, Sequence):
        raise TypeError(f"inputs is a {type(inputs).__name__}, but a list of feature maps (N, C, H, W) was wanted.")
    if not 1 <= len(inputs) <= MOST_INPUTS:
        raise ValueError(f"inputs has {len(inputs)} maps, but 1 to {MOST_INPUTS} were wanted; fuse more in two steps.")
    maps = [_checks.feature_map(x, f"inputs[{position}]") for position, x in enumerate(inputs)]
    for position, x in enumerate(maps[1:], 1):
        _checks.same(maps[0], "inputs[0]", x, f"inputs[{position}]")
        if x.shape[:2] != maps[0].shape[:2]:
            raise ValueError(
                f"inputs[{position}] has shape {tuple(x.shape)}, but the batch and channels of inputs[0], "
                f"{tuple(maps[0].shape[:2])}, were wanted; bring it to that width by a 1x1 convolution."
            )
    return maps


def weighted_fusion(
    inputs: Any,
    weight: Any,
    resample: Any,
    pre: str,
    act: str,
    weighting: str,
    epsilon: float,
    dead_node: str,
    size: Any,
    batch_norms: Any,
    impl: str,
) -> Tensor:
    """Checks, choice of implementation and autograd of ``functional.weighted_fusion``."""
    maps = checked_maps(inputs)
    if resample is not None and (isinstance(resample, str) or not isinstance(resample, Sequence)):
        raise TypeError(
            f"resample is {resample!r}, but a list with one of {_names(reference.RESAMPLES)} per input was wanted."
        )
    if batch_norms is not None and not isinstance(batch_norms, Sequence | nn.ModuleList):
        raise TypeError(
            f"batch_norms is a {type(batch_norms).__name__}, but a list with a module or None for each input was wanted."
        )
    resample = ["none"] * len(maps) if resample is None else list(resample)
    if len(resample) != len(maps):
        raise ValueError(
            f"resample has {len(resample)} entries, but one for each of the {len(maps)} inputs was wanted."
        )
    positions = tuple(_position(name, reference.RESAMPLES, f"resample[{k}]") for k, name in enumerate(resample))
    if weighting == "relu_or_uniform":
        raise ValueError(
            "weighting is 'relu_or_uniform', but 'sum', 'relu' or 'softmax' was wanted; pass dead_node='uniform'."
        )
    weighting_position = _position(weighting, reference.WEIGHTINGS, "weighting")
    if _position(dead_node, DEAD_NODES, "dead_node") == 1 and weighting == "relu":
        weighting_position = reference.WEIGHTINGS.index("relu_or_uniform")
    settings = Settings(
        positions,
        _position(pre, reference.ACTIVATIONS, "pre"),
        _position(act, reference.ACTIVATIONS, "act"),
        weighting_position,
        _checks.finite_number(epsilon, "epsilon"),
    )
    if settings.epsilon < 0:
        raise ValueError(f"epsilon is {settings.epsilon}, but 0 or more was wanted.")
    dtype = accumulate_dtype(maps[0].dtype)
    if weight is None:
        if weighting != "sum":
            raise ValueError(f"weight is None, but {len(maps)} numbers were wanted; or pass weighting='sum'.")
        weight = maps[0].new_ones(len(maps), dtype=dtype)
    weight = _checks.floating_tensor(weight, "weight")
    if tuple(weight.shape) != (len(maps),):
        raise ValueError(
            f"weight has shape {tuple(weight.shape)}, but ({len(maps)},), one number for each input, was wanted."
        )
    if weight.device != maps[0].device:
        raise ValueError(
            f"weight is on {weight.device}, but inputs[0] is on {maps[0].device} and one device was wanted."
        )
    out_size = _checked_size(maps, resample, size)
    form = next((known for known in ("pool", "up") if known in resample), "none")
    name = _dispatch.choose_for("fusion", impl, maps[0], form)
    folded = [None] * len(maps) if batch_norms is None else list(batch_norms)
    if len(folded) != len(maps):
        raise ValueError(
            f"batch_norms has {len(folded)} entries, but a module or None for each of the {len(maps)} inputs was wanted."
        )
    normalisations: list[Normalisation | None] = []
    updates: list[RunningUpdate] = []
    for position, module in enumerate(folded):
        normalisation = None
        if isinstance(module, nn.BatchNorm2d) and foldable(module):
            if module.num_features != maps[position].shape[1]:
                raise ValueError(
                    f"batch_norms[{position}] has {module.num_features} channels, but inputs[{position}] has "
                    f"{maps[position].shape[1]} and the same number was wanted."
                )
            normalisation, update = normalisation_of(module, maps[position], name)
            updates += [] if update is None else [update]
        elif module is not None:
            maps[position] = _applied(module, maps[position], position)
        normalisations.append(normalisation)
    out = fuse(maps, normalisations, weight.to(dtype).contiguous(), settings, out_size, name)
    update_running_statistics(updates)
    return out
