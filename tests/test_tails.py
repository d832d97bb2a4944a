"""What follows a feature map: found for every family and for other people's networks, or refused with a sentence."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from frskd_fast.models import adapt_backbone, create_model, tail
from frskd_fast.models.tails import tails

SMALL = (3, 32, 32)


class TorchvisionResNet(nn.Module):
    """The order of calls of torchvision's ResNets, and the reshape of older ones."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 7, 2, 3, bias=False), nn.BatchNorm2d(8)
        self.relu, self.maxpool = nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)
        self.layer1 = nn.Sequential(nn.Conv2d(8, 8, 3, 1, 1), nn.ReLU(inplace=True))
        self.layer2 = nn.Sequential(nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU(inplace=True))
        self.avgpool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(16, 5)

    def stem(self, x: Tensor) -> Tensor:
        return self.maxpool(self.relu(self.bn1(self.conv1(x))))

    def forward(self, x: Tensor) -> Tensor:
        x = self.avgpool(self.layer2(self.layer1(self.stem(x))))
        return self.fc(x.view(x.size(0), -1))


class Around(TorchvisionResNet):
    """The stem leads to the logits past the maps."""

    def forward(self, x: Tensor) -> Tensor:
        stem = self.stem(x)
        return self.fc(self.layer2(self.layer1(stem)).mean((2, 3))) + stem.mean()


class Forgetful(TorchvisionResNet):
    """The second map leads nowhere."""

    def forward(self, x: Tensor) -> Tensor:
        first = self.layer1(self.stem(x))
        self.layer2(first)
        return self.fc(first.mean((2, 3)).repeat(1, 2))


class Curious(TorchvisionResNet):
    """What follows the map depends on its values."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer1(self.stem(x))
        return self.fc(self.layer2(x if x.sum() > 0 else -x).mean((2, 3)))


class Bare(TorchvisionResNet):
    """A parameter of no layer."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.scale * self.layer2(self.layer1(self.stem(x))).mean((2, 3)))


class Counting(TorchvisionResNet):
    """The number of images is taken from the images, not from the map."""

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.avgpool(self.layer2(self.layer1(self.stem(x)))).view(len(x), -1))


class Timm(TorchvisionResNet):
    """timm's interface."""

    def forward_intermediates(self, x: Tensor, indices: Any = None, output_fmt: str = "NCHW") -> Any:
        first = self.layer1(self.stem(x))
        second = self.layer2(first)
        return second, [(first, second)[index] for index in (range(2) if indices is None else indices)]

    def forward_head(self, x: Tensor) -> Tensor:
        return self.fc(self.avgpool(x).flatten(1))


def sequential() -> nn.Sequential:
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.5), nn.Linear(16, 5)]
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(inplace=True),
        nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU(inplace=True), *head,
    )  # fmt: skip


NETWORKS: dict[str, Any] = {
    **{
        name: lambda name=name: create_model(name, 5)
        for name in (
            "resnet8",
            "wrn_16_1",
            "wrn16x2",
            "cifarresnet18",
            "vgg8",
            "mobilenetv2",
            "shufflenetv1",
            "shufflenetv2",
        )
    },
    "resnet18": lambda: create_model("resnet18", 5),
    "torchvision": lambda: adapt_backbone(TorchvisionResNet(), ["layer1", "layer2"]),
    "timm": lambda: adapt_backbone(Timm()),
    "outputs": lambda: adapt_backbone(create_model("resnet8", 5)),
    "sequential": lambda: adapt_backbone(sequential(), ["0", "3"]),
    "sequential after the ReLU": lambda: adapt_backbone(sequential(), ["2", "4"]),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_the_rest_of_the_network(name: str) -> None:
    network = NETWORKS[name]()
    network.train()
    before = copy.deepcopy(network.state_dict())
    random = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the dry pass's images are none that a stem should warn of
        found = tails(network, range(len(network.channels)), SMALL)
    assert torch.equal(torch.get_rng_state(), random) and network.training
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    network.eval()
    images = torch.randn(3, 3, 32 if name == "vgg8" else 72, 32)
    features, logits = network(images)
    for feature, one in zip(features, found, strict=True):
        torch.testing.assert_close(one(feature.clone()), logits, rtol=1e-4, atol=1e-5)
        assert {id(parameter) for parameter in one.parameters()} <= {
            id(parameter) for parameter in network.parameters()
        }
    # Something else in the map's place gives something else, and gradients pass through.
    other = torch.randn_like(features[0]).requires_grad_()
    changed = found[0](other)
    assert not torch.allclose(changed, logits, rtol=1e-2)
    changed.sum().backward()
    assert other.grad.abs().sum() > 0


def test_nothing_is_added_to_what_the_network_does() -> None:
    """ResNets of the zoo take negative values as they are; those of FRSKD begin a stage with a ReLU."""
    for name, clips in (("resnet8", False), ("wrn16x2", True)):
        network = create_model(name, 5).eval()
        (one,) = tails(network, [1], SMALL)
        feature = torch.randn(2, network.channels[1], 8, 8)
        assert torch.equal(one(feature), one(F.relu(feature))) is clips
        last = tail(network, 2, SMALL)
        feature = torch.randn(2, network.channels[2], 8, 8)
        torch.testing.assert_close(last(feature), network.fc(feature.mean((2, 3))))


def test_copies_share_the_modules_of_their_network() -> None:
    network = create_model("resnet8", 5).eval()
    one, feature = tail(network, 1, SMALL), torch.randn(2, 32, 8, 8)
    for network_of, again in (copy.deepcopy((network, one)), pickle.loads(pickle.dumps((network, one)))):
        assert torch.equal(again(feature), one(feature))
        nn.init.zeros_(network_of.fc.weight)
        assert not torch.allclose(again(feature), one(feature))
    network.double()
    assert one(feature.double()).dtype == torch.float64
    compiled = torch.compile(one, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(feature.double()), one(feature.double()))


def test_what_cannot_be_found_is_a_sentence() -> None:
    for network, error, sentence in (
        (
            adapt_backbone(Around(), ["layer1", "layer2"]),
            LookupError,
            r"more than its feature map 0 leads .* tails=\[...\]",
        ),
        (adapt_backbone(Forgetful(), ["layer1", "layer2"]), LookupError, "do not come from its feature map 1"),
        (adapt_backbone(Curious(), ["layer1", "layer2"]), LookupError, "feature map 0 cannot be followed"),
        (adapt_backbone(Bare(), ["layer1", "layer2"]), LookupError, "belongs to no layer"),
        (
            adapt_backbone(Counting(), ["layer1", "layer2"]),
            LookupError,
            "are not those of what follows its feature map 0",
        ),
        (create_model("vgg8", 5), LookupError, "only for those of 64 x 64; pass image_shape"),
        (sequential(), TypeError, r"network \(Sequential\) returned a Tensor"),
    ):
        with pytest.raises(error, match=sentence):
            tails(network, [0, 1])
    for stage in (3, -1, "1"):
        with pytest.raises(ValueError, match="hands out 3 feature maps"):
            tail(create_model("resnet8", 5), stage, SMALL)
