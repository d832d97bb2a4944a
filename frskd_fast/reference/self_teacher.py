"""The self-teachers of FRSKD: bidirectional feature pyramids with their own classifier.

Ji et al., "Refine Myself by Teaching Myself: Feature Refinement via Self-Knowledge Distillation", CVPR 2021,
section 3.1, after Tan et al., "EfficientDet", CVPR 2020 (weighted bidirectional feature pyramid).

This is the plain form: one PyTorch operation for each step of the formulas. `frskd_fast.models` inherits the parameters from
here and computes the same function with less work.
"""

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from frskd_fast.reference.fusion import normalise_weight, same_max_pool

# Keeps the normalised fusion weights finite when none of them is positive.
FUSION_EPSILON = 1e-6


def weighted_sum(weight: Tensor, inputs: Sequence[Tensor]) -> Tensor:
    """sum_i w_i * x_i over normalised weights w, added from the left."""
    normalised = normalise_weight(weight, "relu", FUSION_EPSILON)
    # A weight has no axes, so it does not change the dtype of the map it scales.
    fused = normalised[0] * inputs[0]
    for position in range(1, len(inputs)):
        fused = fused + normalised[position] * inputs[position]
    return fused


class SameMaxPool2d(nn.Module):
    """Maximum over 3x3 windows of stride 2 of the zero-padded map; output size = input size / 2, rounded up.

    An even size is padded by one at its end, an odd one on both sides.
    """

    def forward(self, x: Tensor) -> Tensor:
        return same_max_pool(x)


class UpSample(nn.ModuleList):
    """Nearest-neighbour up-sampling to `size`, then (item 1, BiFPNc only) a 1x1 convolution to the finer width.

    Item 0 has no parameters; it keeps the convolution at the key the original gives it.
    """

    def __init__(self, convolution: nn.Module | None = None) -> None:
        super().__init__([nn.Identity()] if convolution is None else [nn.Identity(), convolution])

    def forward(self, x: Tensor, size: Sequence[int]) -> Tensor:
        x = F.interpolate(x, size=size, mode="nearest")
        for convolution in self:
            x = convolution(x)
        return x


class DepthConvBlock(nn.Module):
    """kernel 1: relu(bn(conv1x1(x))); kernel 3: bn(pointwise(depthwise3x3(x))), `depth` times with ReLU in between.

    Args:
        in_channels, out_channels: channels of input and output.
        kernel_size: 1 or 3.
        depth: number of depthwise-separable convolutions; has no effect for kernel 1.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, depth: int = 1) -> None:
        super().__init__()
        if kernel_size == 1:
            self.conv = nn.Sequential(
                nn.Sequential(
                    nn.Conv2d(in_channels, out_channels, 1, bias=False), nn.BatchNorm2d(out_channels), nn.ReLU()
                )
            )
            return
        separable = []
        for position in range(depth):
            channels = in_channels if position == 0 else out_channels
            steps = [
                nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False),
                nn.Conv2d(channels, out_channels, 1, bias=False),
                nn.BatchNorm2d(out_channels),
            ]
            separable.append(nn.Sequential(*steps) if position == 0 else nn.Sequential(nn.ReLU(), *steps))
        self.conv = nn.Sequential(*separable)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(x)
        return out


class BiFPNLayer(nn.Module):
    """One top-down and one bottom-up pass over a pyramid of L levels; R = relu, w^ = normalised fusion weights.

        P_i = lat_conv_i(R(F_i))  (or R(F_i), without lat_conv);   Q_i = lat_conv2_i(R(F_i))
        U_{L-1} = P_{L-1};   U_i = up_conv_i(w^0 R(P_i) + w^1 up_sample_i(R(U_{i+1})))
        T_0 = U_0;   T_i = down_conv_i(w^0 R(Q_i) + w^1 R(U_i) + w^2 down_sample_i(R(T_{i-1})))
        T_{L-1} = down_conv(w^0 R(Q_{L-1}) + w^1 down_sample(R(T_{L-2})))

    Args:
        in_channels: channels of each input level.
        widths: channels of each output level.
        depth: depthwise-separable convolutions in a node.
        lateral: whether the layer has `lat_conv`; a layer without it takes inputs of the output widths.
        convolve_samples: whether up- and down-sampling change the width by a 1x1 convolution.
    """

    def __init__(
        self, in_channels: Sequence[int], widths: Sequence[int], depth: int, lateral: bool, convolve_samples: bool
    ) -> None:
        super().__init__()
        levels = len(widths)
        # The order of registration is the order of named_parameters() in the original.
        self.lat_conv = nn.ModuleList(
            DepthConvBlock(channels, width, 1) for channels, width in zip(in_channels, widths, strict=True) if lateral
        )
        self.lat_conv2 = nn.ModuleList(DepthConvBlock(in_channels[i], widths[i], 1) for i in range(1, levels))
        self.up_conv = nn.ModuleList(DepthConvBlock(width, width, 3, depth) for width in widths[:-1])
        self.up_weight = nn.ParameterList(nn.Parameter(torch.ones(2)) for _ in widths[:-1])
        self.down_conv = nn.ModuleList(DepthConvBlock(width, width, 3, depth) for width in widths[1:])
        self.down_weight = nn.ParameterList(
            nn.Parameter(torch.ones(3 if i < levels - 1 else 2)) for i in range(1, levels)
        )
        self.down_sample = nn.ModuleList(
            nn.Sequential(SameMaxPool2d(), DepthConvBlock(widths[i - 1], widths[i], 1))
            if convolve_samples
            else nn.Sequential(SameMaxPool2d())
            for i in range(1, levels)
        )
        self.up_sample = nn.ModuleList(
            UpSample(DepthConvBlock(widths[i + 1], widths[i], 1) if convolve_samples else None)
            for i in range(levels - 1)
        )

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        levels = len(features)
        # Rectified inputs, lat_conv and lat_conv2 all end in a ReLU, so P and Q need no second one below.
        rectified = [F.relu(feature) for feature in features]
        lateral = rectified
        if len(self.lat_conv) > 0:
            lateral = [convolution(x) for convolution, x in zip(self.lat_conv, rectified, strict=True)]
        lateral2 = [convolution(x) for convolution, x in zip(self.lat_conv2, rectified[1:], strict=True)]

        # Top-down: coarsest level first. The coarsest U is P itself; like P it is used rectified only.
        up = [lateral[-1]]
        for i in range(levels - 2, -1, -1):
            coarser = self.up_sample[i](F.relu(up[0]), lateral[i].shape[2:])
            up.insert(0, self.up_conv[i](weighted_sum(self.up_weight[i], [lateral[i], coarser])))

        # Bottom-up: finest level first; inner levels also take the top-down map, the coarsest has none of its own.
        outputs = [up[0]]
        for i in range(1, levels):
            finer = self.down_sample[i - 1](F.relu(outputs[-1]))
            own = [lateral2[i - 1], F.relu(up[i])] if i < levels - 1 else [lateral2[i - 1]]
            outputs.append(self.down_conv[i - 1](weighted_sum(self.down_weight[i - 1], [*own, finer])))
        return outputs


class SelfTeacher(nn.Module):
    """What `BiFPN` and `BiFPNc` share: `repeat` pyramid layers; a subclass adds the classifier under its own name."""

    layer_type = BiFPNLayer

    def __init__(
        self, channels: Sequence[int], widths: Sequence[int], depth: int, repeat: int, convolve_samples: bool
    ) -> None:
        super().__init__()
        self.channels = list(channels)
        self.out_channels = list(widths)
        self.layers = nn.ModuleList(
            self.layer_type(channels if position == 0 else widths, widths, depth, position == 0, convolve_samples)
            for position in range(repeat)
        )

    def get_bn_before_relu(self) -> list[nn.BatchNorm2d]:
        """The BatchNorm that makes each output map, finest first (for the margins of overhaul distillation).

        Example:
            >>> [batch_norm.num_features for batch_norm in BiFPNc([4, 8], 10).get_bn_before_relu()]
            [8, 16]
        """
        last = cast(BiFPNLayer, self.layers[-1])
        nodes = [last.up_conv[0], *last.down_conv]
        return [[module for module in node.modules() if isinstance(module, nn.BatchNorm2d)][-1] for node in nodes]

    def refine(self, features: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """The output maps before and after their last ReLU."""
        before_relu = list(features)
        for layer in self.layers:
            before_relu = layer(before_relu)
        return before_relu, [F.relu(feature) for feature in before_relu]


class BiFPNc(SelfTeacher):
    """T = pyramid(features), width * channels[i] wide at level i; logits = fc(mean over pixels of relu(T_last))."""

    def __init__(
        self, channels: Sequence[int], num_classes: int, width: int = 2, depth: int = 2, repeat: int = 1
    ) -> None:
        super().__init__(channels, [width * count for count in channels], depth, repeat, convolve_samples=True)
        self.fc = nn.Linear(self.out_channels[-1], num_classes)

    def forward(self, features: Sequence[Tensor], preact: bool = False) -> tuple[list[Tensor], Tensor]:
        before_relu, refined = self.refine(features)
        logits = self.fc(refined[-1].mean(dim=(2, 3)))
        return (before_relu if preact else refined), logits


class BiFPN(SelfTeacher):
    """T = pyramid(features), num_channels wide at every level; logits = linear(mean over pixels of relu(T_last))."""

    def __init__(
        self, channels: Sequence[int], num_classes: int, num_channels: int = 256, depth: int = 2, repeat: int = 1
    ) -> None:
        super().__init__(channels, [num_channels] * len(channels), depth, repeat, convolve_samples=False)
        self.linear = nn.Linear(num_channels, num_classes)

    def forward(self, features: Sequence[Tensor], preact: bool = False) -> tuple[list[Tensor], Tensor]:
        before_relu, refined = self.refine(features)
        logits = self.linear(refined[-1].mean(dim=(2, 3)))
        return (before_relu if preact else refined), logits
