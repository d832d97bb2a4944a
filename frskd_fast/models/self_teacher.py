"""The self-teachers of FRSKD, computed at the cost of their arithmetic.

Parameters, keys and results are those of the plain form in `frskd_fast.reference.self_teacher`; docs/self_teacher.md derives
each step that is saved. Ji et al., CVPR 2021 (arXiv 2103.08273), section 3.1; Tan et al., CVPR 2020.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from frskd_fast import _dispatch
from frskd_fast.ops import fusion
from frskd_fast.ops._checks import check_positive_integer
from frskd_fast.ops.batch_norm import Folding, Normalisation, foldable, has_hooks
from frskd_fast.ops.convolution import pointwise_backward
from frskd_fast.reference import fusion as fusion_reference
from frskd_fast.reference import self_teacher as reference
from frskd_fast.reference.dtypes import accumulate_dtype

from ._checks import check_features

RELU = fusion_reference.ACTIVATIONS.index("relu")
NONE = fusion_reference.ACTIVATIONS.index("none")
NODE_WEIGHTING = fusion_reference.WEIGHTINGS.index("relu")
NO_WEIGHTING = fusion_reference.WEIGHTINGS.index("sum")
UNCHANGED, UP, POOL = (fusion_reference.RESAMPLES.index(name) for name in ("none", "up", "pool"))


class Branch:
    """A map that is still to be normalised and rectified: relu(batch_norm(raw)), or relu(raw) without a BatchNorm.

    The statistics of a batch are taken once, however many nodes read the branch.
    """

    def __init__(self, raw: Tensor, batch_norm: nn.Module | None = None, copies: int = 1) -> None:
        self.raw = raw
        self.batch_norm = batch_norm  # None also once it is folded in, or has run
        self.copies = copies  # how often the original's BatchNorm sees each element
        self.normalisation: Normalisation | None = None

    @property
    def size(self) -> tuple[int, int]:
        return self.raw.shape[2], self.raw.shape[3]

    def fold(self, folding: Folding) -> None:
        """Fold the BatchNorm into the reading of `raw`; or, where that cannot be (SyncBatchNorm, hooks), run it."""
        if self.batch_norm is not None:
            names = ("a normalisation of the self-teacher", "its input")
            self.raw, self.normalisation = folding.fold(self.batch_norm, self.raw, *names, self.copies)
            self.batch_norm = None


class Pass:
    """One forward pass: the implementation it uses, and what its BatchNorms owe at its end."""

    def __init__(self, impl: str) -> None:
        self.impl = impl
        self.folding = Folding(impl)

    def fuse(
        self,
        branches: Sequence[Branch],
        resamples: Sequence[int] = (UNCHANGED,),
        weight: Tensor | None = None,
        size: tuple[int, int] | None = None,
        pre: int = RELU,
        convolution: Tensor | None = None,
    ) -> Tensor:
        """sum_i w^_i * relu(resample_i(branch_i)), and its depthwise 3x3 or pointwise convolution where a weight is given."""
        for branch in branches:
            branch.fold(self.folding)
        inputs = [branch.raw for branch in branches]
        dtype = accumulate_dtype(inputs[0].dtype)
        weighting = NO_WEIGHTING if weight is None else NODE_WEIGHTING
        numbers = inputs[0].new_ones(len(inputs), dtype=dtype) if weight is None else weight.to(dtype)
        settings = fusion_reference.Settings(tuple(resamples), pre, weighting, reference.FUSION_EPSILON)
        return fusion.fuse(
            inputs,
            [branch.normalisation for branch in branches],
            numbers,
            settings,
            branches[0].size if size is None else size,
            self.impl,
            convolution,
        )


def autocast_pair(x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
    """The operands of a convolution in autocast's dtype, where that is on: a custom backward has to see them as computed."""
    kind = x.device.type
    if not torch.is_autocast_enabled(kind) or x.dtype == torch.float64:
        return x, *weights
    dtype = torch.get_autocast_dtype(kind)
    return tuple(tensor.to(dtype) for tensor in (x, *weights))


class _Pointwise(torch.autograd.Function):
    """1x1 convolution."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.conv2d(x, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        return pointwise_backward(x, weight, grad, *ctx.needs_input_grad)


class _Lateral(torch.autograd.Function):
    """1x1 convolutions of relu(feature) by one or two weights, as one product; the rectified map is not kept."""

    @staticmethod
    def forward(ctx: Any, feature: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(feature, *weights)
        out = F.conv2d(F.relu(feature), torch.cat(weights) if len(weights) > 1 else weights[0])
        return tuple(out.split([weight.shape[0] for weight in weights], 1))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        feature, *weights = ctx.saved_tensors
        stacked = torch.cat(weights) if len(weights) > 1 else weights[0]
        grad = torch.cat(grads, 1) if len(grads) > 1 else grads[0]
        need_feature, *need_weights = ctx.needs_input_grad
        x_gradient, gradient = pointwise_backward(F.relu(feature), stacked, grad, need_feature, any(need_weights))
        if x_gradient is not None:
            x_gradient = torch.ops.aten.threshold_backward(x_gradient, feature, 0)
        gradients: list[Tensor | None] = [None] * len(weights)
        if gradient is not None:
            gradients = list(gradient.split([weight.shape[0] for weight in weights]))
        return (x_gradient, *gradients)


def steps_of(block: nn.Module, stage: int = 0) -> nn.Sequential:
    """Stage `stage` of a DepthConvBlock: convolutions, BatchNorm, ReLU."""
    return cast(nn.Sequential, cast(nn.Sequential, block.conv)[stage])


def weight_of(convolution: nn.Module) -> Tensor:
    """The weight of a convolution."""
    return cast(Tensor, convolution.weight)


def block_is_as_built(block: nn.Module) -> bool:
    """Whether a DepthConvBlock still has its own convolutions (no bias) and ReLUs, none of them hooked or replaced.

    A normalisation may be replaced or hooked: it is called where it cannot be folded in.
    """
    if type(block) is not reference.DepthConvBlock or has_hooks(block) or has_hooks(block.conv):
        return False
    for stage in block.conv:
        steps = list(stage.children())
        pointwise_block = len(steps) == 3 and type(steps[2]) is nn.ReLU
        normalisation = 1 if pointwise_block else len(steps) - 1
        for position, step in enumerate(steps):
            known = type(step) is nn.ReLU or (type(step) is nn.Conv2d and step.bias is None)
            if position != normalisation and (not known or has_hooks(step)):
                return False
        if has_hooks(stage):
            return False
    return True


def pointwise(x: Tensor, convolution: nn.Module) -> Tensor:
    """The 1x1 convolution of `x`."""
    out: Tensor = _Pointwise.apply(*autocast_pair(x, weight_of(convolution)))
    return out


class BiFPNLayer(reference.BiFPNLayer):
    """`frskd_fast.reference.self_teacher.BiFPNLayer`, of the same parameters and results.

    Maps travel between nodes as raw convolution outputs; a node normalises, rectifies, resamples and adds them as it reads.
    """

    def forward(  # type: ignore[override]
        self, features: Sequence[Tensor], run: Pass | None, preact: bool = False
    ) -> list[Tensor]:
        """The output maps, rectified unless `preact`. Without a `run`, or with changed parts, in the plain form."""
        if run is None or not self.is_as_built():
            maps = super().forward(features)
            return maps if preact else [F.relu(feature) for feature in maps]
        levels = len(features)
        lateral, lateral2 = self.laterals(features)

        # Top-down. The coarsest U is P itself; the others are raw outputs of their node's last convolution.
        up = [lateral[-1]]
        for i in range(levels - 2, -1, -1):
            size = lateral[i].size
            coarser = self.up_sampled(i, up[0], size, run)
            node = run.fuse(
                [lateral[i], coarser],
                (UNCHANGED, UP),
                self.up_weight[i],
                size,
                convolution=self.depthwise_of(self.up_conv[i]),
            )
            up.insert(0, self.convolved(node, self.up_conv[i], run))
            if i > 0:
                # Read twice below, by the next up-sampling convolution and by the way up: written once.
                up[0] = Branch(run.fuse([up[0]]))

        outputs = [up[0]]
        for i in range(1, levels):
            finer, resample = self.down_sampled(i - 1, outputs[-1], run)
            own = [lateral2[i - 1], up[i]] if i < levels - 1 else [lateral2[i - 1]]
            node = run.fuse(
                [*own, finer],
                (*[UNCHANGED] * len(own), resample),
                self.down_weight[i - 1],
                own[0].size,
                convolution=self.depthwise_of(self.down_conv[i - 1]),
            )
            outputs.append(self.convolved(node, self.down_conv[i - 1], run))
        return [run.fuse([output], pre=NONE if preact else RELU) for output in outputs]

    def is_as_built(self) -> bool:
        """Whether every convolution and ReLU is the one that was built: nodes read their weights and do not call them."""
        blocks: list[nn.Module] = []
        for group in (self.lat_conv, self.lat_conv2, self.up_conv, self.down_conv):
            blocks.extend(group)
        for steps in (*self.up_sample, *self.down_sample):
            if has_hooks(steps):
                return False
            blocks += list(cast(nn.Sequential, steps))[1:]
        return all(map(block_is_as_built, blocks))

    def laterals(self, features: Sequence[Tensor]) -> tuple[list[Branch], list[Branch]]:
        """P of every level and Q of all but the finest, by one product a level."""
        lateral, lateral2 = [], []
        for i, feature in enumerate(features):
            blocks = [self.lat_conv[i]] if len(self.lat_conv) > 0 else []
            blocks += [self.lat_conv2[i - 1]] if i > 0 else []
            convolutions = [steps_of(block) for block in blocks]
            maps: tuple[Tensor, ...] = ()
            if blocks:
                weights = [weight_of(convolution[0]) for convolution in convolutions]
                maps = _Lateral.apply(*autocast_pair(feature, *weights))
            branches = [Branch(raw, steps[1]) for raw, steps in zip(maps, convolutions, strict=True)]
            lateral.append(branches.pop(0) if len(self.lat_conv) > 0 else Branch(feature))
            lateral2 += branches
        return lateral, lateral2

    def up_sampled(self, i: int, coarser: Branch, size: tuple[int, int], run: Pass) -> Branch:
        """What the node of level i adds from the level above, to be up-sampled by the node itself.

        Convolution (1x1), BatchNorm and ReLU commute with nearest-neighbour up-sampling that copies all pixels equally often.
        """
        steps = list(cast(nn.ModuleList, self.up_sample[i]))[1:]
        if not steps:
            return coarser
        convolution = steps_of(steps[0])
        batch_norm = convolution[1]
        whole = size[0] % coarser.size[0] == 0 and size[1] % coarser.size[1] == 0
        if not (whole and foldable(batch_norm)):
            enlarged = run.fuse([coarser], (UP,), size=size, convolution=weight_of(convolution[0]))
            return Branch(enlarged, batch_norm)
        copies = (size[0] // coarser.size[0]) * (size[1] // coarser.size[1])
        # A map that is already written needs no fusion, which here would only copy it.
        written = coarser.batch_norm is None and coarser.normalisation is None
        raw = (
            pointwise(coarser.raw, convolution[0])
            if written
            else run.fuse([coarser], convolution=weight_of(convolution[0]))
        )
        return Branch(raw, batch_norm, copies)

    def down_sampled(self, i: int, finer: Branch, run: Pass) -> tuple[Branch, int]:
        """What the node of level i + 1 adds from the level below, and how the node has to resample it."""
        steps = list(cast(nn.Sequential, self.down_sample[i]))[1:]
        if not steps:
            return finer, POOL
        convolution = steps_of(steps[0])
        height, width = fusion_reference.pooled_size(finer.size)
        raw = run.fuse([finer], (POOL,), size=(height, width), convolution=weight_of(convolution[0]))
        return Branch(raw, convolution[1]), UNCHANGED

    @staticmethod
    def depthwise_of(block: nn.Module) -> Tensor:
        """The weight of a node's first depthwise convolution."""
        return weight_of(steps_of(block)[0])

    @staticmethod
    def convolved(node: Tensor, block: nn.Module, run: Pass) -> Branch:
        """The rest of a node's separable convolutions; `node` has been through the first depthwise one."""
        stages = [cast(nn.Sequential, stage) for stage in cast(nn.Sequential, block.conv)]
        branch = Branch(pointwise(node, stages[0][1]), stages[0][2])
        for stage in stages[1:]:
            node = run.fuse([branch], convolution=weight_of(stage[1]))
            branch = Branch(pointwise(node, stage[2]), stage[3])
        return branch


class SelfTeacher(reference.SelfTeacher):
    """What `BiFPN` and `BiFPNc` share."""

    layer_type = BiFPNLayer

    def refine(self, features: Sequence[Tensor], preact: bool = False) -> list[Tensor]:  # type: ignore[override]
        """The output maps, after their last ReLU or (preact) before it."""
        check_features(features, self.channels)
        impl = _dispatch.choose_for("self_teacher", "auto", features[0])
        # Without kernels the rearranged form would only cost memory.
        run = None if _dispatch.is_plain(impl) else Pass(impl)
        maps = list(features)
        memory_format = _dispatch.memory_format_of("self_teacher", impl)
        if memory_format is not None:
            maps = [feature.contiguous(memory_format=memory_format) for feature in maps]
        for position, layer in enumerate(self.layers):
            maps = layer(maps, run, preact and position == len(self.layers) - 1)
        if run is not None:
            run.folding.finish()
        return maps

    @staticmethod
    def pooled(maps: Sequence[Tensor], preact: bool) -> Tensor:
        """mean over pixels of relu(T_last): (N, C)."""
        last = F.relu(maps[-1]) if preact else maps[-1]
        return last.mean(dim=(2, 3))


def check_arguments(channels: Sequence[int], num_classes: int, **positive: int) -> None:
    """Raise unless `channels` lists two or more levels and every number is an integer of at least 1."""
    if not isinstance(channels, list | tuple):
        raise TypeError(
            f"channels must be a list of channel counts, finest level first, but is {channels!r}; "
            "pass the backbone's own .channels."
        )
    if len(channels) < 2:
        raise ValueError(f"channels must list two levels or more, but is {list(channels)}; a pyramid fuses levels.")
    for level, count in enumerate(channels):
        check_positive_integer(f"channels[{level}]", count)
    check_positive_integer("num_classes", num_classes)
    for name, value in positive.items():
        check_positive_integer(name, value)


class BiFPNc(SelfTeacher):
    """T = pyramid(features), width * channels[i] wide at level i; logits = fc(mean over pixels of relu(T_last)).

    FRSKD's default self-teacher: 6,375,794 parameters on cifarresnet18 with 100 classes.

    Args:
        channels: channels of the backbone's feature maps, finest first: the backbone's `.channels`. Two levels or more.
        num_classes: number of logits, K.
        width: every level is `width * channels[i]` channels wide.
        depth: depthwise-separable convolutions in each node.
        repeat: number of pyramid layers, one behind the other.

    Attributes:
        channels, out_channels: channels of the input and of the output maps.

    Calling `self_teacher(features, preact=False)` with one map (N, channels[i], H_i, W_i) for each level, each level
    half the size of the one before, rounded up, returns `(features, logits)`: refined maps (N, out_channels[i], H_i,
    W_i) and logits (N, K). With `preact=True` the refined maps are taken before their last ReLU. The features are not
    detached: the self-teacher's cross-entropy trains the backbone too, as FRSKD wants.

    Raises:
        ValueError, TypeError: on features of another number, rank, channel count or size; on arguments below 1.

    Differences from the original:
        * `repeat` above 1 works. The original builds later layers for the backbone's channels and fails on the first
          forward. Here they are built as in `BiFPN`: no `lat_conv`, and a `lat_conv2` from output width to output
          width.
        * Any size works, odd and non-square ones too: up-sampling (nearest neighbour) goes to the finer level's actual
          size where the original doubles.
        * Fusion weights are normalised in at least float32; in a half-precision module the original's 1e-6 vanishes.

    A node whose fusion weights are all zero or negative gives a constant and gets no gradient for them, as in the
    original.

    Example:
        >>> maps = [torch.zeros(2, 4, 15, 10), torch.zeros(2, 8, 8, 5), torch.zeros(2, 16, 4, 3)]
        >>> features, logits = BiFPNc([4, 8, 16], num_classes=7)(maps)
        >>> [tuple(feature.shape) for feature in features], tuple(logits.shape)
        ([(2, 8, 15, 10), (2, 16, 8, 5), (2, 32, 4, 3)], (2, 7))

    Source: Ji et al., CVPR 2021, section 3.1.
    """

    def __init__(
        self, channels: Sequence[int], num_classes: int, width: int = 2, depth: int = 2, repeat: int = 1
    ) -> None:
        check_arguments(channels, num_classes, width=width, depth=depth, repeat=repeat)
        super().__init__(channels, [width * count for count in channels], depth, repeat, convolve_samples=True)
        self.fc = nn.Linear(self.out_channels[-1], num_classes)

    def forward(self, features: Sequence[Tensor], preact: bool = False) -> tuple[list[Tensor], Tensor]:
        maps = self.refine(features, preact)
        return maps, self.fc(self.pooled(maps, preact))


class BiFPN(SelfTeacher):
    """T = pyramid(features), num_channels wide at every level; logits = linear(mean over pixels of relu(T_last)).

    The alternative self-teacher of FRSKD, whose sampling has no parameters: 1,324,658 parameters on cifarresnet18 with
    100 classes.

    Args:
        channels: channels of the backbone's feature maps, finest first: the backbone's `.channels`. Two levels or more.
        num_classes: number of logits, K.
        num_channels: width of every level.
        depth: depthwise-separable convolutions in each node.
        repeat: number of pyramid layers, one behind the other; later ones have no `lat_conv`.

    Attributes, calling and errors: as `BiFPNc`, with `num_channels` wide output maps.

    Differences from the original:
        * Any size works, odd and non-square ones too: up-sampling (nearest neighbour) goes to the finer level's actual
          size where the original doubles.
        * Fusion weights are normalised in at least float32; in a half-precision module the original's 1e-6 vanishes.

    Example:
        >>> maps = [torch.zeros(2, 4, 15, 10), torch.zeros(2, 8, 8, 5)]
        >>> features, logits = BiFPN([4, 8], num_classes=7, num_channels=6, repeat=2)(maps)
        >>> [tuple(feature.shape) for feature in features], tuple(logits.shape)
        ([(2, 6, 15, 10), (2, 6, 8, 5)], (2, 7))

    Source: Ji et al., CVPR 2021, section 3.1; Tan et al., CVPR 2020.
    """

    def __init__(
        self, channels: Sequence[int], num_classes: int, num_channels: int = 256, depth: int = 2, repeat: int = 1
    ) -> None:
        check_arguments(channels, num_classes, num_channels=num_channels, depth=depth, repeat=repeat)
        super().__init__(channels, [num_channels] * len(channels), depth, repeat, convolve_samples=False)
        self.linear = nn.Linear(num_channels, num_classes)

    def forward(self, features: Sequence[Tensor], preact: bool = False) -> tuple[list[Tensor], Tensor]:
        maps = self.refine(features, preact)
        return maps, self.linear(self.pooled(maps, preact))
