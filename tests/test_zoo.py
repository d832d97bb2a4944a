"""The CIFAR networks of RepDistiller, SSKD and HSAKD: their layouts, numbers and initialisers, and what ours add."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from golden_utils import fill_parameters, load_golden, state_dict_layout
from torch import Tensor, nn

from frskd_fast.models import create_model
from frskd_fast.models._checks import check_features

# Name -> the original's name in the golden files.
NETWORKS = {
    "resnet8": "resnet8",
    "resnet14": "resnet14",
    "resnet20": "resnet20",
    "resnet32": "resnet32",
    "resnet44": "resnet44",
    "resnet56": "resnet56",
    "resnet110": "resnet110",
    "resnet8x4": "resnet8x4",
    "resnet32x4": "resnet32x4",
    "cifar_resnet50": "ResNet50",
    "wrn_16_1": "wrn_16_1",
    "wrn_16_2": "wrn_16_2",
    "wrn_40_1": "wrn_40_1",
    "wrn_40_2": "wrn_40_2",
    "vgg8": "vgg8",
    "vgg11": "vgg11_bn",
    "vgg13": "vgg13",
    "vgg16": "vgg16_bn",
    "vgg19": "vgg19_bn",
}
WITH_LAYOUT = [
    *("resnet8", "resnet20", "resnet56", "resnet8x4", "resnet32x4", "cifar_resnet50"),
    *("wrn_16_1", "wrn_16_2", "wrn_40_1", "wrn_40_2", "vgg8", "vgg13"),
]
ONE_OF_A_FAMILY = ["resnet8", "cifar_resnet50", "wrn_16_1", "vgg8"]


def parameter_names(layout: dict[str, list[int]]) -> list[str]:
    """The keys that are no statistics."""
    buffers = ("running_mean", "running_var", "num_batches_tracked")
    return [key for key in layout if not key.endswith(buffers)]


def thinned(feature: Tensor) -> Tensor:
    """The entries of a map that the golden files hold."""
    return feature[
        (
            slice(None),
            *(
                slice(None, None, max(1, size // parts))
                for size, parts in zip(feature.shape[1:], (8, 4, 4), strict=True)
            ),
        )
    ]


@pytest.mark.parametrize("name", WITH_LAYOUT)
def test_layout_is_the_originals(name: str) -> None:
    with torch.device("meta"):
        network = create_model(name, 100)
    layout = state_dict_layout(f"SSKD wrapper({NETWORKS[name]})")
    backbone = {key.removeprefix("backbone."): shape for key, shape in layout.items() if key.startswith("backbone.")}
    assert [(key, list(value.shape)) for key, value in network.state_dict().items()] == list(backbone.items())
    # The order of parameters decides which one an optimiser's state belongs to.
    assert [key for key, _ in network.named_parameters()] == parameter_names(backbone)


@pytest.mark.parametrize("name", NETWORKS)
def test_what_a_network_says_of_itself(name: str) -> None:
    with torch.device("meta"):
        network: Any = create_model(name, 7)
        features, logits = network(torch.zeros(2, 3, 32, 32))
        assert type(create_model(NETWORKS[name], 7)) is type(network)
    check_features(features, network.channels)
    assert features[0].shape[2:] == (32, 32) and logits.shape == (2, network.num_classes) == (2, 7)


@pytest.mark.parametrize("name", [*NETWORKS, "cifarresnet18", "resnet18", "resnet34", "resnet50", "wrn16x2"])
def test_the_classifiers_name_is_that_of_the_last_layer(name: str) -> None:
    with torch.device("meta"):
        network: Any = create_model(name, 7)
    classifier = network.get_submodule(network.classifier_name)
    assert isinstance(classifier, nn.Linear) and classifier is list(network.modules())[-1]


# The original's numbers


class Recorded(nn.Module):
    """SSKD's wrapper, which the golden files were filled as; it keeps the classifier's input and one more map."""

    def __init__(self, backbone: nn.Module, more: str) -> None:
        super().__init__()
        self.backbone: Any = backbone
        classifier: Any = backbone.get_submodule(self.backbone.classifier_name)
        width = classifier.in_features
        self.proj_head = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))
        self.kept: dict[str, Tensor] = {}
        classifier.register_forward_pre_hook(lambda _, arguments: self.kept.update(feature=arguments[0]))
        # Cloned, because a ReLU may follow in place.
        backbone.get_submodule(more).register_forward_hook(lambda _, __, out: self.kept.update(more=out.clone()))

    def forward(self, images: Tensor) -> dict[str, Any]:
        features, logits = self.backbone(images)
        feature = self.kept["feature"]
        return {
            "features": features,
            "more": self.kept["more"],
            "logits": logits,
            "feature": feature,
            "proj": self.proj_head(feature),
        }


# Name -> the module of the map that the original hands out besides, its position, and what comes between.
MORE: dict[str, tuple[str, int, Callable[[Tensor], Tensor]]] = {
    "resnet20": ("bn1", 0, F.relu),
    "resnet8x4": ("bn1", 0, F.relu),
    "cifar_resnet50": ("bn1", 0, F.relu),
    "wrn_16_2": ("conv1", 0, torch.clone),
    "wrn_40_1": ("conv1", 0, torch.clone),
    "vgg8": ("block3", 3, F.relu),
}


@pytest.mark.parametrize("name", MORE)
def test_a_network_meets_the_originals_numbers(name: str) -> None:
    golden = load_golden(f"sskd_net_{NETWORKS[name]}")
    module, position, between = MORE[name]
    network = Recorded(create_model(name, 10), module)
    fill_parameters(network)
    network.double()
    images = golden["images"].double()
    with torch.no_grad():
        found = network(images)
    for key in ("logits", "feature", "proj"):
        torch.testing.assert_close(found[key], golden[key], rtol=1e-9, atol=1e-11)
    if "eval_logits" in golden:
        with torch.no_grad():
            eval_logits = network.eval()(images)["logits"]
        torch.testing.assert_close(eval_logits, golden["eval_logits"], rtol=1e-9, atol=1e-11)
        maps = list(found["features"])
        maps.insert(position, between(found["more"]))
        assert f"feat.{len(maps)}" not in golden
        for index, feature in enumerate(maps):
            torch.testing.assert_close(thinned(feature), golden[f"feat.{index}"], rtol=1e-9, atol=1e-11)
            total = feature.abs().sum(dim=(1, 2, 3))
            torch.testing.assert_close(total, golden[f"feat_abs_sum.{index}"], rtol=1e-9, atol=0)


# Initialisers


def standard_deviations(network: nn.Module) -> list[tuple[float, float]]:
    """Of each convolution with many weights: found, and sqrt(2 / (kernel area * output channels))."""
    return [
        (float(layer.weight.detach().std()), math.sqrt(2 / (layer.weight[0, 0].numel() * layer.out_channels)))
        for layer in network.modules()
        if isinstance(layer, nn.Conv2d) and layer.weight.numel() > 4000
    ]


# Name -> standard deviation of the classifier's weights, None for PyTorch's own, uniform up to 1 / sqrt(inputs); its bias.
@pytest.mark.parametrize(
    ("name", "deviation", "bias"),
    [("resnet20", None, True), ("cifar_resnet50", None, True), ("wrn_16_2", None, False), ("vgg8", 0.01, False)],
)
def test_initialisers(name: str, deviation: float | None, bias: bool) -> None:
    torch.manual_seed(0)
    network: Any = create_model(name, 50).requires_grad_(False)
    deviations = standard_deviations(network)
    assert len(deviations) > 3
    for found, wanted in deviations:
        assert found == pytest.approx(wanted, rel=0.05)
    convolutions = [layer for layer in network.modules() if isinstance(layer, nn.Conv2d) and layer.bias is not None]
    assert len(convolutions) == (5 if name == "vgg8" else 0) and not any(layer.bias.any() for layer in convolutions)
    classifier: Any = network.get_submodule(network.classifier_name)
    limit = classifier.in_features**-0.5
    if deviation is None:
        assert 0.95 * limit < float(classifier.weight.abs().max()) <= limit
    else:
        assert float(classifier.weight.std()) == pytest.approx(deviation, rel=0.05)
    largest = float(classifier.bias.abs().max())
    assert 0.5 * limit < largest <= limit if bias else largest == 0


# What ours add


@pytest.mark.parametrize("name", NETWORKS)
def test_a_step_gives_every_parameter_a_gradient(name: str) -> None:
    torch.manual_seed(0)
    network = create_model(name, 5)
    _, logits = network(torch.randn(4, 3, 8, 8))
    loss = F.cross_entropy(logits, torch.tensor([0, 1, 2, 3]))
    loss.backward()
    torch.optim.SGD(network.parameters(), lr=0.01).step()
    for key, parameter in network.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), key


@pytest.mark.parametrize("name", ONE_OF_A_FAMILY)
def test_any_image_size(name: str) -> None:
    with torch.device("meta"):
        network: Any = create_model(name, 5)
        for size in ((96, 64), (33, 50), (7, 9)):
            features, logits = network(torch.zeros(2, 3, *size))
            check_features(features, network.channels)
            assert features[0].shape[2:] == size and logits.shape == (2, 5)


@pytest.mark.parametrize("name", ["resnet8", "vgg8"])
def test_preact_maps_are_those_before_the_relu(name: str) -> None:
    torch.manual_seed(0)
    network = create_model(name, 5)
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        network(images)
        network.eval()
        features, logits = network(images)
        before, same_logits = network(images, preact=True)
    assert torch.equal(logits, same_logits)
    for feature, early in zip(features, before, strict=True):
        assert early.min() < 0 and torch.equal(F.relu(early), feature)


def test_preact_maps_of_a_wide_network_are_what_its_batch_norms_make_of_them() -> None:
    torch.manual_seed(0)
    network: Any = create_model("wrn_16_1", 5).double()
    other = copy.deepcopy(network)
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    features, logits = network(images)
    before, same_logits = other(images, preact=True)
    torch.testing.assert_close(logits, same_logits)
    # One pass gathers statistics once, with and without preact.
    torch.testing.assert_close(network.state_dict(), other.state_dict())
    for feature, early, batch_norm in zip(features, before, network.get_bn_before_relu(), strict=True):
        torch.testing.assert_close(early, batch_norm(feature))


def test_vgg_pools_images_of_64_pixels_once_more_as_the_original_does() -> None:
    with torch.device("meta"):
        network: Any = create_model("vgg8", 5)
        sizes = {
            side: [feature.shape[-1] for feature in network(torch.zeros(2, 3, side, side))[0]] for side in (64, 65)
        }
    assert sizes == {64: [64, 32, 16, 4], 65: [65, 33, 17, 9]}


def test_channels_last_gives_the_same_numbers_and_stays() -> None:
    torch.manual_seed(0)
    network = create_model("resnet8", 5).double()
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    wanted, wanted_logits = network(images)
    features, logits = network.to(memory_format=torch.channels_last)(images.to(memory_format=torch.channels_last))
    torch.testing.assert_close(logits, wanted_logits)
    for feature, want in zip(features, wanted, strict=True):
        assert feature.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(feature, want)


def test_one_graph() -> None:
    torch.manual_seed(0)
    network = create_model("resnet8", 5)
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        features, logits = compiled.eval()(images)
        wanted, wanted_logits = network(images)
    torch.testing.assert_close([*features, logits], [*wanted, wanted_logits])


@pytest.mark.parametrize("name", ONE_OF_A_FAMILY)
def test_wrong_images_are_refused(name: str) -> None:
    with torch.device("meta"), pytest.raises(ValueError, match="images must have 3 channels"):
        create_model(name, 5)(torch.zeros(2, 1, 32, 32))
