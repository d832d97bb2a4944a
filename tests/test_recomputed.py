"""BatchNorms that keep their input alone: the numbers of the plain modules, what is kept, and when the modules run instead."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import frskd_fast
from frskd_fast.models.fixed_padding import FixedPaddingConv2d
from frskd_fast.models.recomputed import AffineNormReLU, convolved_gated_swish, convolved_swish

CHANNELS = 6


class Swish(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(CHANNELS, eps=1e-2, momentum=0.3)
        # Padding of 1 before and 2 behind.
        self.convolution: nn.Conv2d = FixedPaddingConv2d(CHANNELS, CHANNELS, 5, 2, side=4, groups=CHANNELS)

    def forward(self, x: Tensor) -> Tensor:
        return convolved_swish(self.norm, x, self.convolution)


class Gated(Swish):
    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(CHANNELS, 4, 1, bias=False)
        self.reduce, self.expand = nn.Conv2d(CHANNELS, 2, 1), nn.Conv2d(2, CHANNELS, 1)

    def forward(self, x: Tensor) -> Tensor:
        return convolved_gated_swish(self.norm, x, self.reduce, self.expand, self.convolution)


def affine() -> AffineNormReLU:
    module = AffineNormReLU(CHANNELS)
    with torch.no_grad():
        module[0].weight[2], module[0].weight[3] = 0.0, -0.01  # nothing but the bias, and a variance like epsilon
    return module


MODULES: dict[str, Callable[[], nn.Module]] = {"swish": Swish, "gated": Gated, "affine": affine}


def batch_norm_of(module: nn.Module) -> Any:
    return next(child for child in module.modules() if isinstance(child, nn.BatchNorm2d))


def made(name: str) -> nn.Module:
    torch.manual_seed(0)
    module = MODULES[name]().double()
    norm = batch_norm_of(module)
    with torch.no_grad():
        norm.weight.uniform_(-1, 2)
        norm.bias.uniform_(-1, 1)
    return module


def run(module: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """The output, all gradients and the statistics after one step; and how many numbers are kept for it."""
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    kept: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        out = module(x)
    out.backward(torch.linspace(-1, 1, out.numel(), dtype=out.dtype).sin().view_as(out))
    gradients = {name: parameter.grad for name, parameter in module.named_parameters() if parameter.grad is not None}
    assert x.grad is not None
    return {
        "out": out.detach(),
        "x": x.grad,
        **gradients,
        **dict(module.named_buffers()),
        "kept": torch.tensor(sum(kept.values())),
    }


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_the_numbers_are_those_of_the_plain_modules(name: str, memory_format: torch.memory_format) -> None:
    module = made(name)
    plain = copy.deepcopy(module)
    batch_norm_of(plain).register_forward_hook(lambda *_: None)  # a module that is hooked is called
    x = torch.randn(3, CHANNELS, 7, 5, dtype=torch.float64).contiguous(memory_format=memory_format)
    x[:, 1] += 5
    ours, wanted = run(module, x), run(plain, x)
    if name == "affine":
        # Which the plain modules find as the rounding error around 0.
        assert torch.equal(ours.pop("0.bias"), torch.zeros(CHANNELS, dtype=torch.float64))
        assert wanted.pop("0.bias").abs().max() < 1e-12
    maps, plain_maps = ours.pop("kept") // x.numel(), wanted.pop("kept") // x.numel()
    assert (maps, plain_maps) == {"swish": (1, 3), "gated": (1, 4), "affine": (1, 3)}[name]
    assert ours.keys() == wanted.keys() and len(ours) > 6
    for key, value in wanted.items():
        torch.testing.assert_close(ours[key], value, rtol=1e-9, atol=1e-11, msg=key)
    assert ours["out"].is_contiguous(memory_format=memory_format) and ours["x"].is_contiguous(
        memory_format=memory_format
    )


def hooked_norm(module: nn.Module) -> None:
    batch_norm_of(module).register_forward_hook(lambda norm, given, out: out + 1)


def evaluated(module: nn.Module) -> None:
    batch_norm_of(module).eval()


def without_statistics(module: nn.Module) -> None:
    norm = batch_norm_of(module)
    norm.track_running_stats, norm.running_mean, norm.running_var, norm.num_batches_tracked = False, None, None, None


def averaging(module: nn.Module) -> None:
    batch_norm_of(module).momentum = None


def hooked_convolution(module: nn.Module) -> None:
    next(c for c in module.modules() if isinstance(c, nn.Conv2d)).register_forward_hook(lambda *_: None)


def counted(function: Callable[..., Tensor], calls: list[int]) -> Callable[..., Tensor]:
    """`function`, which notes its calls; a hook would change what is tested."""

    def call(x: Tensor) -> Tensor:
        calls.append(1)
        return function(x)

    return call


@pytest.mark.parametrize("change", [hooked_norm, evaluated, without_statistics, averaging, hooked_convolution])
@pytest.mark.parametrize("name", ["gated", "affine"])
def test_changed_parts_are_called(name: str, change: Callable[[nn.Module], None]) -> None:
    module = made(name)
    change(module)
    x = torch.randn(3, CHANNELS, 4, 4, dtype=torch.float64)
    called: list[int] = []
    batch_norm_of(module).forward = counted(batch_norm_of(module).forward, called)
    run(module, x)
    assert called


def convolution_of(name: str, module: Any) -> nn.Conv2d:
    convolution: nn.Conv2d = module[0] if name == "affine" else module.convolution
    return convolution


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("swish", {"dilation": (2, 2), "padding": (4, 4)}),
        ("swish", {"padding_mode": "reflect"}),
        ("swish", {"padding": "valid"}),
        ("gated", {"padding": (1, 1), "padding_mode": "circular"}),
        ("affine", {"padding": (1, 1)}),
        ("affine", {"stride": (2, 2)}),
    ],
)
def test_convolutions_of_other_settings_are_the_plain_ones(name: str, change: dict[str, Any]) -> None:
    module = made(name)
    old = convolution_of(name, module)
    settings: dict[str, Any] = {key: getattr(old, key) for key in ("stride", "padding", "groups")} | change
    new = nn.Conv2d(old.in_channels, old.out_channels, old.kernel_size, bias=old.bias is not None, **settings)
    parent: Any = module
    if name == "affine":
        parent[0] = new.double()
    else:
        parent.convolution = new.double()
    plain = copy.deepcopy(module)
    batch_norm_of(plain).register_forward_hook(lambda *_: None)
    x = torch.randn(2, CHANNELS, 9, 9, dtype=torch.float64)
    ours, wanted = run(module, x), run(plain, x)
    for key in wanted.keys() - {"kept"}:
        torch.testing.assert_close(ours[key], wanted[key], rtol=1e-9, atol=1e-11, msg=key)


def test_a_squeeze_that_is_no_linear_layer_is_called() -> None:
    module: Any = made("gated")
    module.reduce = nn.Conv2d(CHANNELS, 2, 1, groups=2).double()
    called: list[int] = []
    module.reduce.forward = counted(module.reduce.forward, called)
    run(module, torch.randn(2, CHANNELS, 4, 4, dtype=torch.float64))
    assert called


@pytest.mark.parametrize("name", MODULES)
def test_a_network_in_half_precision_runs_the_modules(name: str) -> None:
    module = made(name).bfloat16()
    called: list[int] = []
    batch_norm_of(module).forward = counted(batch_norm_of(module).forward, called)
    run(module, torch.randn(2, CHANNELS, 4, 4).bfloat16())
    assert called


def test_a_single_value_a_channel_is_refused_by_batch_norm_itself() -> None:
    for name in MODULES:
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            made(name)(torch.randn(1, CHANNELS, 1, 1, dtype=torch.float64))


def test_autocast_no_grad_and_the_reference_run_the_modules() -> None:
    x = torch.randn(2, CHANNELS, 4, 4)
    for name in MODULES:
        module = made(name).float()
        plain = copy.deepcopy(module)
        batch_norm_of(plain).register_forward_hook(lambda *_: None)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(module(x.bfloat16()), plain(x.bfloat16()))
        with torch.no_grad():
            assert torch.equal(module(x), plain(x))
        with frskd_fast.use_impl("reference"):
            assert torch.equal(module(x), plain(x))
