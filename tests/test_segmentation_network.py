"""Segmentation networks around any backbone: what each library's networks return, levels, sizes, refusals."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from frskd_fast.models import SegmentationNetwork, adapt_backbone, create_model
from frskd_fast.models.efficientdet_seg import BiFPNSeg

CHANNELS = (4, 6, 8, 10, 12)  # at strides 2 to 32


class Stages(nn.Module):
    """Five convolutions of stride 2, as the encoders of all libraries have them; `form` makes the output."""

    def __init__(self, form: Callable[[Tensor, list[Tensor]], Any]) -> None:
        super().__init__()
        ends = zip((3, *CHANNELS), CHANNELS, strict=False)
        self.stages = nn.ModuleList(nn.Conv2d(before, after, 3, 2, 1) for before, after in ends)
        self.form = form

    def forward(self, images: Tensor) -> Any:
        maps, x = [], images
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return self.form(images, maps)


def mapping(names: list[str]) -> Callable[[Tensor, list[Tensor]], Any]:
    return lambda images, maps: OrderedDict(zip(names, maps[1:], strict=True))


# What returns it -> the form, and the positions of the maps of stride 4 and more in it.
FORMS: dict[str, tuple[Callable[[Tensor, list[Tensor]], Any], list[int]]] = {
    "timm, features_only=True": (lambda images, maps: maps, [1, 2, 3, 4]),
    "torchvision's create_feature_extractor": (mapping(["layer1", "layer2", "layer3", "layer4"]), [0, 1, 2, 3]),
    "segmentation_models_pytorch's encoder": (lambda images, maps: [images, *maps], [2, 3, 4, 5]),
    "one of its transformers": (lambda images, maps: [images, maps[0][:, :0], *maps[1:]], [2, 3, 4, 5]),
    "features and logits": (lambda images, maps: (maps, maps[-1].mean((2, 3))), [1, 2, 3, 4]),
    "two in a tuple": (lambda images, maps: (maps[2], maps[4]), [0, 1]),
    "a dilated network": (lambda images, maps: [maps[1], maps[2], maps[2] + 1, maps[2] * 2], [0, 3]),
    "with a vector": (lambda images, maps: [*maps[3:], maps[-1].mean((2, 3))], [0, 1]),
}


def small(backbone: nn.Module, **settings: Any) -> SegmentationNetwork:
    return SegmentationNetwork(backbone, 5, width=8, head_width=16, **settings)


@pytest.mark.parametrize("name", FORMS)
def test_what_a_backbone_returns(name: str) -> None:
    form, levels = FORMS[name]
    network = small(Stages(form))
    assert network.levels == levels and network.num_classes == 5
    images = torch.randn(2, 3, 75, 133)
    student, teacher, *logits = network(images)
    returned = network.backbone(images)
    returned = returned[0] if name == "features and logits" else returned
    maps = list(returned.values()) if isinstance(returned, dict) else returned
    wanted = [(2, 8, *maps[level].shape[2:]) for level in levels]
    assert [tuple(f.shape) for f in student] == [tuple(f.shape) for f in teacher] == wanted
    assert network.feature_channels == [8] * len(levels)
    assert all(low.shape == (2, 5, *wanted[0][2:]) for low in logits)


def test_every_map_counts_and_both_branches_learn() -> None:
    torch.manual_seed(0)
    network = small(Stages(lambda images, maps: maps), student_layers=1, teacher_layers=1)
    student, teacher, student_maps, teacher_maps = network(torch.randn(2, 3, 64, 96))
    sum(feature.square().mean() for feature in (*student, *teacher, student_maps, teacher_maps)).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())
    assert [type(layer) for layer in (*network.student_pyramid, *network.teacher_pyramid)] == [BiFPNSeg, BiFPNSeg]


def test_the_student_alone_is_the_student_of_both() -> None:
    network = small(Stages(lambda images, maps: maps)).eval()
    images = torch.randn(1, 3, 50, 70).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        both = network(images)
        for part in (network.teacher_pyramid, network.teacher_head):
            part.register_forward_hook(lambda *_: pytest.fail("the self-teacher ran"))
        assert torch.equal(network.student_maps(images), both[2])


@pytest.mark.parametrize(("name", "strides"), [("resnet18", [4, 8, 16, 32]), ("resnet8", [2, 4]), ("wrn_16_1", [2, 4])])
def test_networks_of_this_library(name: str, strides: list[int]) -> None:
    """Those for small images have nothing at stride 8; the two coarsest maps serve. No warning on the way."""
    network = small(create_model(name, 10))
    features = network.eval()(torch.randn(1, 3, 96, 96))[0]
    assert [96 // feature.shape[2] for feature in features] == strides


def test_an_adapted_network_and_chosen_levels() -> None:
    plain = nn.Sequential(
        Stages(lambda images, maps: maps[-1]), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 7)
    )
    adapted = adapt_backbone(plain, ["0.stages.0", "0.stages.1", "0.stages.2"])
    assert small(adapted).levels == [1, 2]
    network = small(adapted, levels=[0, 2])
    assert [feature.shape[2] for feature in network(torch.randn(2, 3, 32, 32))[0]] == [16, 4]


def test_torch_compile_makes_one_graph() -> None:
    network = small(
        Stages(FORMS["segmentation_models_pytorch's encoder"][0]), student_layers=1, teacher_layers=1
    ).eval()
    images = torch.randn(1, 3, 33, 40)
    with torch.no_grad():
        for ours, eager in zip(
            torch.compile(network, fullgraph=True, backend="eager")(images)[2:], network(images)[2:], strict=True
        ):
            torch.testing.assert_close(ours, eager)


def test_a_dry_pass_leaves_no_trace() -> None:
    backbone = create_model("resnet8", 10)
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    torch.manual_seed(3)
    network = small(backbone.train())
    assert network.backbone is backbone and backbone.training
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())


@pytest.mark.parametrize(
    ("form", "error", "message"),
    [
        (lambda images, maps: maps[-1], TypeError, r"returned one tensor of shape \(2, 12, 3, 3\).*features_only=True"),
        (lambda images, maps: None, TypeError, "returned a NoneType, but two or more feature maps"),
        (
            lambda images, maps: [maps[-1].mean((2, 3))],
            TypeError,
            r"1 outputs \(a tensor of shape \(2, 12\)\) on images of 96 x 96",
        ),
        (lambda images, maps: [images, maps[0]], TypeError, "two or more feature maps of different sizes were wanted"),
        (
            lambda images, maps: maps[::-1],
            ValueError,
            "3 x 3, 6 x 6, 12 x 12, 24 x 24, but none may be larger than the one before",
        ),
        (lambda images, maps: [m.permute(0, 2, 3, 1) for m in maps[1:3]], ValueError, r"give maps \(N, C, H, W\)"),
    ],
)
def test_backbones_it_cannot_take(form: Callable[..., Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        small(Stages(form))


@pytest.mark.parametrize("levels", [[0], [1, 1], [1, 9], [0, 1.0], "01", [0, 1]])
def test_levels_it_cannot_take(levels: Any) -> None:
    with pytest.raises(ValueError, match=r"levels is .*, but a list of two or more of \[1, 2, 3, 4, 5\] was wanted"):
        small(Stages(FORMS["segmentation_models_pytorch's encoder"][0]), levels=levels)


def test_other_arguments_it_cannot_take() -> None:
    with pytest.raises(TypeError, match="backbone is a str"):
        SegmentationNetwork("resnet18", 5)  # type: ignore[arg-type]
    for name in ("num_classes", "width", "student_layers", "teacher_layers", "head_width"):
        with pytest.raises(ValueError, match=f"{name} .*0"):
            SegmentationNetwork(nn.Identity(), **{"num_classes": 5, name: 0})
