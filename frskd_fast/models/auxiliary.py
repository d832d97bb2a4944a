"""HSAKD's auxiliary classifiers: each stage of a backbone predicts the joint label of class and rotation.

Yang et al., "Hierarchical Self-supervised Augmented Knowledge Distillation", IJCAI 2021.

A family of backbones brings its own heads by one method,

    def build_auxiliary_classifier(self, num_classes: int) -> AuxiliaryClassifier

which builds them for features as `forward` hands them out (`preact=False`), initialised as the family wants.
`with_auxiliary_heads` calls it; `create_model("<name>_aux", K)` calls that, unless a network is registered under this name.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from frskd_fast.ops._checks import check_positive_integer

from ._initialisers import initialise_convolutions, initialise_linears
from .adapters import AdaptedBackbone
from .dry_pass import dry_pass
from .residual_blocks import BasicBlock, Bottleneck, ReLUSequential

# A basic block of more channels than this has more parameters than a whole backbone; a bottleneck takes its place.
WIDEST_BASIC_BLOCK = 512


class AuxiliaryClassifier(nn.Module):
    """a_l = fc_l(mean over pixels of neck_l(extractor_l(features_l))): one head for each feature map, 4K logits each.

    Args:
        extractors: one module for each feature map, finest first, from map to map.
        widths: channels of what goes into each linear layer; an integer when they are equal.
        num_classes: number of classes K; class y and rotation r have the joint label 4y + r.
        necks: one more module for each head, between extractor and mean.
        neck_name: head l's neck is called `<neck_name><l>`, l from 1.
        final_relu: apply a ReLU before the mean.

    Attributes:
        heads: number of heads, L.
        num_classes: K.

    The modules are `block_extractor1..L`, then the necks, then `fc1..L`, in this order, as in HSAKD's checkpoints.
    Calling `classifier(features)` with L maps (N, C_l, H_l, W_l) returns a list of L tensors (N, 4K).

    Raises:
        ValueError: when lists differ in length, here or in a call.

    Example:
        >>> extractors = [nn.Conv2d(3, 8, 1), nn.Conv2d(6, 8, 1)]
        >>> classifier = AuxiliaryClassifier(extractors, widths=8, num_classes=5)
        >>> [tuple(logits.shape) for logits in classifier([torch.zeros(2, 3, 8, 8), torch.zeros(2, 6, 4, 4)])]
        [(2, 20), (2, 20)]
    """

    def __init__(
        self,
        extractors: Sequence[nn.Module],
        widths: int | Sequence[int],
        num_classes: int,
        *,
        necks: Sequence[nn.Module] = (),
        neck_name: str = "neck",
        final_relu: bool = False,
    ) -> None:
        super().__init__()
        check_positive_integer("num_classes", num_classes)
        self.heads = len(extractors)
        self.num_classes = num_classes
        self.final_relu = final_relu
        widths = [widths] * self.heads if isinstance(widths, int) else widths
        self._neck_name = neck_name if necks else None
        for argument, values in (("widths", widths), ("necks", necks or extractors)):
            if len(values) != self.heads:
                raise ValueError(
                    f"{argument} holds {len(values)} items, but one for each of the {self.heads} extractors was wanted."
                )
        for level, extractor in enumerate(extractors, 1):
            self.add_module(f"block_extractor{level}", extractor)
        for level, neck in enumerate(necks, 1):
            self.add_module(f"{neck_name}{level}", neck)
        for level, width in enumerate(widths, 1):
            self.add_module(f"fc{level}", nn.Linear(width, 4 * num_classes))

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        if len(features) != self.heads:
            raise ValueError(
                f"features holds {len(features)} maps, but this classifier has {self.heads} heads; "
                "pass the maps of the backbone it was built for."
            )
        logits = []
        for level, feature in enumerate(features, 1):
            x = getattr(self, f"block_extractor{level}")(feature)
            if self._neck_name is not None:
                x = getattr(self, f"{self._neck_name}{level}")(x)
            if self.final_relu:
                x = F.relu(x)
            logits.append(getattr(self, f"fc{level}")(x.mean(dim=(2, 3))))
        return logits

    def extra_repr(self) -> str:
        """What was built, shown by ``print(module)``."""
        return f"heads={self.heads}, num_classes={self.num_classes}"


def remaining_stages(
    channels: Sequence[int],
    stage: Callable[[int, int, int], nn.Module],
    chain: Callable[..., nn.Module] = nn.Sequential,
) -> list[nn.Module]:
    """extractor_l = stages l+1 to L of the backbone, built again; the last one is stage L at stride 1.

    Args:
        channels: channels of the L feature maps, finest first.
        stage: called with (level from 0, input channels, stride), returns that stage.
        chain: joins the stages of one extractor.

    Example:
        >>> def stage(level, in_channels, stride):
        ...     return nn.Conv2d(in_channels, [4, 8, 16][level], 3, stride, 1)
        >>> [len(extractor) for extractor in remaining_stages([4, 8, 16], stage)]
        [2, 1, 1]
    """
    last = len(channels) - 1
    extractors = [
        chain(*(stage(later, channels[later - 1], 2) for later in range(level + 1, last + 1))) for level in range(last)
    ]
    return [*extractors, chain(stage(last, channels[last], 1))]


class AuxiliaryNetwork(nn.Module):
    """logits, [a_1, ..., a_L] = the backbone's K logits, and 4K joint logits of class and rotation from every feature map.

    Args:
        backbone: `backbone(images) -> (features, logits)`. It is used, not copied.
        auxiliary_classifier: `classifier(features) -> [L x (N, 4K)]`, with `heads` and `num_classes`.
        detach_features: no gradient passes from the heads to the backbone. HSAKD does so for a teacher whose backbone
            is frozen.

    Attributes:
        backbone, auxiliary_classifier: the parts; checkpoints hold them under these names, as HSAKD's do.
        heads: number of heads, L.
        num_classes: K.

    Calling `network(images, detach_features=None)` returns `(logits (N, K), [L x (N, 4K)])`; `detach_features` overrides
    the constructor's.

    Example:
        >>> from frskd_fast.models import create_model
        >>> network = create_model("resnet8_aux", 10)
        >>> logits, auxiliary_logits = network(torch.zeros(4, 3, 16, 16))
        >>> tuple(logits.shape), [tuple(head.shape) for head in auxiliary_logits]
        ((4, 10), [(4, 40), (4, 40), (4, 40)])

    Source: HSAKD's `*_aux` networks. Their flag `grad` is the opposite of `detach_features`, and its default is False.
    """

    def __init__(self, backbone: nn.Module, auxiliary_classifier: nn.Module, detach_features: bool = False) -> None:
        super().__init__()
        self.backbone = backbone
        self.auxiliary_classifier: Any = auxiliary_classifier
        self.detach_features = detach_features

    @property
    def heads(self) -> int:
        """Number of heads, L."""
        return int(self.auxiliary_classifier.heads)

    @property
    def num_classes(self) -> int:
        """Number of classes, K."""
        return int(self.auxiliary_classifier.num_classes)

    def forward(self, images: Tensor, detach_features: bool | None = None) -> tuple[Tensor, list[Tensor]]:
        features, logits = self.backbone(images)
        if self.detach_features if detach_features is None else detach_features:
            features = [feature.detach() for feature in features]
        return logits, self.auxiliary_classifier(features)


def with_auxiliary_heads(
    backbone: nn.Module, num_classes: int | None = None, *, detach_features: bool | None = None
) -> AuxiliaryNetwork:
    """`AuxiliaryNetwork(backbone, its auxiliary classifier)` for any backbone with `.channels`.

    The first line that fits decides which heads these are. All of them start freshly initialised, with gradients, on the
    backbone's device and in its dtype.

    | backbone | head of feature map l |
    | --- | --- |
    | has `build_auxiliary_classifier` (every CIFAR network of this library, ResNet-18, -34, -50) | HSAKD's for that family |
    | its feature maps are outputs of children of one module, in their order (layer1, layer2, ...) | fresh copies of the children after map l; for the last map, as many copies of a block of the last child that keeps the shape as that child has blocks |
    | any other | for each later map a residual block of stride 2 (3x3 convolution, BatchNorm, ReLU, 3x3 convolution, BatchNorm; a bottleneck above 512 channels) to that map's channels, for the last map one of stride 1 |

    Mean over the pixels and a linear layer to 4K logits end every head. In copies, parameters that belong to no layer with
    a `reset_parameters` method start with the backbone's values.

    Args:
        backbone: `backbone(images) -> (features, logits)` with `.channels`; `adapt_backbone` makes one of other networks. An
            `AuxiliaryNetwork` is returned as it is.
        num_classes: number of classes K; None takes `backbone.num_classes`.
        detach_features: see `AuxiliaryNetwork`; None is False, or what an `AuxiliaryNetwork` has.

    Raises:
        TypeError: when the backbone has no `channels`.
        ValueError: when the number of classes is not known, or heads that are there have another number of classes or another
            `detach_features`.

    Example:
        >>> from frskd_fast.models import adapt_backbone
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 2, 2), nn.Conv2d(4, 8, 2, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        ...                       nn.Linear(8, 5))
        >>> network = with_auxiliary_heads(adapt_backbone(model, ["0", "1"]))
        >>> network.heads, network.auxiliary_classifier.block_extractor1
        (2, Sequential(
          (0): Conv2d(4, 8, kernel_size=(2, 2), stride=(2, 2))
        ))
    """  # noqa: E501
    if isinstance(backbone, AuxiliaryNetwork):
        if num_classes is not None and num_classes != backbone.num_classes:
            raise ValueError(
                f"num_classes is {num_classes}, but the heads of this network were built for {backbone.num_classes} "
                "classes; pass its backbone to get new ones."
            )
        if detach_features not in (None, backbone.detach_features):
            raise ValueError(
                f"detach_features is {detach_features}, but this network has heads with detach_features="
                f"{backbone.detach_features} and is returned as it is; set network.detach_features instead."
            )
        return backbone
    if num_classes is None:
        num_classes = getattr(backbone, "num_classes", None)
        if not isinstance(num_classes, int):
            raise ValueError(
                f"num_classes is None, but backbone ({type(backbone).__name__}) has no attribute num_classes to read it "
                "from; pass the number of classes."
            )
    build: Callable[[int], AuxiliaryClassifier] = getattr(backbone, "build_auxiliary_classifier", None) or (
        lambda count: _general_classifier(backbone, count)
    )
    classifier = build(num_classes)
    reference = next((p for p in backbone.parameters() if p.is_floating_point()), None)
    if reference is not None:
        classifier.to(reference.device, reference.dtype)
    return AuxiliaryNetwork(backbone, classifier, bool(detach_features))


def _general_classifier(backbone: nn.Module, num_classes: int) -> AuxiliaryClassifier:
    """Heads of copied stages where they can be found, else of residual blocks."""
    channels = getattr(backbone, "channels", None)
    if not isinstance(channels, list | tuple) or not channels:
        raise TypeError(
            f"backbone ({type(backbone).__name__}) has no list of channels, but needs one to get auxiliary heads; wrap it with "
            "frskd_fast.models.adapt_backbone."
        )

    def residual_block(level: int, in_channels: int, stride: int) -> nn.Module:
        width = channels[level]
        if width > WIDEST_BASIC_BLOCK and width % Bottleneck.expansion == 0:
            return Bottleneck(in_channels, width // Bottleneck.expansion, stride)
        return BasicBlock(in_channels, width, stride)

    stages = _stages_of(backbone)
    if stages is None:
        extractors = remaining_stages(channels, residual_block, ReLUSequential)
        initialise_convolutions(nn.ModuleList(extractors))
    else:
        later, shape_keeping = stages
        extractors = [nn.Sequential(*(_fresh_copy(stage) for stage in later[level:])) for level in range(len(later))]
        if shape_keeping:
            extractors.append(nn.Sequential(*map(_fresh_copy, shape_keeping)))
        else:
            last = residual_block(len(channels) - 1, channels[-1], 1)
            initialise_convolutions(last)
            extractors.append(nn.Sequential(last, nn.ReLU()))
    classifier = AuxiliaryClassifier(extractors, channels[-1], num_classes, final_relu=stages is None)
    initialise_linears(nn.ModuleList(child for child in classifier.children() if isinstance(child, nn.Linear)))
    return classifier


def _fresh_copy(module: nn.Module) -> nn.Module:
    """A trainable copy with new weights."""
    fresh = copy.deepcopy(module).requires_grad_(True).train()
    for layer in fresh.modules():
        reset = getattr(layer, "reset_parameters", None)
        if callable(reset):
            reset()
        if getattr(layer, "inplace", False):
            layer.inplace = False  # type: ignore[assignment]  # the feature map it reads has other readers
    initialise_convolutions(fresh)
    return fresh


class _Call:
    """Shapes of what a module took and gave in the dry pass; None where it was anything else than one tensor, once."""

    def __init__(self) -> None:
        self.taken: torch.Size | None = None
        self.given: torch.Size | None = None
        self.calls = 0

    def __call__(self, module: nn.Module, arguments: Any, keywords: Any, output: Any) -> None:
        self.calls += 1
        simple = self.calls == 1 and len(arguments) == 1 and not keywords
        simple = simple and isinstance(arguments[0], Tensor) and isinstance(output, Tensor)
        self.taken = arguments[0].shape if simple else None
        self.given = output.shape if simple else None


def _stages_of(backbone: nn.Module) -> tuple[list[nn.Module], list[nn.Module]] | None:
    """What leads from each feature map to the next, and modules that keep the last map's shape; None if not found.

    Some module's children, in their order, must have taken the first feature map and given all the others. One dry pass
    tells; only shapes are compared.
    """
    # The adapters' networks know the sizes of their images.
    model: nn.Module = backbone.model if isinstance(backbone, AdaptedBackbone) else backbone
    calls = {module: _Call() for module in backbone.modules()}
    handles = [module.register_forward_hook(call, with_kwargs=True) for module, call in calls.items()]
    try:
        features, _ = dry_pass(model, backbone)
    except Exception:  # the residual blocks need no dry pass
        return None
    finally:
        for handle in handles:
            handle.remove()

    shapes = [feature.shape for feature in features]
    for owner in backbone.modules():
        children = [child for child in owner.children() if calls[child].calls]
        given = [calls[child].given for child in children]
        if any(shape not in given for shape in shapes):
            continue
        # The deepest child of each shape, as for feature maps.
        ends = [len(given) - 1 - given[::-1].index(shape) for shape in shapes]
        between = children[ends[0] : ends[-1] + 1]
        if ends == sorted(set(ends)) and all(
            calls[after].taken is not None and calls[after].taken == calls[before].given
            for before, after in itertools.pairwise(between)
        ):
            later = [children[start + 1 : end + 1] for start, end in itertools.pairwise(ends)]
            stages = [group[0] if len(group) == 1 else nn.Sequential(*group) for group in later]
            return stages, _shape_keeping(stages[-1] if stages else children[ends[-1]], shapes[-1], calls)
    return None


def _shape_keeping(stage: nn.Module, shape: torch.Size, calls: dict[nn.Module, _Call]) -> list[nn.Module]:
    """The outermost module in `stage` that maps `shape` to `shape`, as many times as its `nn.Sequential` has blocks."""
    level = [stage]
    while level:
        for owner in level:
            blocks = [child for child in owner.children() if next(child.children(), None) is not None]
            for block in blocks:
                if calls[block].taken == calls[block].given == shape:
                    return [block] * (len(blocks) if isinstance(owner, nn.Sequential) else 1)
        level = [child for owner in level for child in owner.children()]
    return []
