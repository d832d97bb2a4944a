"""HSAKD's auxiliary heads: the original's layouts and numbers, and heads for networks that have none of their own."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import toy_method
from golden_utils import fill_parameters, load_golden, state_dict_layout
from test_zoo import parameter_names, standard_deviations, thinned
from torch import Tensor, nn

from frskd_fast.models import (
    AuxiliaryClassifier,
    AuxiliaryNetwork,
    HookedBackbone,
    ResNet,
    adapt_backbone,
    create_model,
    remaining_stages,
    with_auxiliary_heads,
)
from frskd_fast.models import resnet as relu_first
from frskd_fast.models.residual_blocks import BasicBlock, ReLUSequential

# Names of the originals, as create_model takes them.
NETWORKS = [
    *(
        "resnet20_aux",
        "resnet56_aux",
        "resnet8x4_aux",
        "resnet32x4_aux",
        "wrn_16_2_aux",
        "wrn_40_1_aux",
        "wrn_40_2_aux",
    ),
    *("vgg13_bn_aux", "ResNet50_aux", "resnet18_imagenet_aux", "resnet34_imagenet_aux", "resnet50_imagenet_aux"),
]
WITH_NUMBERS = ["resnet8x4_aux", "wrn_16_2_aux", "vgg13_bn_aux"]


@pytest.mark.parametrize("name", NETWORKS)
def test_layout_is_the_originals(name: str) -> None:
    classes = 1000 if "imagenet" in name else 100
    with torch.device("meta"):
        network: Any = create_model(name, classes)
    layout = state_dict_layout(f"HSAKD {name}")
    assert [(key, list(value.shape)) for key, value in network.state_dict().items()] == list(layout.items())
    assert [key for key, _ in network.named_parameters()] == parameter_names(layout)


@pytest.mark.parametrize("name", WITH_NUMBERS)
def test_a_network_meets_the_originals_numbers(name: str) -> None:
    golden = load_golden(f"hsakd_net_{name}")
    network: Any = create_model(name, 10)
    fill_parameters(network)
    network.double()
    seen: list[list[Tensor]] = []
    network.auxiliary_classifier.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    images = golden["images"].double()
    for prefix in ("", "eval_"):
        if f"{prefix}logits" not in golden:
            continue
        with torch.no_grad():
            logits, auxiliary_logits = network.train(not prefix)(images)
        torch.testing.assert_close(logits, golden[f"{prefix}logits"], rtol=1e-9, atol=1e-11)
        assert f"{prefix}aux_logits.{len(auxiliary_logits)}" not in golden
        for head, values in enumerate(auxiliary_logits):
            torch.testing.assert_close(values, golden[f"{prefix}aux_logits.{head}"], rtol=1e-9, atol=1e-11)
    if "feat.0" in golden:
        assert f"feat.{len(seen[0])}" not in golden
        for level, feature in enumerate(seen[0]):
            torch.testing.assert_close(thinned(feature), golden[f"feat.{level}"], rtol=1e-9, atol=1e-11)
            total = feature.abs().sum(dim=(1, 2, 3))
            torch.testing.assert_close(total, golden[f"feat_abs_sum.{level}"], rtol=1e-9, atol=0)


# The linear layers' bias: 0, or PyTorch's own; their weights are PyTorch's in all of these.
@pytest.mark.parametrize(
    ("name", "bias"),
    [("resnet20_aux", False), ("wrn_16_2_aux", False), ("cifar_resnet50_aux", True), ("resnet18_aux", True)],
)
def test_initialisers(name: str, bias: bool) -> None:
    torch.manual_seed(0)
    classifier: Any = create_model(name, 20).auxiliary_classifier.requires_grad_(False)
    deviations = standard_deviations(classifier)
    assert len(deviations) > 4
    for found, wanted in deviations:
        assert found == pytest.approx(wanted, rel=0.05)
    limit = classifier.fc1.in_features**-0.5
    assert 0.95 * limit < float(classifier.fc1.weight.abs().max()) <= limit
    assert bool(classifier.fc1.bias.any()) == bias


def test_vggs_heads_start_as_pytorch_starts_them() -> None:
    torch.manual_seed(0)
    classifier: Any = create_model("vgg8_aux", 20).auxiliary_classifier.requires_grad_(False)
    for layer in classifier.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            limit = layer.weight[0].numel() ** -0.5
            assert 0.95 * limit < float(layer.weight.abs().max()) <= limit and layer.bias.any()


@pytest.mark.parametrize("name", ["resnet8", "resnet18", "cifarresnet18", "wrn_16_1", "vgg11"])
def test_a_step_gives_every_parameter_a_gradient(name: str) -> None:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the ImageNet stem and small images
        network: Any = create_model(f"{name}_aux", 3)
        logits, auxiliary_logits = network(torch.randn(4, 3, 16, 16))
    assert network.num_classes == 3 and network.heads == len(auxiliary_logits) == len(network.backbone.channels)
    assert logits.shape == (4, 3) and all(head.shape == (4, 12) for head in auxiliary_logits)
    joint = torch.arange(4)
    (F.cross_entropy(logits, joint % 3) + sum(F.cross_entropy(head, joint) for head in auxiliary_logits)).backward()
    for key, parameter in network.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), key


@pytest.mark.parametrize("through_call", [True, False])
def test_detached_features_keep_the_heads_from_the_backbone(through_call: bool) -> None:
    network: Any = create_model("resnet8_aux", 3)
    images = torch.randn(2, 3, 8, 8)
    if through_call:
        _, auxiliary_logits = network(images, detach_features=True)
    else:
        network.detach_features = True
        logits, auxiliary_logits = network(images)
        assert logits.requires_grad
        kept = network(images, detach_features=False)[1]
        assert kept[0].grad_fn is not None and torch.autograd.grad(kept[0].sum(), network.backbone.conv1.weight)
    sum(head.sum() for head in auxiliary_logits).backward()
    assert all(parameter.grad is None for parameter in network.backbone.parameters())
    assert all(parameter.grad is not None for parameter in network.auxiliary_classifier.parameters())


def test_heads_of_imagenet_networks_equal_the_textbook_form() -> None:
    torch.manual_seed(0)
    network = ResNet(relu_first.BasicBlock, (1, 1, 1, 2), num_classes=3).double()
    heads = network.build_auxiliary_classifier(3).double()

    def stage(level: int, in_channels: int, stride: int) -> nn.Module:
        width = network.channels[level]
        others = [BasicBlock(width, width)] if level == 3 else []
        return ReLUSequential(BasicBlock(in_channels, width, stride), *others)

    textbook = AuxiliaryClassifier(remaining_stages(network.channels, stage, ReLUSequential), 512, 3, final_relu=True)
    textbook.load_state_dict(heads.state_dict())
    features, _ = network(torch.randn(2, 3, 16, 16, dtype=torch.float64))
    torch.testing.assert_close(heads(features), textbook.double()(features))


def test_one_graph() -> None:
    network = create_model("resnet8_aux", 3).eval()
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        found = torch.compile(network, fullgraph=True, backend="aot_eager")(images)
        torch.testing.assert_close(found, network(images))


# Networks without heads of their own


class Torchvision(nn.Module):
    """layer1 to layer3 in torchvision's form: blocks that keep the shape behind one that does not."""

    def __init__(self, blocks: int = 3, stem: int = 4) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, stem, 3, padding=1)
        channels = [stem, 4, 8, 16]
        for level in (1, 2, 3):
            first = self.block(channels[level - 1], channels[level], 1 if level == 1 else 2)
            others = (self.block(channels[level], channels[level], 1) for _ in range(blocks - 1))
            self.add_module(f"layer{level}", nn.Sequential(first, *others))
        self.fc = nn.Linear(16, 5)

    @staticmethod
    def block(in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
        convolution = nn.Conv2d(in_channels, out_channels, 3, stride, 1)
        return nn.Sequential(convolution, nn.BatchNorm2d(out_channels), nn.ReLU())

    def forward(self, images: Tensor) -> Tensor:
        x = self.conv1(images)
        for level in (1, 2, 3):
            x = getattr(self, f"layer{level}")(x)
        return self.fc(x.mean((2, 3)))


def trains(network: AuxiliaryNetwork) -> None:
    """Heads give 4K logits and every parameter of theirs a gradient."""
    logits, auxiliary_logits = network(torch.randn(2, 3, 16, 16))
    assert [head.shape for head in auxiliary_logits] == [(2, 4 * logits.shape[1])] * network.heads
    sum(head.square().sum() for head in auxiliary_logits).backward()
    assert all(parameter.grad is not None for parameter in network.auxiliary_classifier.parameters())


def test_stages_are_copied_afresh_where_there_are_some() -> None:
    backbone = HookedBackbone(Torchvision(), ["layer1", "layer2", "layer3"])
    nn.init.constant_(backbone.model.layer2[0][0].weight, 7.0)
    backbone.requires_grad_(False).eval()
    network = with_auxiliary_heads(backbone)
    heads = network.auxiliary_classifier
    assert [[len(stage) for stage in getattr(heads, f"block_extractor{level}")] for level in (1, 2)] == [[3, 3], [3]]
    # The last head: three blocks of layer3 that keep the shape.
    assert [block[0].weight.shape for block in heads.block_extractor3] == [(16, 16, 3, 3)] * 3
    assert float(heads.block_extractor1[0][0][0].weight.detach().abs().max()) < 7
    assert float(heads.fc1.bias.detach().abs().max()) == 0 and heads.training
    trains(network)
    assert all(parameter.grad is None for parameter in backbone.parameters())
    first, second = heads.block_extractor2[0][0][0].weight, heads.block_extractor1[1][0][0].weight
    assert not torch.equal(first, second)


def test_a_stage_without_a_block_that_keeps_the_shape_gets_a_residual_block() -> None:
    network = with_auxiliary_heads(HookedBackbone(Torchvision(blocks=1), ["layer1", "layer2", "layer3"]))
    assert type(network.auxiliary_classifier.block_extractor3[0]).__name__ == "BasicBlock"
    trains(network)


def test_one_of_several_children_between_two_maps() -> None:
    layers = [nn.Conv2d(3, 4, 3, 1, 1), nn.ReLU(), nn.Conv2d(4, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
    network = with_auxiliary_heads(adapt_backbone(model, ["1", "4"]))
    assert [type(layer) for layer in network.auxiliary_classifier.block_extractor1[0]] == [
        nn.Conv2d,
        nn.BatchNorm2d,
        nn.ReLU,
    ]
    trains(network)


class Functional(nn.Module):
    """Maps that no children of one module give one from the other."""

    def __init__(self, channels: list[int]) -> None:
        super().__init__()
        self.channels, self.num_classes = channels, 5
        self.stem = nn.Conv2d(3, channels[0], 1)
        self.steps = nn.ModuleList(nn.Conv2d(a, b, 1) for a, b in itertools.pairwise(channels))
        self.fc = nn.Linear(channels[-1], 5)

    def forward(self, images: Tensor) -> tuple[list[Tensor], Tensor]:
        maps = [self.stem(images)]
        for step in self.steps:
            maps.append(step(F.avg_pool2d(maps[-1], 2)))
        return maps, self.fc(maps[-1].mean((2, 3)))


def test_any_other_network_gets_residual_blocks() -> None:
    network = with_auxiliary_heads(Functional([4, 8, 1024]))
    heads = network.auxiliary_classifier
    blocks = [[type(b).__name__ for b in getattr(heads, f"block_extractor{level}")] for level in (1, 2, 3)]
    assert blocks == [["BasicBlock", "Bottleneck"], ["Bottleneck"], ["Bottleneck"]]
    trains(network)


def test_stages_of_several_children_keep_their_last_blocks() -> None:
    network: Any = create_model("wrn16x2_aux", 5)
    heads = network.auxiliary_classifier
    assert [len(stage) for stage in heads.block_extractor1] == [2, 2]  # a group and its BatchNorm
    assert [type(block).__name__ for block in heads.block_extractor3] == ["WideBlock", "WideBlock"]
    trains(network)


def test_a_copied_stage_does_not_write_into_the_map_it_reads() -> None:
    layers = [nn.Conv2d(3, 4, 3, 1, 1), nn.Tanh(), nn.ReLU(inplace=True), nn.Conv2d(4, 8, 2, 2), nn.ReLU(inplace=True)]
    model = nn.Sequential(layers[0], nn.Sequential(*layers[1:2]), nn.Sequential(*layers[2:]), nn.AdaptiveAvgPool2d(1))
    model.extend([nn.Flatten(), nn.Linear(8, 5)])
    network = with_auxiliary_heads(HookedBackbone(model, ["1", "2"]))
    assert len(network.auxiliary_classifier.block_extractor1[0]) == 3
    maps = [torch.randn(2, 4, 8, 8), torch.randn(2, 8, 4, 4)]
    before = [feature.clone() for feature in maps]
    network.auxiliary_classifier(maps)
    assert all(torch.equal(feature, want) for feature, want in zip(maps, before, strict=True))


def test_a_users_own_network_gets_heads() -> None:
    trains(with_auxiliary_heads(toy_method.ToyNet(5)))


def test_heads_follow_the_backbones_device_and_dtype() -> None:
    network = with_auxiliary_heads(Functional([4, 8]).to("meta", torch.bfloat16), num_classes=9, detach_features=True)
    assert network.detach_features and network.num_classes == 9 and network.backbone.num_classes == 5
    assert {(p.device.type, p.dtype) for p in network.auxiliary_classifier.parameters()} == {("meta", torch.bfloat16)}


def test_building_heads_leaves_no_trace_in_the_backbone() -> None:
    backbone = HookedBackbone(Torchvision(), ["layer1", "layer2", "layer3"])
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    modes = [module.training for module in backbone.modules()]
    hooks = sum(len(module._forward_hooks) for module in backbone.modules())
    with_auxiliary_heads(backbone)
    assert all(torch.equal(value, before[key]) for key, value in backbone.state_dict().items())
    assert [module.training for module in backbone.modules()] == modes
    assert sum(len(module._forward_hooks) for module in backbone.modules()) == hooks


def test_a_network_with_heads_is_returned_as_it_is() -> None:
    network = create_model("resnet8_aux", 3)
    assert with_auxiliary_heads(network) is network and with_auxiliary_heads(network, 3) is network
    with pytest.raises(ValueError, match="num_classes is 4, but the heads of this network were built for 3 classes"):
        with_auxiliary_heads(network, 4)
    assert with_auxiliary_heads(network, detach_features=False) is network
    with pytest.raises(
        ValueError, match="detach_features is True, but this network has heads with detach_features=False"
    ):
        with_auxiliary_heads(network, detach_features=True)


def test_no_residual_blocks_are_built_where_stages_are_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("frskd_fast.models.auxiliary.BasicBlock", None)
    with_auxiliary_heads(HookedBackbone(Torchvision(), ["layer1", "layer2", "layer3"]))


def without(attribute: str) -> nn.Module:
    network = Functional([4, 8])
    delattr(network, attribute)
    return network


@pytest.mark.parametrize(
    ("build", "error", "sentence"),
    [
        (lambda: with_auxiliary_heads(without("num_classes")), ValueError, "has no attribute num_classes"),
        (lambda: with_auxiliary_heads(without("channels")), TypeError, "has no list of channels"),
        (lambda: AuxiliaryClassifier([nn.Identity()], [3, 4], 2), ValueError, "widths holds 2 items, but one for each"),
        (lambda: AuxiliaryClassifier([nn.Identity()], 3, 0), ValueError, "num_classes must be at least 1"),
        (lambda: AuxiliaryClassifier([nn.Identity()], 3, 2)([]), ValueError, "features holds 0 maps, .* has 1 heads"),
    ],
)
def test_wrong_arguments_are_refused(build: Callable[[], Any], error: type[Exception], sentence: str) -> None:
    with pytest.raises(error, match=sentence):
        build()
