"""SSKD's projection head on networks of this library and of others: what it computes, and that it goes anywhere."""

from __future__ import annotations

import copy
import os
import pickle
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from frskd_fast.models import ProjectionHead, WideResNet, adapt_backbone, create_model
from frskd_fast.models.last_linear import last_linear


def foreign() -> nn.Sequential:
    """A network that returns its logits alone."""
    return nn.Sequential(
        nn.Conv2d(3, 4, 2, 2), nn.Conv2d(4, 8, 2, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)
    )


BACKBONES = {
    "ours": lambda: WideResNet(depth=10, widen_factor=1, num_classes=5),
    "adapted": lambda: adapt_backbone(foreign(), ["0", "1"]),
    "foreign": foreign,
}


@pytest.fixture(params=BACKBONES)
def network(request: pytest.FixtureRequest) -> ProjectionHead:
    torch.manual_seed(0)
    return ProjectionHead(BACKBONES[request.param]()).eval()


@pytest.fixture
def images() -> Tensor:
    return torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def test_features_are_the_input_of_the_classifier(network: ProjectionHead, images: Tensor) -> None:
    logits, projections, features = network(images)
    alone = network.backbone(images)
    assert torch.equal(logits, alone if isinstance(alone, Tensor) else alone[1])
    assert torch.equal(logits, network.get_submodule(network.classifier_name)(features))
    assert torch.equal(projections, network.proj_head(features))
    assert features.shape == projections.shape == (3, network.num_features)
    assert logits.shape == (3, network.num_classes)
    heads = [name for name in network.state_dict() if not name.startswith("backbone.")]
    assert heads == ["proj_head.0.weight", "proj_head.0.bias", "proj_head.2.weight", "proj_head.2.bias"]


# D of SSKD's pairs.
WIDTHS = {
    "resnet56": 64,
    "wrn_40_1": 64,
    "wrn_16_2": 128,
    "resnet32x4": 256,
    "vgg13": 512,
    "shufflenetv1": 960,
    "shufflenetv2": 1024,
    "mobilenetv2": 1280,
    "cifar_resnet50": 2048,
}


@pytest.mark.parametrize("name", WIDTHS)
def test_width_on_every_family_of_the_zoo(name: str) -> None:
    with torch.device("meta"):
        network = ProjectionHead(create_model(name, 7))
        logits, projections, features = network(torch.zeros(2, 3, 32, 32))
    assert projections.shape == features.shape == (2, WIDTHS[name]) and logits.shape == (2, 7)
    assert network.classifier_name == f"backbone.{network.backbone.classifier_name}"


def test_detached_features_keep_gradients_from_the_backbone(network: ProjectionHead, images: Tensor) -> None:
    logits, projections, features = network(images, detach_features=True)
    assert logits.requires_grad and not features.requires_grad
    projections.square().sum().backward()
    assert all(parameter.grad is None for parameter in network.backbone.parameters())
    assert all(parameter.grad is not None for parameter in network.proj_head.parameters())
    network(images)[1].square().sum().backward()
    assert next(network.backbone.parameters()).grad is not None


def test_one_graph_holds_everything(network: ProjectionHead, images: Tensor) -> None:
    torch.compiler.reset()
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    for detach in (False, True):
        for got, wanted in zip(compiled(images, detach), network(images, detach), strict=True):
            torch.testing.assert_close(got, wanted)
            assert got.requires_grad == wanted.requires_grad


def test_copies_and_pickles_read_their_own_features(network: ProjectionHead, images: Tensor) -> None:
    wanted = network(images)
    for other in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.mul_(1.5)
        assert all(torch.equal(a, b) for a, b in zip(other(images), wanted, strict=True))
        network.load_state_dict(other.state_dict())


def test_functional_calls_and_export(network: ProjectionHead, images: Tensor) -> None:
    wanted = network(images)
    state = {name: value.clone() for name, value in network.state_dict().items()}
    with torch.no_grad():
        network.proj_head[2].bias.add_(1.0)
    called = torch.func.functional_call(network, state, (images,))
    exported = torch.export.export(network, (images,), strict=False).module()(images)
    for a, b in zip(called, wanted, strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(exported[1], wanted[1] + 1.0)


@pytest.fixture
def process_group() -> Iterator[None]:
    os.environ.setdefault("MASTER_ADDR", "localhost")
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_gradients_under_distributed_data_parallel(
    network: ProjectionHead, images: Tensor, process_group: None
) -> None:
    alone = copy.deepcopy(network)
    for module in (torch.nn.parallel.DistributedDataParallel(network), alone):
        logits, projections, _ = module(images)
        (logits.square().sum() + projections.square().sum()).backward()
    for ours, wanted in zip(network.parameters(), alone.parameters(), strict=True):
        assert (ours.grad is None) == (wanted.grad is None)
        if ours.grad is not None and wanted.grad is not None:
            torch.testing.assert_close(ours.grad, wanted.grad)


def test_nothing_is_kept_after_a_call_or_an_error(images: Tensor) -> None:
    network = ProjectionHead(foreign())
    network.backbone(images)
    assert network._input.value is None
    with pytest.raises(RuntimeError):
        network(images[:, :1])
    network.backbone(images)
    assert network._input.value is None


def test_dtype_and_device_are_the_classifiers() -> None:
    network = ProjectionHead(foreign().to(torch.float64))
    assert {parameter.dtype for parameter in network.parameters()} == {torch.float64}
    with torch.device("meta"):
        backbone = foreign()
    assert all(parameter.is_meta for parameter in ProjectionHead(backbone).parameters())


class Odd(nn.Module):
    """Its classifier was registered before another linear layer."""

    def __init__(self, called: bool) -> None:
        super().__init__()
        self.classifier, self.gate, self.called = nn.Linear(3, 5), nn.Linear(3, 3), called

    def forward(self, images: Tensor) -> Tensor:
        vectors = images.mean((2, 3))
        logits: Tensor = self.classifier(self.gate(vectors) if self.called else vectors)
        return logits


def test_the_classifier_can_be_named(images: Tensor) -> None:
    for called in (False, True):
        with pytest.raises(ValueError, match=r"name the right one: ProjectionHead\(backbone, classifier="):
            ProjectionHead(Odd(called))(images)
    assert ProjectionHead(Odd(True), classifier="classifier")(images)[0].shape == (3, 5)
    odd = Odd(True)
    odd.classifier_name = "classifier"
    assert last_linear(odd) == "classifier"


def test_refusals_are_sentences(images: Tensor) -> None:
    with pytest.raises(TypeError, match="backbone is a str"):
        ProjectionHead("wrn_16_2")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="it has no linear layer at all; name the layer"):
        ProjectionHead(nn.Conv2d(3, 4, 1))
    with pytest.raises(ValueError, match="under the name 'fc', but its linear layers are 5"):
        ProjectionHead(foreign(), classifier="fc")
    with pytest.raises(TypeError, match=r"returned a Tensor, but logits \(N, K\)"):
        ProjectionHead(nn.Sequential(nn.Flatten(), nn.Linear(768, 4), nn.Unflatten(1, (2, 2))))(images)
