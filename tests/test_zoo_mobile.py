"""MobileNetV2, ShuffleNet V1 and V2: the originals' keys, numbers, sizes and initialisation."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from golden_utils import fill_parameters, load_golden, state_dict_layout
from torch import Tensor, nn

from frskd_fast.models import ProjectionHead, create_model

# Our name, and the original's.
NAMES = {"mobilenetv2": "MobileNetV2", "shufflenetv1": "ShuffleV1", "shufflenetv2": "ShuffleV2"}
CHANNELS = {"mobilenetv2": [12, 16, 48, 160], "shufflenetv1": [240, 480, 960], "shufflenetv2": [116, 232, 464]}
HSAKD_NAMES = {**NAMES, "mobilenetv2": "mobilenetV2"}


def close(ours: Tensor, golden: Tensor) -> None:
    torch.testing.assert_close(ours, golden, rtol=1e-9, atol=1e-9 * float(golden.abs().max()))


def check_features(features: list[Tensor], golden: dict[str, Tensor], first: int) -> None:
    """Against the originals' maps, of which index `first` is our finest: their sums, and every n-th number."""
    for level, feature in enumerate(features, first):
        close(feature.abs().sum(dim=(1, 2, 3)), golden[f"feat_abs_sum.{level}"])
        steps = [max(1, extent // parts) for extent, parts in zip(feature.shape[1:], (8, 4, 4), strict=True)]
        close(feature[:, :: steps[0], :: steps[1], :: steps[2]], golden[f"feat.{level}"])
    assert f"feat.{first + len(features)}" not in golden


@pytest.mark.parametrize("name", NAMES)
def test_layout_is_the_originals(name: str) -> None:
    with torch.device("meta"):
        network = ProjectionHead(create_model(name))
    layout = state_dict_layout(f"SSKD wrapper({NAMES[name]})")
    assert [(key, list(value.shape)) for key, value in network.state_dict().items()] == list(layout.items())


@pytest.mark.parametrize("name", ["mobilenetv2", "shufflenetv1"])
def test_outputs_are_those_of_sskd(name: str) -> None:
    golden = load_golden(f"sskd_net_{NAMES[name]}")
    network = ProjectionHead(create_model(name, 10))
    fill_parameters(network)
    network.double()
    images = golden["images"].double()
    maps: list[Tensor] = []
    handle = network.backbone.register_forward_hook(lambda module, arguments, output: maps.extend(output[0]))
    logits, projections, features = network(images)
    handle.remove()
    check_features(maps, golden, first=1)
    for ours, key in ((logits, "logits"), (features, "feature"), (projections, "proj")):
        close(ours, golden[key])
    with torch.no_grad():
        close(network.eval()(images)[0], golden["eval_logits"])


@pytest.mark.parametrize("name", NAMES)
def test_layout_with_heads_is_the_originals(name: str) -> None:
    with torch.device("meta"):
        network = create_model(f"{HSAKD_NAMES[name]}_aux")
    layout = state_dict_layout(f"HSAKD {HSAKD_NAMES[name]}_aux")
    assert [(key, list(value.shape)) for key, value in network.state_dict().items()] == list(layout.items())
    assert type(network.backbone) is type(create_model(name, 2))


@pytest.mark.parametrize("name", ["mobilenetv2", "shufflenetv1"])
def test_outputs_with_heads_are_those_of_hsakd(name: str) -> None:
    golden = load_golden(f"hsakd_net_{HSAKD_NAMES[name]}_aux")
    network = create_model(f"{name}_aux", 10)
    fill_parameters(network)
    network.double()
    images = golden["images"].double()
    maps: list[Tensor] = []
    handle = network.backbone.register_forward_hook(lambda module, arguments, output: maps.extend(output[0]))
    with torch.no_grad():
        outputs = {"": network(images), "eval_": network.eval()(images)}
    handle.remove()
    check_features(maps[: network.heads], golden, first=0)
    for prefix, (logits, auxiliary) in outputs.items():
        close(logits, golden[f"{prefix}logits"])
        for level, head in enumerate(auxiliary):
            close(head, golden[f"{prefix}aux_logits.{level}"])


@pytest.mark.parametrize("name", NAMES)
def test_heads_start_as_the_originals(name: str) -> None:
    torch.manual_seed(0)
    network = create_model(f"{name}_aux", 5)
    assert network.heads == len(network.backbone.channels)
    heads = network.auxiliary_classifier
    weight, bias = heads.fc1.weight.detach(), heads.fc1.bias.detach()
    deviation = 0.01 if name == "mobilenetv2" else 1 / math.sqrt(3 * weight.shape[1])  # PyTorch's own
    assert abs(float(weight.std()) / deviation - 1) < 0.05
    assert bool(bias.any()) == (name == "shufflenetv2")
    convolutions = [module.weight.detach() for module in heads.modules() if isinstance(module, nn.Conv2d)]
    fan_out = [float(weight.std()) / math.sqrt(2 / weight[:, 0].numel()) for weight in convolutions]
    assert all(abs(ratio - 1) < 0.2 for ratio in fan_out) == (name != "shufflenetv2")


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_maps_before_their_relu_and_other_sizes(name: str) -> None:
    torch.manual_seed(0)
    network = create_model(name, 7).eval()
    channels = CHANNELS[name]
    assert network.channels == channels and network.num_classes == 7
    for size in (32, 45):
        images = torch.randn(2, 3, size, size)
        features, logits = network(images)
        before, again = network(images, preact=True)
        assert torch.equal(logits, again) and logits.shape == (2, 7)
        expected = math.ceil(size / 2)
        for feature, map_before, wanted in zip(features, before, channels, strict=True):
            assert feature.shape == (2, wanted, expected, expected)
            if name == "mobilenetv2":
                assert torch.equal(feature, map_before)
            else:
                assert map_before.min() < 0 and torch.equal(feature, map_before.relu())
            expected = math.ceil(expected / 2)
    with pytest.raises(ValueError, match="must have 3 channels"):
        network(images[:, :1])


@pytest.mark.parametrize("name", NAMES)
def test_channels_last_stays_and_one_graph_holds_it(name: str) -> None:
    torch.manual_seed(0)
    network = create_model(name, 7)
    images = torch.randn(2, 3, 32, 32)
    wanted = network(images)
    features, logits = network.to(memory_format=torch.channels_last)(
        images.contiguous(memory_format=torch.channels_last)
    )
    assert all(feature.is_contiguous(memory_format=torch.channels_last) for feature in features)
    torch.testing.assert_close(logits, wanted[1], rtol=1e-4, atol=1e-4)
    if name == "shufflenetv1":
        torch.compiler.reset()
        compiled = torch.compile(network, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(images, preact=True)[0], network(images, preact=True)[0])


@pytest.mark.parametrize("name", NAMES)
def test_a_training_step_reaches_every_parameter(name: str) -> None:
    torch.manual_seed(0)
    network = create_model(f"{name}_aux", 3)
    logits, auxiliary = network(torch.randn(4, 3, 32, 32))
    joint = torch.arange(4)
    loss = F.cross_entropy(logits, joint % 3) + sum(F.cross_entropy(head, joint) for head in auxiliary)
    loss.backward()
    for key, parameter in network.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any(), key


def test_mobilenet_starts_as_the_original() -> None:
    torch.manual_seed(0)
    network = create_model("mobilenetv2")
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            deviation = math.sqrt(2 / (math.prod(module.kernel_size) * module.out_channels))
            slack = 5 / math.sqrt(module.weight.numel())
            assert abs(float(module.weight.detach().std()) / deviation - 1) < slack
    assert abs(float(network.classifier.weight.detach().std()) / 0.01 - 1) < 0.02
    assert not network.classifier.bias.any()
    with pytest.raises(ValueError, match="stem_stride is 3, but 1"):
        create_model("mobilenetv2", stem_stride=3)
