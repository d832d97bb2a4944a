"""Operation ``fusion``: a weighted sum of feature maps (a BiFPN node) with BatchNorm and resampling folded in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from frskd_fast import _dispatch
from frskd_fast.ops import _checks, _table, fused_convolution
from frskd_fast.ops._autograd import once_differentiable
from frskd_fast.ops.batch_norm import Folding, Normalisation, foldable
from frskd_fast.ops.convolution import convolution_backward, convolved
from frskd_fast.reference import fusion as reference
from frskd_fast.reference.dtypes import accumulate_dtype
from frskd_fast.reference.fusion import Node, Settings

MOST_INPUTS = 4


# The raw functions of docs/contracts.md, with the implementation's name as the last argument.


@_table.register("fusion")
def forward(node: Node, settings: Settings, size: Sequence[int], impl: str) -> Tensor:
    """The fused map (N, C, H, W) of ``size`` (H, W)."""
    return reference.empty_output(node.inputs[0], size)


@_table.register("fusion")
def backward_sums(grad: Tensor, node: Node, settings: Settings, impl: str) -> tuple[list[Tensor], Tensor]:
    """For each normalised input (2, C), sums of dy and dy * xhat; and the weights' gradient (K,)."""
    return fused_convolution.empty_sums(node), torch.empty_like(node.weight)


@_table.register("fusion")
def backward(
    grad: Tensor,
    node: Node,
    sums: Sequence[Tensor],
    settings: Settings,
    need_inputs: Sequence[bool],
    need_weight: bool,
    impl: str,
) -> tuple[list[Tensor], Tensor]:
    """Gradients of the needed inputs; and the weights' gradient (K,), or empty."""
    gradients = [torch.empty_like(x) for x, needed in zip(node.inputs, need_inputs, strict=True) if needed]
    return gradients, torch.empty_like(node.weight) if need_weight else node.weight.new_empty(0)


def _node(normalised: Sequence[bool], weight: Tensor, tensors: Sequence[Tensor]) -> Node:
    """From the inputs, then statistics, gamma and beta of each normalised one."""
    count = len(normalised)
    inputs, rest, empty = list(tensors[:count]), iter(tensors[count:]), weight.new_empty(0)
    channels = [[next(rest) for _ in range(3)] if is_normalised else [empty] * 3 for is_normalised in normalised]
    statistics, gammas, betas = ([entry[k] for entry in channels] for k in range(3))
    return Node(inputs, statistics, gammas, betas, weight)


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
        trains: tuple[bool, ...],  # whether an input's statistics are those of this batch and depend on it
        impl: str,
        convolution: Tensor | None,  # (C, 1, 3, 3) or (out, C, 1, 1)
        weight: Tensor,
        *tensors: Tensor,  # the inputs, then statistics, gamma and beta of each normalised one
    ) -> Tensor:
        node = _node(normalised, weight, tensors)
        in_one_pass = convolution is not None and fused_convolution.serves(node, convolution, impl)
        ctx.save_for_backward(weight, convolution, *tensors)
        ctx.settings = (normalised, settings, size, trains, impl, in_one_pass)
        out: Tensor
        if convolution is not None and in_one_pass:
            out = fused_convolution.forward(node, settings, size, fused_convolution.prepared(convolution, node), impl)
            return out
        out = forward(node, settings, size, impl)
        return out if convolution is None else convolved(out, convolution)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        normalised, settings, size, trains, impl, in_one_pass = ctx.settings
        weight, convolution, *tensors = ctx.saved_tensors
        node = _node(normalised, weight, tensors)
        need_convolution, need_weight, *need_tensors = ctx.needs_input_grad[5:]
        need_inputs = need_tensors[: len(normalised)]
        convolution_gradient: Tensor | None = None
        weight_gradient: Tensor | None = None
        sums = [weight.new_empty(0)] * len(normalised)
        if in_one_pass:
            grad = fused_convolution.with_whole_pixels(grad)
            depthwise = fused_convolution.prepared(convolution, node)
            sums, weight_gradient, convolution_gradient, grad = fused_convolution.backward_sums(
                grad, node, settings, depthwise, impl
            )
            convolution_gradient = convolution_gradient.to(convolution.dtype)
        elif convolution is not None:
            fused = forward(node, settings, size, impl)
            grad, convolution_gradient = convolution_backward(fused, convolution, grad, need_convolution)
        if weight_gradient is None and any(normalised):
            sums, weight_gradient = backward_sums(grad, node, settings, impl)
        gradients: list[Tensor] = []
        weight_follows = need_weight and weight_gradient is None
        if weight_follows or any(need_inputs):
            used = [s if trained else weight.new_empty(0) for s, trained in zip(sums, trains, strict=True)]
            gradients, found = backward(grad, node, used, settings, need_inputs, weight_follows, impl)
            weight_gradient = found if weight_follows else weight_gradient
        of_inputs, of_tensors = iter(gradients), []
        for needed in need_inputs:
            of_tensors.append(next(of_inputs) if needed else None)
        for s, is_normalised in zip(sums, normalised, strict=True):
            of_tensors += [None, s[1].clone(), s[0].clone()] if is_normalised else []
        return (
            *[None] * 5,
            convolution_gradient if need_convolution else None,
            weight_gradient if need_weight else None,
            *of_tensors,
        )


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
    normalised = tuple(normalisation is not None for normalisation in normalisations)
    channels = [tensor for n in normalisations if n is not None for tensor in (n.statistics, n.gamma, n.beta)]
    if _dispatch.is_plain(impl):
        _dispatch.record("fusion", impl)
        fused = reference.fuse(_node(normalised, weight, [*inputs, *channels]), settings, size)
        return fused if convolution is None else convolved(fused, convolution)
    trains = tuple(n is not None and n.trains for n in normalisations)
    # An autograd.Function that torch.compile traces may get no tensor twice.
    distinct = [x.view_as(x) if any(x is other for other in inputs[:k]) else x for k, x in enumerate(inputs)]
    if convolution is not None:
        convolution = convolution.to(inputs[0].dtype)
    out: Tensor = _Fusion.apply(normalised, settings, size, trains, impl, convolution, weight, *distinct, *channels)
    return out


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


def _form(resample: Sequence[str], batch_norms: Sequence[Any]) -> str:
    """What kind of node it is, in the words of `_dispatch.TABLE`: "pool", "up" or "none", and whether it has BatchNorms."""
    kind = next((name for name in ("pool", "up") if name in resample), "none")
    return f"batch-norm {kind}" if any(map(foldable, batch_norms)) else kind


def weighted_fusion(
    inputs: Any,
    weight: Any,
    resample: Any,
    pre: str,
    weighting: str,
    epsilon: float,
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
    settings = Settings(
        tuple(_position(name, reference.RESAMPLES, f"resample[{k}]") for k, name in enumerate(resample)),
        _position(pre, reference.ACTIVATIONS, "pre"),
        _position(weighting, reference.WEIGHTINGS, "weighting"),
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
    modules = [None] * len(maps) if batch_norms is None else list(batch_norms)
    if len(modules) != len(maps):
        raise ValueError(
            f"batch_norms has {len(modules)} entries, but a module or None for each of the {len(maps)} inputs was wanted."
        )
    name = _dispatch.choose_for("fusion", impl, maps[0], _form(resample, modules))
    folding = Folding(name)
    folded = [
        folding.fold(module, x, f"batch_norms[{k}]", f"inputs[{k}]")
        for k, (module, x) in enumerate(zip(modules, maps, strict=True))
    ]
    maps, normalisations = [x for x, _ in folded], [normalisation for _, normalisation in folded]
    out = fuse(maps, normalisations, weight.to(dtype).contiguous(), settings, out_size, name)
    folding.finish()
    return out
