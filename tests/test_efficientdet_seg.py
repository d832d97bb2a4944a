"""FRSKD's segmentation network: the original's layout and numbers, any image size, and what ours adds."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from golden_utils import fill_parameters, golden_settings, load_golden, state_dict_layout
from torch import Tensor
from torch.nn import functional as F

from frskd_fast.models import EfficientDetSeg, adapt_backbone, create_model
from frskd_fast.models.efficientdet_seg import BiFPNSeg
from frskd_fast.models.fixed_padding import FixedPaddingConv2d
from frskd_fast.tasks import FRSKDTask

PARAMETERS = (4_327_590, 7_127_946, 8_592_940)
# Left and right padding of the five convolutions that halve the map.
PADDINGS = (
    [(0, 1), (0, 1), (1, 2), (0, 1), (1, 2)],
    [(0, 1), (0, 1), (1, 2), (0, 1), (2, 2)],
    [(0, 1), (0, 1), (2, 2), (1, 1), (2, 2)],
)
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def filled(num_classes: int = 21, original_resizing: bool = False) -> EfficientDetSeg:
    network = EfficientDetSeg(0, num_classes, original_resizing)
    fill_parameters(network)
    return network.double()


def normalised(images: Tensor) -> Tensor:
    mean, deviation = (torch.tensor(row, dtype=torch.float64).view(1, 3, 1, 1) for row in (MEAN, DEVIATION))
    return (images.double() / 255 - mean) / deviation


def thinned(feature: Tensor) -> Tensor:
    """The entries of a map that the golden files hold."""
    return feature[:, ::8, :: max(1, feature.shape[2] // 4), :: max(1, feature.shape[3] // 4)]


# The original's layout and numbers


@pytest.mark.parametrize("compound", [0, 1, 2])
def test_layout_is_the_originals(compound: int) -> None:
    with torch.device("meta"):
        network = create_model(f"efficientdet_seg_d{compound}", num_classes=21)
    layout = state_dict_layout(f"FRSKD seg d{compound}")
    assert [(key, list(value.shape)) for key, value in network.state_dict().items()] == list(layout.items())
    assert sum(parameter.numel() for parameter in network.parameters()) == PARAMETERS[compound]
    assert [key for key, _ in network.named_parameters()] == [
        key for key in layout if not key.endswith(("running_mean", "running_var", "num_batches_tracked"))
    ]


@pytest.mark.parametrize("compound", [0, 1, 2])
def test_paddings_are_those_of_the_nominal_image(compound: int) -> None:
    with torch.device("meta"):
        network = EfficientDetSeg(compound)
    strided = [m for m in network.modules() if isinstance(m, FixedPaddingConv2d) and m.stride == (2, 2)]
    assert [(m.padding[0], int(m.padding[0]) + m.more) for m in strided] == PADDINGS[compound]
    others = [m for m in network.modules() if isinstance(m, FixedPaddingConv2d) and m.stride == (1, 1)]
    assert all((m.padding[0], m.more) == (m.kernel_size[0] // 2, 0) for m in others)


@pytest.mark.parametrize(("case", "original_resizing"), [("seg_net_d0", False), ("seg_net_d0_96x160", True)])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_the_network_meets_the_originals_numbers(
    case: str, original_resizing: bool, memory_format: torch.memory_format
) -> None:
    golden = load_golden(case)
    network = filled(original_resizing=original_resizing).to(memory_format=memory_format)
    images = normalised(golden["images"]).contiguous(memory_format=memory_format)
    for mode in ("", "eval_"):
        network.train(mode == "")
        with torch.no_grad():
            student, teacher, *maps = network(images)
            alone = network.eval().student_maps(images) if mode else None
        for name, features in (("pyramid", student), ("refined", teacher)):
            for level, feature in enumerate(features):
                torch.testing.assert_close(
                    thinned(feature), golden[f"{mode}{name}.{level}"], rtol=1e-9, atol=1e-9, msg=f"{mode}{name}.{level}"
                )
        for name, low in zip(("student", "teacher"), maps, strict=True):
            full = F.interpolate(low, images.shape[2:], mode="bilinear", align_corners=False)
            expected = golden[f"{mode}{name}_logits"]
            torch.testing.assert_close(full[:, :, ::16, ::16], expected, rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(full.abs().sum((2, 3)), golden[f"{mode}{name}_abs_sum"], rtol=1e-9, atol=1e-9)
        assert alone is None or torch.equal(alone, maps[0])


@pytest.mark.parametrize("case", ["seg_bifpn_mid", "seg_bifpn_last"])
def test_a_pyramid_layer_meets_the_originals_numbers_and_gradients(case: str) -> None:
    settings, golden = golden_settings(case), load_golden(case)
    layer = BiFPNSeg(settings["num_channels"], settings["is_last"])
    assert {key: list(value.shape) for key, value in layer.state_dict().items()} == settings["keys"]
    layer.load_state_dict(
        {k.removeprefix("param."): v for k, v in golden.items() if k.startswith("param.")}, strict=False
    )
    layer.double()
    maps = [golden[f"feats_in.{level}"].double().requires_grad_() for level in range(6)]
    out = layer(maps)
    sum((level + 1) * feature.square().mean() for level, feature in enumerate(out)).backward()
    for level, (feature, own) in enumerate(zip(out, maps, strict=True)):
        close(feature, golden[f"feats_out.{level}"])
        assert own.grad is not None
        close(own.grad, golden[f"grad.feats_in.{level}"])
    for name, parameter in layer.named_parameters():
        # The gradients of what a BatchNorm undoes again, 0 in exact arithmetic, are rounding noise of float32 there.
        torch.testing.assert_close(parameter.grad, golden[f"grad.{name}"].double(), rtol=2e-6, atol=2e-6)


def close(ours: Tensor, golden: Tensor) -> None:
    """Equal to what the original computed in float32."""
    torch.testing.assert_close(ours, golden.double(), rtol=0, atol=1e-6 * golden.abs().max().item())


# Any size of image


def sizes(features: Sequence[Tensor]) -> list[tuple[int, ...]]:
    return [tuple(feature.shape[2:]) for feature in features]


@pytest.mark.parametrize("compound", [0, 1, 2])
@pytest.mark.parametrize("size", [(32, 32), (97, 131), (160, 96), (64, 128)])
def test_any_image_size(compound: int, size: tuple[int, int]) -> None:
    with torch.device("meta"):
        network = EfficientDetSeg(compound, num_classes=5)
        student, teacher, *maps = network(torch.zeros(2, 3, *size))
    assert sizes(student) == sizes(teacher) and len(student) == 6
    assert all(
        feature.shape[:2] == (2, width) for feature, width in zip(student, network.feature_channels, strict=True)
    )
    assert all(low.shape == (2, 5, *student[0].shape[2:]) for low in maps)
    # Fixed paddings may take one pixel more or less than a quarter.
    assert all(abs(low - side / 4) <= 1 for low, side in zip(student[0].shape[2:], size, strict=True))


def test_an_odd_size_trains_and_repeats() -> None:
    torch.manual_seed(0)
    network, images = EfficientDetSeg(num_classes=3), torch.randn(2, 3, 97, 131)
    student, teacher, *maps = network(images)
    (sum(feature.square().mean() for feature in [*student, *teacher, *maps])).backward()
    gradients = {name: parameter.grad for name, parameter in network.named_parameters() if parameter.requires_grad}
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients.values())
    network.eval()
    with torch.no_grad():
        both = network(images)
        # A sample does not depend on the others once the statistics are fixed.
        torch.testing.assert_close(network(images[:1])[2], both[2][:1], rtol=1e-4, atol=1e-5)
        assert torch.equal(network.student_maps(images), both[2])


def test_the_originals_resizing_says_which_sizes_it_cannot_take() -> None:
    network = EfficientDetSeg(num_classes=3, original_resizing=True).eval()
    for size in ((160, 96), (64, 128)):
        with pytest.raises(ValueError, match=r"original_resizing=True makes .* leave original_resizing out"):
            network(torch.zeros(1, 3, *size))
    with torch.no_grad():
        square = torch.randn(1, 3, 128, 128)
        ours = EfficientDetSeg(num_classes=3).eval()
        ours.load_state_dict(network.state_dict())
        assert all(torch.equal(a, b) for a, b in zip(network(square)[2:], ours(square)[2:], strict=True))


# What a trainer does with it


def test_the_self_teacher_does_not_run_for_the_student_alone() -> None:
    network = EfficientDetSeg(num_classes=3).eval()
    for part in (network.BiFPN2, network.classifier2):
        part.register_forward_hook(lambda *_: pytest.fail("the self-teacher ran"))
    assert network.student_maps(torch.randn(1, 3, 64, 64)).shape == (1, 3, 16, 16)


def test_every_parameter_that_learns_gets_a_gradient() -> None:
    """DistributedDataParallel waits for all of them; the original's unused convolutions would stop it."""
    network = EfficientDetSeg(num_classes=3)
    (low := network(torch.randn(2, 3, 64, 64)))[2].sum().add(low[3].sum()).add(sum(f.sum() for f in low[1])).backward()
    frozen = {name.split(".")[0] for name, parameter in network.named_parameters() if not parameter.requires_grad}
    assert frozen == {"smooth1", "smooth2"}
    assert all(parameter.grad is not None for parameter in network.parameters() if parameter.requires_grad)


def test_torch_compile_makes_one_graph() -> None:
    torch.manual_seed(0)
    network, images = EfficientDetSeg(num_classes=3).eval(), torch.randn(1, 3, 33, 40)
    compiled = torch.compile(network, fullgraph=True, backend="eager")
    with torch.no_grad():
        for ours, eager in zip(compiled(images)[2:], network(images)[2:], strict=True):
            torch.testing.assert_close(ours, eager)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(1, 3, 31, 64), "32 pixels a side or more, but have shape \\(1, 3, 31, 64\\)"),
        (torch.zeros(3, 64, 64), "must be a batch of shape"),
        (torch.zeros(1, 1, 64, 64), "must have 3 channels"),
    ],
)
def test_images_it_cannot_take(images: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EfficientDetSeg()(images)


@pytest.mark.parametrize("compound", [3, -1, True, "d0"])
def test_an_unknown_compound(compound: object) -> None:
    with pytest.raises(ValueError, match=r"compound is .*, but 0, 1 or 2 was wanted"):
        EfficientDetSeg(compound)  # type: ignore[arg-type]


def test_what_makes_networks_knows_it() -> None:
    with torch.device("meta"):
        network = create_model("frskd_fast.models.EfficientDetSeg", 5, compound=1)
    assert type(network) is EfficientDetSeg and network.num_classes == 5 and network.compound == 1
    for use in (adapt_backbone, FRSKDTask):
        with pytest.raises(TypeError, match=r"is a segmentation network, but one with logits .* FRSKDSegmentationTask"):
            use(network)
