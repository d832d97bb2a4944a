"""Backbones and self-teachers: layouts, the original's numbers, and what the original gets wrong."""

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from golden_utils import golden_settings, load_golden, state_dict_layout
from torch import Tensor, nn

import frskd_fast
from frskd_fast import models
from frskd_fast.models.resnet import BasicBlock, Bottleneck, ResNet
from frskd_fast.models.wide_resnet import WideResNet
from frskd_fast.reference import self_teacher as plain_form
from frskd_fast.reference.fusion import normalise_weight
from frskd_fast.reference.self_teacher import FUSION_EPSILON, SameMaxPool2d

BACKBONES = ["cifarresnet18", "resnet18", "resnet34", "resnet50", "wrn16x2"]
SELF_TEACHERS = ["BiFPNc", "BiFPN"]
SELF_TEACHER_CASES = ["bifpnc_r1", "bifpn_r1", "bifpn_r2"]


def small_backbones() -> dict[str, nn.Module]:
    """One shallow network of each kind; images of 96 pixels or more keep the ImageNet stem from warning."""
    return {
        "cifar stem": ResNet(BasicBlock, (1, 1, 1, 1), num_classes=5, stem="cifar"),
        "imagenet stem": ResNet(BasicBlock, (1, 1, 1, 1), num_classes=5, stem="imagenet"),
        "bottleneck": ResNet(Bottleneck, (1, 1, 1, 1), num_classes=5, stem="imagenet"),
        "wide": WideResNet(depth=10, widen_factor=1, num_classes=5),
    }


SMALL_BACKBONES = ["cifar stem", "imagenet stem", "bottleneck", "wide"]


def randomise(module: nn.Module, generator: torch.Generator) -> None:
    """Weights of BatchNorm and fusion away from 1, biases away from 0; fusion weights stay positive."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.dim() == 1:
                noise = torch.rand(parameter.shape, generator=generator, dtype=parameter.dtype)
                parameter.copy_(noise - 0.5 if name.endswith("bias") else noise + 0.5)


def pyramid(channels: list[int], height: int, width: int, batch: int, generator: torch.Generator) -> list[Tensor]:
    """float64 maps whose sizes halve, rounded up."""
    features = []
    for count in channels:
        features.append(torch.randn(batch, count, height, width, generator=generator, dtype=torch.float64))
        height, width = -(-height // 2), -(-width // 2)
    return features


# Layouts


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("wrapper", ["", *SELF_TEACHERS])
def test_layout_is_the_originals(backbone: str, wrapper: str) -> None:
    with torch.device("meta"):
        module = getattr(models, backbone)(num_classes=100)
        if wrapper:
            module = getattr(models, wrapper)(module.channels, 100)
    layout = state_dict_layout(f"FRSKD {wrapper}({backbone})" if wrapper else f"FRSKD {backbone}")
    ours = {key: list(value.shape) for key, value in module.state_dict().items()}
    assert list(ours.items()) == list(layout.items())
    # The order of parameters decides which one an optimiser's state belongs to.
    buffers = ("running_mean", "running_var", "num_batches_tracked")
    assert [name for name, _ in module.named_parameters()] == [key for key in layout if not key.endswith(buffers)]


@pytest.mark.parametrize(
    ("build", "wanted"),
    [
        (lambda: models.cifarresnet18(num_classes=100), 11_220_132),
        (lambda: models.wrn16x2(num_classes=100), 703_060),
        (lambda: models.BiFPNc([64, 128, 256, 512], 100), 6_375_794),
        (lambda: models.BiFPNc([64, 128, 256, 512], 1000), 7_298_294),
        (lambda: models.BiFPNc([32, 64, 128], 100), 411_885),
        (lambda: models.BiFPN([64, 128, 256, 512], 100), 1_324_658),
    ],
)
def test_parameter_counts(build: Callable[[], nn.Module], wanted: int) -> None:
    with torch.device("meta"):
        module = build()
    assert sum(parameter.numel() for parameter in module.parameters()) == wanted


@pytest.mark.parametrize("backbone", BACKBONES)
def test_channels_are_those_of_the_features(backbone: str) -> None:
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = getattr(models, backbone)(num_classes=3)
        features, logits = model(torch.zeros(2, 3, 64, 64))
    assert [feature.shape[1] for feature in features] == model.channels
    assert logits.shape == (2, 3)


def test_feature_sizes_of_the_cifar_networks() -> None:
    with torch.device("meta"):
        images = torch.zeros(2, 3, 32, 32)
        resnet_features, _ = models.cifarresnet18()(images)
        wide_features, _ = models.wrn16x2()(images)
    assert [tuple(feature.shape[1:]) for feature in resnet_features] == [
        (64, 32, 32),
        (128, 16, 16),
        (256, 8, 8),
        (512, 4, 4),
    ]
    assert [tuple(feature.shape[1:]) for feature in wide_features] == [(32, 32, 32), (64, 16, 16), (128, 8, 8)]


@pytest.mark.parametrize("name", SMALL_BACKBONES)
def test_a_state_dict_loads_into_another_instance(name: str) -> None:
    first, second = small_backbones()[name].eval(), small_backbones()[name].eval()
    second.load_state_dict(first.state_dict(), strict=True)
    images = torch.randn(2, 3, 96, 96)
    assert torch.equal(first(images)[1], second(images)[1])


@pytest.mark.parametrize("kind", SELF_TEACHERS)
@pytest.mark.parametrize("repeat", [1, 2])
def test_a_self_teachers_state_dict_loads_into_another_instance(kind: str, repeat: int) -> None:
    first, second = (getattr(models, kind)([4, 6, 8], 5, repeat=repeat).double().eval() for _ in range(2))
    second.load_state_dict(first.state_dict(), strict=True)
    features = pyramid([4, 6, 8], 8, 8, 2, torch.Generator().manual_seed(0))
    assert torch.equal(first(features)[1], second(features)[1])


@pytest.mark.parametrize("stem", ["imagenet", "wide"])
def test_convolutions_start_with_variance_two_over_fan_out(stem: str) -> None:
    torch.manual_seed(0)
    if stem == "wide":
        weight = models.wrn16x2().block3.layer[1].conv1.weight
    else:
        weight = ResNet(BasicBlock, (1, 1, 1, 1), stem="imagenet").layer3[0].conv2.weight
    assert weight.std().item() == pytest.approx(math.sqrt(2.0 / (9 * weight.shape[0])), rel=0.02)


# The original's numbers


def run_golden(case: str, dtype: torch.dtype, seed: int | None = None) -> dict[str, Tensor]:
    """Forward and backward of one stored self-teacher case; the same names as the stored tensors.

    With a seed, every input moves at random by at most the last bit of a float32.
    """
    stored, settings = load_golden(case), golden_settings(case)
    arguments = {"depth": settings["depth"], "repeat": settings["repeat"]}
    module: nn.Module
    if "bifpnc" in case:
        module = models.BiFPNc(settings["channels"], settings["num_classes"], settings["width"], **arguments)
    else:
        module = models.BiFPN(settings["channels"], settings["num_classes"], settings["num_channels"], **arguments)
    state = module.state_dict()
    parameters = {name.removeprefix("param."): value for name, value in stored.items() if name.startswith("param.")}
    assert parameters.keys() == dict(module.named_parameters()).keys()
    module.load_state_dict({**state, **parameters}, strict=True)
    module.to(dtype).train()

    inputs = [stored[f"feats_in.{i}"].to(dtype) for i in range(len(settings["channels"]))]
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
        inputs = [x * (1 + 2.0**-23 * torch.randint(-1, 2, x.shape, generator=generator)) for x in inputs]
    inputs = [x.requires_grad_() for x in inputs]
    outputs, logits = module(inputs, preact=settings["preact"])
    objective = logits.square().mean()
    for i, output in enumerate(outputs):
        objective = objective + (i + 1) * output.square().mean()
    objective.backward()

    computed = {"logits": logits}
    computed |= {f"feats_out.{i}": output for i, output in enumerate(outputs)}
    computed |= {f"grad.feats_in.{i}": feature.grad for i, feature in enumerate(inputs)}
    computed |= {f"grad.{name}": parameter.grad for name, parameter in module.named_parameters()}
    computed |= {f"buffer_after.{name}": buffer for name, buffer in module.named_buffers()}
    return {name: value.detach().double() for name, value in computed.items()}


@pytest.mark.parametrize("mode", ["relu", "preact"])
@pytest.mark.parametrize("case", SELF_TEACHER_CASES)
def test_self_teacher_meets_the_originals_numbers(case: str, mode: str) -> None:
    case = f"frskd_{case}_{mode}"
    stored = {name: value.double() for name, value in load_golden(case).items()}
    ours, exact = run_golden(case, torch.float32), run_golden(case, torch.float64)
    samples = [ours, *(run_golden(case, torch.float32, seed) for seed in range(4))]
    assert ours.keys() == {name for name in stored if not name.startswith(("param.", "feats_in."))}
    largest_gradient = max(value.abs().max().item() for name, value in stored.items() if name.startswith("grad."))
    for name, value in ours.items():
        # The stored numbers are float32, and so no nearer to the truth than ours are: some of these gradients cancel to
        # nothing, BatchNorm amplifies, and another thread count already sums in another order.
        rounding = max((sample[name] - exact[name]).abs().max().item() for sample in samples)
        tolerance = 1e-5 * stored[name].abs().max().item() + 4 * rounding
        if name.startswith("grad."):
            tolerance += 1e-6 * largest_gradient
        error = (value - stored[name]).abs().max().item()
        assert error <= tolerance, f"{name}: off by {error}, tolerance {tolerance}"


# A second statement of the self-teacher, from tensors and formulas only


def plain_batch_norm(x: Tensor, state: dict[str, Tensor], key: str) -> Tensor:
    mean = x.mean(dim=(0, 2, 3), keepdim=True)
    variance = (x - mean).square().mean(dim=(0, 2, 3), keepdim=True)
    weight, bias = state[f"{key}.weight"].view(1, -1, 1, 1), state[f"{key}.bias"].view(1, -1, 1, 1)
    return (x - mean) / (variance + 1e-5).sqrt() * weight + bias


def plain_pointwise(x: Tensor, weight: Tensor) -> Tensor:
    return torch.einsum("nchw,dc->ndhw", x, weight[:, :, 0, 0])


def plain_lateral(x: Tensor, state: dict[str, Tensor], key: str) -> Tensor:
    return plain_batch_norm(plain_pointwise(x, state[f"{key}.conv.0.0.weight"]), state, f"{key}.conv.0.1").relu()


def plain_node(x: Tensor, state: dict[str, Tensor], key: str, depth: int) -> Tensor:
    for position in range(depth):
        first = 0 if position == 0 else 1
        if position > 0:
            x = x.relu()
        block = f"{key}.conv.{position}"
        weight = state[f"{block}.{first}.weight"]
        x = F.conv2d(x, weight, padding=1, groups=weight.shape[0])
        x = plain_batch_norm(plain_pointwise(x, state[f"{block}.{first + 1}.weight"]), state, f"{block}.{first + 2}")
    return x


def plain_up(x: Tensor, height: int, width: int) -> Tensor:
    """Every pixel twice in each direction, then cut to size: row y comes from row y // 2."""
    return x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)[:, :, :height, :width]


def plain_pool(x: Tensor) -> Tensor:
    """Output pixel i is the maximum over rows 2i - before .. 2i - before + 2 that exist; before = size is odd."""
    for dim in (2, 3):
        size = x.shape[dim]
        before = size % 2
        windows = [(max(2 * i - before, 0), min(2 * i - before + 3, size)) for i in range((size + 1) // 2)]
        x = torch.cat([x.narrow(dim, start, end - start).amax(dim, keepdim=True) for start, end in windows], dim)
    return x


def plain_weighted(weight: Tensor, inputs: list[Tensor]) -> Tensor:
    positive = weight.clamp(min=0)
    return sum(w * x for w, x in zip(positive / (positive.sum() + 1e-6), inputs, strict=True))


def plain_self_teacher(
    state: dict[str, Tensor], features: list[Tensor], depth: int, repeat: int
) -> tuple[list[Tensor], Tensor]:
    levels = len(features)
    outputs = features
    for layer in range(repeat):
        key = f"layers.{layer}"

        def resample(x: Tensor, name: str, key: str = key) -> Tensor:
            return plain_lateral(x, state, f"{key}.{name}.1") if f"{key}.{name}.1.conv.0.0.weight" in state else x

        inputs = [x.relu() for x in outputs]
        lateral = [plain_lateral(x, state, f"{key}.lat_conv.{i}") if layer == 0 else x for i, x in enumerate(inputs)]
        lateral2 = {i: plain_lateral(inputs[i], state, f"{key}.lat_conv2.{i - 1}") for i in range(1, levels)}
        up = {levels - 1: lateral[-1]}
        for i in reversed(range(levels - 1)):
            coarser = resample(plain_up(up[i + 1].relu(), *lateral[i].shape[2:]), f"up_sample.{i}")
            fused = plain_weighted(state[f"{key}.up_weight.{i}"], [lateral[i].relu(), coarser])
            up[i] = plain_node(fused, state, f"{key}.up_conv.{i}", depth)
        outputs = [up[0]]
        for i in range(1, levels):
            finer = resample(plain_pool(outputs[-1].relu()), f"down_sample.{i - 1}")
            own = [lateral2[i].relu(), up[i].relu()] if i < levels - 1 else [lateral2[i].relu()]
            fused = plain_weighted(state[f"{key}.down_weight.{i - 1}"], [*own, finer])
            outputs.append(plain_node(fused, state, f"{key}.down_conv.{i - 1}", depth))
    head = "fc" if "fc.weight" in state else "linear"
    pooled = outputs[-1].relu().flatten(2).mean(2)
    return outputs, pooled @ state[f"{head}.weight"].T + state[f"{head}.bias"]


@pytest.mark.parametrize("kind", SELF_TEACHERS)
@pytest.mark.parametrize(
    ("channels", "size", "depth", "repeat"),
    [
        ([3, 4, 5], (12, 12), 2, 1),
        ([3, 4, 5], (12, 12), 2, 2),
        ([3, 4, 5], (9, 14), 1, 3),
        ([4, 3], (7, 5), 3, 1),
        ([3, 4, 5, 6], (57, 29), 2, 1),
        ([3, 4, 5, 6, 7], (40, 23), 2, 2),
        ([3, 4, 5, 6, 7, 8], (64, 48), 2, 1),
    ],
)
def test_self_teacher_equals_a_second_statement_of_its_formulas(
    kind: str, channels: list[int], size: tuple[int, int], depth: int, repeat: int
) -> None:
    generator = torch.Generator().manual_seed(sum(size) + repeat)
    module = models.BiFPNc(channels, 4, width=2, depth=depth, repeat=repeat)
    if kind == "BiFPN":
        module = models.BiFPN(channels, 4, num_channels=6, depth=depth, repeat=repeat)
    module.double().train()
    randomise(module, generator)
    features = [x.requires_grad_() for x in pyramid(channels, *size, 3, generator)]
    state = dict(module.named_parameters())
    tensors = [*features, *state.values()]

    wanted_maps, wanted_logits = plain_self_teacher(state, features, depth, repeat)
    raw_maps, raw_logits = module(features, preact=True)
    maps, logits = module(features)

    assert [tuple(x.shape[1:]) for x in maps] == [
        (width, *feature.shape[2:]) for width, feature in zip(module.out_channels, features, strict=True)
    ]
    upstream = [torch.randn(x.shape, generator=generator, dtype=x.dtype) for x in [*wanted_maps, wanted_logits]]
    for got, wanted in zip([*raw_maps, raw_logits], [*wanted_maps, wanted_logits], strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)
    for got, wanted in zip([*maps, logits], [*(x.relu() for x in wanted_maps), wanted_logits], strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)
    got_gradients = torch.autograd.grad([*raw_maps, raw_logits], tensors, upstream)
    wanted_gradients = torch.autograd.grad([*wanted_maps, wanted_logits], tensors, upstream)
    for name, got, wanted in zip(
        [*(f"feature {i}" for i in range(len(features))), *state], got_gradients, wanted_gradients, strict=True
    ):
        assert got.abs().max() > 0, f"{name} gets no gradient"
        torch.testing.assert_close(got, wanted, rtol=1e-7, atol=1e-7, msg=lambda text, name=name: f"{name}: {text}")


# The fast form against the plain form of the same parameters


def fast_and_plain(kind: str, channels: list[int], depth: int, repeat: int) -> tuple[nn.Module, nn.Module]:
    """Both in float64 and in one state: running statistics and fusion weights away from where they start."""
    options = {"width": 2} if kind == "BiFPNc" else {"num_channels": 6}
    fast, plain = (
        getattr(module, kind)(channels, 5, depth=depth, repeat=repeat, **options).double()
        for module in (models, plain_form)
    )
    generator = torch.Generator().manual_seed(len(channels) + depth)
    randomise(fast, generator)
    with torch.no_grad():
        for name, buffer in fast.named_buffers():
            if buffer.dtype.is_floating_point:
                # Small variances, so that the maps of evaluation keep both signs through all layers.
                noise = 0.2 * torch.rand(buffer.shape, generator=generator, dtype=buffer.dtype)
                buffer.copy_(noise + (0.05 if name.endswith("var") else -0.1))
    plain.load_state_dict(fast.state_dict(), strict=True)
    return fast, plain


def trained_once(module: nn.Module, features: list[Tensor], preact: bool, seed: int) -> dict[str, Tensor]:
    """Outputs, gradients of features and parameters for random upstream gradients, and the buffers afterwards."""
    leaves = [x.detach().requires_grad_() for x in features]
    with frskd_fast.use_impl("cpu"):
        maps, logits = module(leaves, preact=preact)
    generator = torch.Generator().manual_seed(seed)
    upstream = [torch.randn(x.shape, generator=generator, dtype=x.dtype) for x in (*maps, logits)]
    names, parameters = zip(*module.named_parameters(), strict=True)
    gradients = torch.autograd.grad([*maps, logits], [*leaves, *parameters], upstream)
    found = {f"map {level}": x.detach() for level, x in enumerate(maps)} | {"logits": logits.detach()}
    found |= dict(
        zip((*(f"gradient of feature {level}" for level in range(len(leaves))), *names), gradients, strict=True)
    )
    return found | dict(module.named_buffers())


def assert_equal_to_nine_digits(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        if not value.dtype.is_floating_point:
            assert torch.equal(got[name], value), name
            continue
        error, largest = (got[name] - value).abs().max().item(), value.abs().max().item()
        assert largest > 0 and error <= 1e-9 * largest, f"{name}: off by {error}, largest value {largest}"


@pytest.mark.parametrize("kind", SELF_TEACHERS)
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize(
    ("channels", "size", "depth", "repeat"),
    [
        ([3, 4, 5], (15, 10), 2, 1),
        ([3, 4, 5], (15, 10), 1, 2),
        ([3, 4, 5], (1, 16), 2, 2),
        ([4, 3, 5, 4], (16, 24), 3, 1),
        ([2, 3, 4, 5, 6], (33, 18), 1, 2),
        ([2, 3, 4, 5, 6], (32, 32), 2, 1),
    ],
)
def test_fast_and_plain_self_teacher_agree(
    channels: list[int], size: tuple[int, int], depth: int, repeat: int, mode: str, kind: str
) -> None:
    """Sizes that up-sampling doubles, doubles in one direction only, or does not reach by whole copies."""
    for layout, preact in ((torch.contiguous_format, repeat == 1), (torch.channels_last, repeat == 2)):
        fast, plain = (module.train(mode == "train") for module in fast_and_plain(kind, channels, depth, repeat))
        features = pyramid(channels, *size, 3, torch.Generator().manual_seed(sum(size)))
        assert all((x < 0).any() for x in features)
        features = [x.contiguous(memory_format=layout) for x in features]
        before = {name: buffer.clone() for name, buffer in fast.named_buffers()}
        fast.to(memory_format=layout)
        got, wanted = (trained_once(module, features, preact, depth) for module in (fast, plain))
        assert_equal_to_nine_digits(got, wanted)
        for name, buffer in fast.named_buffers():
            assert torch.equal(buffer, before[name]) == (mode == "eval"), name
            if name.endswith("num_batches_tracked"):
                assert buffer.item() == (1 if mode == "train" else 0), name


@pytest.mark.parametrize("kind", SELF_TEACHERS)
def test_fast_and_plain_self_teacher_exchange_their_states(kind: str) -> None:
    fast, plain = fast_and_plain(kind, [3, 4, 5], 2, 2)
    assert list(fast.state_dict()) == list(plain.state_dict())
    assert [name for name, _ in fast.named_parameters()] == [name for name, _ in plain.named_parameters()]
    trained_once(plain.train(), pyramid([3, 4, 5], 9, 14, 3, torch.Generator().manual_seed(1)), False, 1)
    fast.load_state_dict(plain.state_dict(), strict=True)
    features = pyramid([3, 4, 5], 9, 14, 3, torch.Generator().manual_seed(2))
    assert_equal_to_nine_digits(*(trained_once(module.eval(), features, False, 2) for module in (fast, plain)))


@pytest.mark.parametrize("kind", SELF_TEACHERS)
@pytest.mark.parametrize("size", [(16, 16), (15, 10)], ids=str)
def test_hooked_batch_norms_run_once_and_change_what_they_change(size: tuple[int, int], kind: str) -> None:
    """As SyncBatchNorm does, a BatchNorm with a hook runs itself; the hook here adds a number to its output."""
    fast, plain = fast_and_plain(kind, [3, 4, 5], 2, 2)
    calls = []
    for module in (fast, plain):
        for name, child in module.named_modules():
            if isinstance(child, nn.BatchNorm2d):
                child.register_forward_hook(lambda _, args, out, name=name: calls.append(name) or out + 0.1)
    features = pyramid([3, 4, 5], *size, 3, torch.Generator().manual_seed(3))
    assert_equal_to_nine_digits(*(trained_once(module.train(), features, False, 3) for module in (fast, plain)))
    half = len(calls) // 2
    assert len(set(calls)) == half and sorted(calls[:half]) == sorted(calls[half:])


@pytest.mark.parametrize("kind", SELF_TEACHERS)
def test_dead_fusion_weights_and_frozen_parameters(kind: str) -> None:
    """Weights of which some or all are not positive; then only the fusion weights are trained."""
    fast, plain = fast_and_plain(kind, [3, 4, 5], 1, 1)
    for module in (fast, plain):
        with torch.no_grad():
            module.layers[0].up_weight[0].copy_(torch.tensor([-0.5, 0.7]))
            module.layers[0].down_weight[0].copy_(torch.tensor([0.0, 0.4, -1.0]))
    features = pyramid([3, 4, 5], 15, 10, 3, torch.Generator().manual_seed(4))
    found = []
    for module in (fast, plain):
        for name, parameter in module.named_parameters():
            parameter.requires_grad_("up_weight" in name or "down_weight" in name)
        weights = [parameter for parameter in module.parameters() if parameter.requires_grad]
        maps, logits = module(features)
        found.append(torch.autograd.grad(logits.square().sum() + sum(x.square().sum() for x in maps), weights))
    for got, wanted in zip(*found, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9 * wanted.abs().max().item())


@pytest.mark.parametrize("kind", SELF_TEACHERS)
def test_fast_self_teacher_saves_less_for_its_backward_pass(kind: str) -> None:
    sizes = []
    for module in fast_and_plain(kind, [8, 16, 32], 2, 1):
        own = {tensor.untyped_storage().data_ptr() for tensor in (*module.parameters(), *module.buffers())}
        saved: dict[int, int] = {}

        def pack(tensor: Tensor, saved: dict[int, int] = saved, own: set[int] = own) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                saved[storage.data_ptr()] = storage.nbytes()
            return tensor

        features = [x.requires_grad_() for x in pyramid([8, 16, 32], 16, 16, 2, torch.Generator().manual_seed(5))]
        with frskd_fast.use_impl("cpu"), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            kept = module.train()(features)
        sizes.append(sum(saved.values()))
        del kept
    assert sizes[0] < 0.7 * sizes[1], sizes


@pytest.mark.parametrize("height", [1, 2, 3, 6, 7, 57])
@pytest.mark.parametrize("width", [1, 2, 5, 8])
def test_pool_halves_and_rounds_up(height: int, width: int) -> None:
    x = torch.rand(2, 3, height, width)
    pooled = SameMaxPool2d()(x)
    assert pooled.shape[2:] == (-(-height // 2), -(-width // 2))
    assert torch.equal(pooled, plain_pool(x))


def test_fusion_weights_in_half_precision_keep_their_epsilon() -> None:
    dead = normalise_weight(torch.tensor([-1.0, 0.0], dtype=torch.float16), "relu", FUSION_EPSILON)
    assert torch.equal(dead, torch.zeros(2))
    alive = normalise_weight(torch.tensor([1.0, 3.0], dtype=torch.float16), "relu", FUSION_EPSILON)
    torch.testing.assert_close(alive, torch.tensor([0.25, 0.75]))
    assert normalise_weight(torch.ones(2, dtype=torch.float64), "relu", FUSION_EPSILON).dtype == torch.float64


@pytest.mark.parametrize("kind", SELF_TEACHERS)
def test_batch_norms_before_the_last_relu(kind: str) -> None:
    module = getattr(models, kind)([3, 4, 5], 4, repeat=2).double().train()
    generator = torch.Generator().manual_seed(3)
    randomise(module, generator)
    maps, _ = module(pyramid([3, 4, 5], 8, 8, 3, generator), preact=True)
    for batch_norm, raw in zip(module.get_bn_before_relu(), maps, strict=True):
        # In training a BatchNorm's output has its bias as the mean of each channel.
        torch.testing.assert_close(raw.mean(dim=(0, 2, 3)), batch_norm.bias)


# Backbones


def textbook_resnet(model: ResNet, images: Tensor) -> tuple[list[Tensor], Tensor]:
    """ReLU after the stem and at the end of every block, as published."""
    x = model.bn1(model.conv1(images)).relu()
    if model.stem == "imagenet":
        x = F.max_pool2d(x, 3, stride=2, padding=1)
    features = []
    for stage in (model.layer1, model.layer2, model.layer3, model.layer4):
        for block in stage:
            residual = x if block.downsample is None else block.downsample(x)
            out = block.bn2(block.conv2(block.bn1(block.conv1(x)).relu()))
            if isinstance(block, Bottleneck):
                out = block.bn3(block.conv3(out.relu()))
            x = (out + residual).relu()
        features.append(x)
    return features, model.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


@pytest.mark.parametrize("name", ["cifar stem", "imagenet stem", "bottleneck"])
def test_resnet_equals_the_textbook_form(name: str) -> None:
    model = small_backbones()[name].double()
    randomise(model, torch.Generator().manual_seed(1))
    images = torch.randn(2, 3, 66, 70, dtype=torch.float64)
    features, logits = model(images)
    wanted_features, wanted_logits = textbook_resnet(model, images)
    for got, wanted in zip([*features, logits], [*wanted_features, wanted_logits], strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", SMALL_BACKBONES)
def test_preact_features_are_those_before_the_relu(name: str) -> None:
    model = small_backbones()[name].eval()
    images = torch.randn(2, 3, 70, 66)
    features, logits = model(images)
    raw, raw_logits = model(images, preact=True)
    for feature, before in zip(features, raw, strict=True):
        assert before.min() < 0
        assert torch.equal(feature, before.relu())
    assert torch.equal(logits, raw_logits)


def test_original_preact_hands_out_the_last_wide_feature_after_its_relu() -> None:
    torch.manual_seed(0)
    model = WideResNet(10, 1, 5, original_preact=True).eval()
    images = torch.randn(2, 3, 32, 32)
    features, _ = model(images)
    raw, _ = model(images, preact=True)
    assert raw[0].min() < 0 and raw[1].min() < 0
    assert torch.equal(raw[2], features[2])


def test_wide_batch_norms_before_the_relu() -> None:
    model = WideResNet(10, 1, 5).double()
    randomise(model, torch.Generator().manual_seed(2))
    raw, _ = model(torch.randn(2, 3, 16, 16, dtype=torch.float64), preact=True)
    for batch_norm, feature in zip(model.get_bn_before_relu(), raw, strict=True):
        torch.testing.assert_close(feature.mean(dim=(0, 2, 3)), batch_norm.bias)


def test_every_trainable_parameter_of_the_wide_network_gets_a_gradient() -> None:
    model = WideResNet(10, 1, 5)
    model(torch.randn(2, 3, 16, 16))[1].square().sum().backward()
    missing = [
        name for name, parameter in model.named_parameters() if parameter.requires_grad != (parameter.grad is not None)
    ]
    assert missing == []
    assert [name for name, parameter in model.named_parameters() if not parameter.requires_grad] == [
        "bn1.weight",
        "bn1.bias",
    ]


@pytest.mark.parametrize("name", SMALL_BACKBONES)
@pytest.mark.parametrize("size", [(100, 100), (67, 90)])
def test_odd_and_non_square_images_pass_through_backbone_and_self_teacher(name: str, size: tuple[int, int]) -> None:
    backbone = small_backbones()[name].eval()
    self_teacher = models.BiFPNc(backbone.channels, 5, width=1, depth=1).eval()
    with torch.no_grad():
        features, _ = backbone(torch.randn(1, 3, *size))
        refined, logits = self_teacher(features)
    assert [x.shape for x in refined] == [x.shape for x in features]
    assert logits.shape == (1, 5)


@pytest.mark.parametrize("name", SMALL_BACKBONES)
def test_channels_last_gives_the_same_numbers_and_stays(name: str) -> None:
    generator = torch.Generator().manual_seed(5)
    backbone = small_backbones()[name].double()
    self_teacher = models.BiFPNc(backbone.channels, 5, width=1, depth=1).double()
    images = torch.randn(2, 3, 66, 70, generator=generator, dtype=torch.float64)

    def run(layout: torch.memory_format) -> tuple[list[Tensor], list[Tensor]]:
        modules = nn.ModuleList([backbone, self_teacher]).to(memory_format=layout)
        modules.zero_grad()
        features, logits = backbone(images.contiguous(memory_format=layout))
        refined, teacher_logits = self_teacher(features)
        (logits.square().sum() + teacher_logits.square().sum() + sum(x.square().mean() for x in refined)).backward()
        gradients = [x.grad.clone() for x in modules.parameters() if x.grad is not None]
        return [*features, *refined], [*features, *refined, logits, teacher_logits, *gradients]

    _, wanted = run(torch.contiguous_format)
    maps, got = run(torch.channels_last)
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x in maps)
    for ours, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8)


# torch.compile


class System(nn.Module):
    """Backbone and self-teacher in one graph."""

    def __init__(self, backbone: nn.Module, self_teacher: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.self_teacher = self_teacher

    def forward(self, images: Tensor, preact: bool = False) -> list[Tensor]:
        features, logits = self.backbone(images, preact=preact)
        refined, teacher_logits = self.self_teacher(features, preact=preact)
        return [*features, logits, *refined, teacher_logits]


def test_one_graph_with_a_dynamic_batch() -> None:
    backbone = WideResNet(10, 1, 5)
    system = System(backbone, models.BiFPNc(backbone.channels, 5, width=1, depth=1)).eval()
    compiled = torch.compile(system, fullgraph=True, dynamic=True, backend="eager")
    for batch in (2, 3):
        images = torch.randn(batch, 3, 18, 20)
        for got, wanted in zip(compiled(images, preact=True), system(images, preact=True), strict=True):
            torch.testing.assert_close(got, wanted)


def test_one_graph_trains_a_self_teacher() -> None:
    generator = torch.Generator().manual_seed(6)
    module = models.BiFPNc([3, 4, 5], 5, width=1, depth=1).double()
    randomise(module, generator)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    features = pyramid([3, 4, 5], 9, 14, 3, generator)
    gradients = []
    for call in (compiled, module):
        refined, logits = call(features)
        module.zero_grad()
        (logits.square().sum() + sum(x.square().mean() for x in refined)).backward()
        gradients.append([parameter.grad.clone() for parameter in module.parameters()])
    for got, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-7, atol=1e-9)


def test_one_graph_is_silent_about_small_images() -> None:
    model = small_backbones()["imagenet stem"].eval()
    images = torch.randn(2, 3, 32, 32)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*ImageNet stem.*")
        _, logits = torch.compile(model, fullgraph=True, backend="eager")(images)
    with pytest.warns(UserWarning, match="ImageNet stem"):
        _, wanted = model(images)
    torch.testing.assert_close(logits, wanted)


# Warnings and errors


def test_small_images_meet_an_imagenet_stem_with_one_warning() -> None:
    model = small_backbones()["imagenet stem"].eval()
    with pytest.warns(UserWarning, match="cifarresnet18") as caught:
        model(torch.zeros(1, 3, 32, 200))
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(torch.zeros(1, 3, 32, 32))
        small_backbones()["imagenet stem"].eval()(torch.zeros(1, 3, 65, 65))
        small_backbones()["cifar stem"].eval()(torch.zeros(1, 3, 32, 32))
    with pytest.warns(UserWarning, match="64 x 64 pixels"):
        small_backbones()["imagenet stem"].eval()(torch.zeros(1, 3, 64, 64))


def maps(*shapes: tuple[int, ...]) -> list[Tensor]:
    return [torch.zeros(shape) for shape in shapes]


@pytest.mark.parametrize("kind", SELF_TEACHERS)
@pytest.mark.parametrize(
    ("features", "error", "sentence"),
    [
        (torch.zeros(2, 4, 8, 8), TypeError, "features must be a list of tensors"),
        (maps((2, 4, 8, 8)), ValueError, "one tensor for each of the 2 levels .* but holds 1"),
        (maps((2, 4, 8, 8), (2, 6, 4, 4), (2, 6, 2, 2)), ValueError, "but holds 3"),
        (
            maps((2, 6, 8, 8), (2, 4, 4, 4)),
            ValueError,
            r"features\[0\] must have 4 channels, but has shape \(2, 6, 8, 8\)",
        ),
        (
            maps((2, 4, 8, 8), (2, 6)),
            ValueError,
            r"features\[1\] must have shape \(N, 6, H, W\), but has shape \(2, 6\)",
        ),
        (maps((2, 4, 8, 8), (3, 6, 4, 4)), ValueError, r"features\[1\] must have the batch size of features\[0\], 2"),
        (maps((2, 4, 8, 9), (2, 6, 4, 4)), ValueError, r"features\[1\] must be 4 x 5, half of the 8 x 9"),
        (maps((2, 4, 8, 8), (2, 6, 8, 8)), ValueError, r"features\[1\] must be 4 x 4"),
    ],
)
def test_wrong_features_are_refused(kind: str, features: Any, error: type[Exception], sentence: str) -> None:
    with pytest.raises(error, match=sentence):
        getattr(models, kind)([4, 6], 5)(features)


@pytest.mark.parametrize("name", SMALL_BACKBONES)
@pytest.mark.parametrize(
    ("images", "error", "sentence"),
    [
        (
            torch.zeros(3, 70, 70),
            ValueError,
            r"images must be a batch of shape \(N, 3, H, W\), but has shape \(3, 70, 70\)",
        ),
        (torch.zeros(2, 70, 70, 3), ValueError, r"3 channels in dimension 1, but has shape \(2, 70, 70, 3\)"),
        (torch.zeros(2, 3, 70, 70, dtype=torch.uint8), TypeError, "images must be floating point, but is torch.uint8"),
    ],
)
def test_wrong_images_are_refused(name: str, images: Tensor, error: type[Exception], sentence: str) -> None:
    with pytest.raises(error, match=sentence):
        small_backbones()[name](images)


@pytest.mark.parametrize(
    ("build", "error", "sentence"),
    [
        *[
            (
                lambda name=name: getattr(models, name)(num_classes=0),
                ValueError,
                "num_classes must be at least 1, but is 0",
            )
            for name in BACKBONES
        ],
        (lambda: models.cifarresnet18(num_classes=10.0), TypeError, "num_classes must be an integer, but is 10.0"),
        (lambda: models.wrn16x2(num_classes=True), TypeError, "num_classes must be an integer, but is True"),
        (lambda: ResNet(BasicBlock, (2, 2, 2, 2), stem="cifar10"), ValueError, "stem must be"),
        (lambda: ResNet(BasicBlock, (2, 2, 2)), ValueError, "four stages"),
        (lambda: ResNet(BasicBlock, (2, 0, 2, 2)), ValueError, r"layers\[1\] must be at least 1"),
        (lambda: WideResNet(depth=15), ValueError, "depth must be 6 . n . 4 .* but is 15"),
        (lambda: WideResNet(depth=4), ValueError, "depth must be 6 . n . 4 .* but is 4"),
        (lambda: WideResNet(widen_factor=0), ValueError, "widen_factor must be at least 1"),
        (lambda: models.BiFPNc([4, 8], -1), ValueError, "num_classes must be at least 1, but is -1"),
        (lambda: models.BiFPN([4, 8], 0), ValueError, "num_classes must be at least 1, but is 0"),
        (lambda: models.BiFPNc(4, 10), TypeError, "channels must be a list"),
        (lambda: models.BiFPNc([4], 10), ValueError, "two levels or more"),
        (lambda: models.BiFPNc([4, 0], 10), ValueError, r"channels\[1\] must be at least 1"),
        (lambda: models.BiFPNc([4, 8], 10, width=0), ValueError, "width must be at least 1"),
        (lambda: models.BiFPNc([4, 8], 10, width=1.5), TypeError, "width must be an integer"),
        (lambda: models.BiFPNc([4, 8], 10, depth=0), ValueError, "depth must be at least 1"),
        (lambda: models.BiFPNc([4, 8], 10, repeat=0), ValueError, "repeat must be at least 1"),
        (lambda: models.BiFPN([4, 8], 10, num_channels=0), ValueError, "num_channels must be at least 1"),
    ],
)
def test_wrong_arguments_are_refused(build: Callable[[], nn.Module], error: type[Exception], sentence: str) -> None:
    with pytest.raises(error, match=sentence):
        build()
