"""The rearranged self-teacher where its parts are not the ones it was built with."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune

import frskd_fast
from frskd_fast.models import BiFPNc, wrn16x2
from frskd_fast.models.self_teacher import BiFPNLayer
from frskd_fast.tasks import FRSKDTask

CHANNELS, SIZES = (4, 8, 16), (8, 4, 2)


def pyramid(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.randn(3, channels, side, side, dtype=dtype) for channels, side in zip(CHANNELS, SIZES, strict=True)]


def first_steps(self_teacher: BiFPNc, group: str) -> nn.Sequential:
    """The first stage of the first block of `group`."""
    return getattr(self_teacher.layers[0], group)[0].conv[0]


def prune_a_convolution(self_teacher: BiFPNc) -> None:
    prune.random_unstructured(first_steps(self_teacher, "lat_conv2")[0], "weight", amount=0.5)


def give_a_convolution_a_bias(self_teacher: BiFPNc) -> None:
    first_steps(self_teacher, "up_conv")[1] = nn.Conv2d(8, 8, 1, bias=True)


def replace_a_relu(self_teacher: BiFPNc) -> None:
    first_steps(self_teacher, "lat_conv")[2] = nn.SiLU()


def hook_a_convolution(self_teacher: BiFPNc) -> None:
    first_steps(self_teacher, "down_conv")[0].register_forward_hook(lambda module, given, out: out * 2)


@pytest.mark.parametrize("change", [prune_a_convolution, give_a_convolution_a_bias, replace_a_relu, hook_a_convolution])
def test_changed_parts_are_called_and_not_read(change: Callable[[BiFPNc], None]) -> None:
    self_teacher = BiFPNc(CHANNELS, 5)
    features = pyramid()
    before = self_teacher(features)[1]
    change(self_teacher)
    self_teacher.layers[0].lat_conv[0].conv[0][0].weight.grad = None
    plain = copy.deepcopy(self_teacher) if change is not prune_a_convolution else self_teacher
    ours = self_teacher(features)[1]
    with frskd_fast.use_impl("reference"):
        truth = plain(features)[1]
    torch.testing.assert_close(ours, truth)
    assert not torch.equal(truth, before)
    for _ in range(2):  # a pruned weight is made anew at each call
        self_teacher(features)[1].sum().backward()


def test_an_unchanged_layer_is_as_built() -> None:
    self_teacher = BiFPNc(CHANNELS, 5, depth=3, repeat=2)
    assert all(layer.is_as_built() for layer in self_teacher.layers if isinstance(layer, BiFPNLayer))
    self_teacher.register_forward_hook(lambda module, given, out: None)  # called as ever
    self_teacher.layers[0].register_forward_hook(lambda module, given, out: None)
    assert all(layer.is_as_built() for layer in self_teacher.layers if isinstance(layer, BiFPNLayer))


class FloatNorm(nn.Module):
    """A normalisation that answers in float32, as GroupNorm does under autocast on a GPU."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(1, channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.group_norm(x.float(), 1, self.norm.weight, self.norm.bias)


def test_a_normalisation_in_float32_under_autocast() -> None:
    self_teacher = BiFPNc(CHANNELS, 5)
    for module in list(self_teacher.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.BatchNorm2d):
                setattr(module, name, FloatNorm(child.num_features))
    features = pyramid()

    def gradient(impl: str, half: bool) -> Tensor:
        self_teacher.zero_grad()
        with frskd_fast.use_impl(impl), torch.autocast("cpu", torch.bfloat16, enabled=half):
            logits = self_teacher(features)[1]
        logits.float().square().sum().backward()
        return torch.cat([parameter.grad.flatten() for parameter in self_teacher.parameters()])

    exact = gradient("reference", False)
    errors = [(gradient(impl, True) - exact).norm() / exact.norm() for impl in ("auto", "reference")]
    assert errors[0] <= 1.5 * errors[1] < 1.0, errors


def test_low_memory_with_synchronised_batch_norm() -> None:
    torch.manual_seed(1)
    tasks = [FRSKDTask(wrn16x2(num_classes=5), memory="normal")]
    tasks.append(copy.deepcopy(tasks[0]))
    tasks[1].memory = "low"
    images, targets = torch.randn(4, 3, 16, 16), torch.arange(4)
    for task in tasks:
        nn.SyncBatchNorm.convert_sync_batchnorm(task.self_teacher)
        task(images, targets)["loss"].backward()
    for normal, low in zip(tasks[0].parameters(), tasks[1].parameters(), strict=True):
        assert normal.grad is low.grad is None or torch.equal(normal.grad, low.grad)
    for normal, low in zip(tasks[0].buffers(), tasks[1].buffers(), strict=True):
        assert torch.equal(normal, low)


def test_features_of_two_dtypes_are_refused() -> None:
    features = pyramid()
    features[1] = features[1].double()
    with pytest.raises(TypeError, match=r"features\[1\] must have the dtype of features\[0\], torch.float32"):
        BiFPNc(CHANNELS, 5)(features)
