"""FFL: its networks and its loss against the original's numbers and formulas, labels, autograd, compile, limits, refusals."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from golden_utils import fill_parameters, golden_settings, load_golden, state_dict_layout
from numerics import assert_close
from problems import Problem, problems
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import frskd_fast
from frskd_fast.losses import FFLLoss
from frskd_fast.models import FFLResNet, FusionModule, resnet8

IMPLEMENTATIONS = ["reference", "cpu"]
EXACT = {"rtol": 1e-9, "atol": 1e-13}
LABELS = torch.tensor([4, 0, 3, 2, 5])


def divergence(z: Tensor, t: Tensor, temperature: float, offset: float) -> Tensor:
    """The original's expression."""
    q = F.softmax(t.detach() / temperature, 1) + offset
    ratio = torch.log(q) - F.log_softmax(z / temperature, 1)
    return temperature**2 * (q * ratio).sum() / max(len(z), 1)


def plain_parts(
    heads: list[Tensor], cross_entropy: Callable[[Tensor], Tensor], weight: float, temperature: float, offset: float
) -> tuple[Tensor, ...]:
    *networks, fused = heads
    ce = [cross_entropy(z) for z in heads]
    kd = [divergence(z, fused, temperature, offset) for z in networks]
    kd.append(divergence(fused, sum(networks) / len(networks), temperature, offset))
    total = sum(ce) + weight * sum(kd)
    return total, torch.stack(ce[:-1]), ce[-1], torch.stack(kd[:-1]), kd[-1]


def heads_of(networks: int = 2, rows: int = 5, classes: int = 6, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [(2 * torch.randn(rows, classes)).to(dtype).requires_grad_() for _ in range(networks + 1)]


@pytest.mark.parametrize(
    ("build", "layout", "parameters"),
    [
        (lambda: FFLResNet(32, 100), "FFL ffl_resnet(depth=32)", 832_920),
        (lambda: FusionModule(64, 100), "FFL Fusion_module(64,100,8)", 16_228),
    ],
)
def test_layout_is_the_originals(build: Callable[[], nn.Module], layout: str, parameters: int) -> None:
    with torch.device("meta"):
        network = build()
    assert {key: list(value.shape) for key, value in network.state_dict().items()} == state_dict_layout(layout)
    assert list(network.state_dict()) == list(state_dict_layout(layout))
    assert sum(parameter.numel() for parameter in network.parameters()) == parameters


def test_golden_network() -> None:
    stored = load_golden("ffl_net_depth8")
    network = FFLResNet(8, 10)
    fill_parameters(network)
    images = stored["images"].double()
    logits, maps = network.double()(images)
    for found, name in zip((*logits, *maps), ("logits1", "logits2", "fmap.0", "fmap.1"), strict=True):
        torch.testing.assert_close(found, stored[name], **EXACT)
    network.eval()
    logits, maps = network(images)
    for index in range(2):
        alone = network.subnetwork(index)
        features, found = alone(images)
        assert torch.equal(found, logits[index]) and torch.equal(features[-1], maps[index])
        taken = resnet8(10).double().eval()
        taken.load_state_dict(alone.state_dict())
        assert torch.equal(taken(images)[1], found)
        assert alone is network.subnetwork(index) and not alone.training
        twin = copy.deepcopy(network).train().subnetwork(index)
        assert twin.training and twin.conv1 is not alone.conv1 and torch.equal(twin.conv1.weight, alone.conv1.weight)
    assert network(images[:, :, :20, :24])[1][0].shape == (4, 64, 5, 6)


def test_golden_fusion_module() -> None:
    """Stored in float32: ours in float64 is as near to them as float32 is."""
    stored, settings = load_golden("ffl_fusion_module"), golden_settings("ffl_fusion_module")
    fusion = FusionModule(settings["channel"], settings["num_classes"], settings["spatial"]).double()
    for name, parameter in fusion.named_parameters():
        parameter.data.copy_(stored[f"param.{name}"])
    x, y = (stored[name].double().requires_grad_() for name in "xy")
    logits = fusion(x, y)
    torch.testing.assert_close(logits.float(), stored["logits"])
    logits.square().mean().backward()
    leaves = {"x": x, "y": y, **dict(fusion.named_parameters())}
    for name, leaf in leaves.items():
        scale = stored[f"grad.{name}"].abs().max().item()
        torch.testing.assert_close(leaf.grad.float(), stored[f"grad.{name}"], rtol=1e-5, atol=1e-6 * scale)
    assert torch.equal(fusion.eval()([x, y]), fusion(x, y))


def test_initial_weights_are_the_originals() -> None:
    fusion, network = FusionModule(256, 10), FFLResNet(8, 10)
    for convolution in (fusion.conv1, fusion.conv1_1, network.layer3_2[0].conv2):
        width = math.sqrt(2 / (convolution.kernel_size[0] ** 2 * convolution.out_channels))
        assert convolution.weight.std().item() == pytest.approx(width, rel=0.05)
    assert network.classfier3_1.weight.abs().max() <= 1 / 8 and fusion.fc2.bias.abs().max() <= 1 / 16


def test_maps_of_unlike_size_and_channels() -> None:
    fusion = FusionModule([8, 4, 6], 5).double().eval()
    assert fusion.conv1.weight.shape == (18, 1, 3, 3) and fusion.conv1_1.weight.shape == (8, 18, 1, 1)
    maps = [torch.randn(2, 8, 8, 4), torch.randn(2, 4, 5, 6), torch.randn(2, 6, 4, 8)]
    maps = [f.double().requires_grad_() for f in maps]
    pooled = [F.adaptive_avg_pool2d(f, (4, 4)) for f in maps]
    torch.testing.assert_close(pooled[0], F.avg_pool2d(maps[0], (2, 1)))
    logits = fusion(maps)
    torch.testing.assert_close(logits, fusion(*pooled), **EXACT)
    assert all(gradient.abs().sum() > 0 for gradient in torch.autograd.grad(logits.sum(), maps))


@pytest.mark.parametrize(
    ("call", "error", "sentence"),
    [
        (lambda: FFLResNet(9, 10), ValueError, "depth is 9, but 6"),
        (lambda: FFLResNet(8, 0), ValueError, "num_classes must be at least 1"),
        (lambda: FFLResNet(8, 10)(torch.zeros(1, 1, 8, 8)), ValueError, "images must have 3 channels"),
        (lambda: FFLResNet(8, 10).subnetwork(2), ValueError, "index is 2, but 0 or 1"),
        (lambda: FusionModule([4], 10), ValueError, "channels lists 1 maps, but at least two"),
        (lambda: FusionModule([4, 0], 10), ValueError, r"channels\[1\] must be at least 1"),
        (lambda: FusionModule(4, 10)(torch.zeros(2, 4, 8, 8)), ValueError, "maps are 1, but 2, one of each network"),
        (lambda: FusionModule(4, 10)(torch.zeros(2, 4, 8, 8), None), TypeError, r"maps\[1\] is a NoneType"),
        (lambda: FusionModule(4, 10)([torch.zeros(2, 4, 8, 8), torch.zeros(2, 4)]), ValueError, r"maps\[1\] has shape"),
        (lambda: FusionModule(4, 10)(*torch.zeros(2, 1, 5, 2, 2)), ValueError, r"maps\[0\] has shape \(1, 5, 2, 2\)"),
        (
            lambda: FusionModule(4, 10)(torch.zeros(2, 4, 2, 2), torch.zeros(1, 4, 2, 2)),
            ValueError,
            r"maps\[1\] has shape \(1, 4, 2, 2\), but a map \(N, 4, H, W\) with the images",
        ),
        (lambda: FusionModule(4, 10)(*torch.zeros(2, 1, 4, 1, 1)), ValueError, "one image of one pixel"),
    ],
)  # fmt: skip
def test_networks_refuse(call: Callable[[], Any], error: type[Exception], sentence: str) -> None:
    with pytest.raises(error, match=sentence) as caught:
        call()
    assert str(caught.value).endswith(".")


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_golden_loss(impl: str) -> None:
    """Stored in float32: ours in that dtype is no further from float64 than the original's numbers."""
    stored, settings = load_golden("ffl_total"), golden_settings("ffl_total")
    names = ("logits1", "logits2", "fused_logits")
    weight, targets = settings["consistency_weight"], stored["targets"]

    def run(function: Callable[[list[Tensor]], Tensor], dtype: torch.dtype) -> list[Tensor]:
        heads = [stored[name].to(dtype, copy=True).requires_grad_() for name in names]
        loss = function(heads)
        return [loss.detach(), *torch.autograd.grad(loss, heads)]

    def plain(heads: list[Tensor]) -> Tensor:
        return plain_parts(heads, lambda z: F.cross_entropy(z, targets), weight, 3.0, 1e-7)[0]

    criterion = FFLLoss(impl=impl)
    ours = run(lambda z: criterion(z[:2], z[2], targets, consistency_weight=weight), torch.float32)
    truth = run(plain, torch.float64)
    for name, value, true in zip(("loss", *(f"grad.{name}" for name in names)), ours, truth, strict=True):
        assert_close(value, stored[name], true, name)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_golden_divergence(impl: str) -> None:
    """Stored for one network and its target: the fused classifier's pull on the first network."""
    stored, settings = load_golden("ffl_kl"), golden_settings("ffl_kl")
    criterion = FFLLoss(settings["temperature"], settings["target_offset"], impl=impl)
    pred, label = stored["pred"].double().requires_grad_(), stored["label"].double()
    unlabelled = torch.full(pred.shape[:1], -100)
    parts = criterion([pred, label], label, unlabelled, return_parts=True)
    plain = divergence(pred, label, settings["temperature"], settings["target_offset"])
    torch.testing.assert_close(parts.kd[0], plain.detach(), **EXACT)
    torch.testing.assert_close(parts.kd[0].float(), stored["loss"], rtol=1e-5, atol=0)
    # The second network, whose logits are the target, is at rest but for the offset.
    torch.testing.assert_close(parts.kd[1], divergence(label, label, 3.0, 1e-7), rtol=1e-6, atol=0)
    pulled = torch.autograd.grad(plain, pred)[0]
    # Half of the fused classifier's own target is the network itself, from which it is detached.
    torch.testing.assert_close(torch.autograd.grad(parts.loss, pred)[0], pulled, **EXACT)
    torch.testing.assert_close(pulled.float(), stored["grad.pred"], rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize(("networks", "offset"), [(2, 1e-7), (3, 1e-7), (3, 0.0), (5, 0.1)])
def test_every_kind_of_target(networks: int, offset: float, impl: str) -> None:
    other, mix = torch.tensor([1, 1, 3, -100, 0]), 0.3
    labels = LABELS.where(torch.arange(5) != 2, -100)
    probabilities = torch.softmax(torch.randn(5, 6, dtype=torch.float64), 1)

    def of_two(z: Tensor) -> Tensor:
        terms = [F.cross_entropy(z, side, reduction="sum") for side in (labels, other)]
        weight = mix * (labels != -100).sum() + (1 - mix) * (other != -100).sum()
        return (mix * terms[0] + (1 - mix) * terms[1]) / weight

    kinds: list[tuple[Any, Callable[[Tensor], Tensor]]] = [
        (LABELS, lambda z: F.cross_entropy(z, LABELS)),
        (labels.int(), lambda z: F.cross_entropy(z, labels)),
        ((labels, other, mix), of_two),
        ((labels, other, torch.tensor(mix, dtype=torch.float64)), of_two),
        (probabilities, lambda z: F.cross_entropy(z, probabilities)),
        (torch.full((5,), -100), lambda z: 0.0 * z.sum()),
    ]
    criterion = FFLLoss(1.7, offset, impl=impl)
    for targets, cross_entropy in kinds:
        heads = heads_of(networks)
        weight = torch.tensor(0.6, dtype=torch.float64)
        parts = criterion(heads[:-1], heads[-1], targets, consistency_weight=weight, return_parts=True)
        wanted = plain_parts(heads, cross_entropy, 0.6, 1.7, offset)
        for part, value in zip(parts, wanted, strict=True):
            torch.testing.assert_close(part.detach(), value.detach(), **EXACT)
        assert [part.requires_grad for part in parts] == [True, False, False, False, False]
        got, truth = torch.autograd.grad(parts.loss, heads), torch.autograd.grad(wanted[0], heads)
        torch.testing.assert_close(got, truth, **EXACT)
        assert torch.equal(criterion(heads[:-1], heads[-1], targets, consistency_weight=0.6), parts.loss)
        assert frskd_fast.last_impl()["mutual_logits"] == impl


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_without_offset_the_divergence_is_that_of_operation_logits(impl: str) -> None:
    heads = heads_of()
    parts = FFLLoss(target_offset=0.0, impl=impl)(heads[:2], heads[2], LABELS, return_parts=True)
    for z, kd in zip(heads[:2], parts.kd, strict=True):
        torch.testing.assert_close(kd, frskd_fast.functional.kd_loss(z, heads[2], temperature=3.0).detach(), **EXACT)
    with_offset = FFLLoss(impl=impl)([heads[2]] * 2, heads[2], LABELS, return_parts=True)
    assert with_offset.kd_fused.item() == pytest.approx(9 * 6 * 1e-7, rel=0.1)


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("problem", problems("mutual_logits"), ids=lambda problem: problem.name)
def test_problem(problem: Problem, impl: str) -> None:
    problem.run(impl, "cpu")


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_same_bits_on_every_run(impl: str) -> None:
    heads, labels = heads_of(2, 33, 100, torch.float32), torch.arange(33)

    def run() -> list[Tensor]:
        loss = FFLLoss(impl=impl)(heads[:2], heads[2], labels)
        assert loss.dtype == torch.float32
        return [loss.detach(), *torch.autograd.grad(loss, heads)]

    assert all(map(torch.equal, run(), run()))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_gradcheck_and_second_derivatives(impl: str) -> None:
    """Of each network alone: what pulls is detached, which no difference quotient sees."""
    first, second, fused = heads_of(2, 2, 3)
    labels, criterion = torch.tensor([1, 2]), FFLLoss(impl=impl)
    fixed = torch.zeros(2, 3, dtype=torch.float64)  # at rest the fused classifier's pull has no slope in its target

    def of_first(z: Tensor) -> Tensor:
        parts = criterion([z, second.detach()], fused.detach(), labels, return_parts=True)
        return parts.loss - parts.kd_fused

    assert torch.autograd.gradcheck(of_first, first)
    total = criterion([first, second], fused + fixed, labels)
    (gradient,) = torch.autograd.grad(total, first, create_graph=True)
    if impl == "reference":
        assert torch.autograd.grad(gradient.sum(), first)[0].isfinite().all()
    else:
        with pytest.raises(RuntimeError, match="have no second derivative"):
            gradient.sum().backward()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_limits(impl: str) -> None:
    """No images; strides of all kinds; large logits in half precision; a NaN; answers made under inference mode."""
    criterion = FFLLoss(impl=impl)
    heads = heads_of(rows=0)
    loss = criterion(heads[:2], heads[2], torch.zeros(0, dtype=torch.int64))
    assert loss == 0 and all(z.shape == (0, 6) for z in torch.autograd.grad(loss, heads))

    heads = heads_of()
    wanted = criterion(heads[:2], heads[2], LABELS)
    strided = [torch.stack([z, z], 2)[..., 1] for z in heads[:2]]
    found = criterion(
        [strided[0].t().contiguous().t(), strided[1]], heads[2].repeat(1, 2)[:, :6], LABELS.repeat(2, 1).T[:, 0]
    )
    torch.testing.assert_close(found, wanted, **EXACT)
    (alone,) = torch.autograd.grad(criterion([heads[0], heads[1].detach()], heads[2].detach(), LABELS), heads[0])
    assert torch.equal(alone, torch.autograd.grad(wanted, heads[0])[0])
    with torch.inference_mode():
        answers = [2.0 * z for z in heads]
    with torch.no_grad():
        assert not criterion(answers[:2], answers[2], LABELS).requires_grad

    large = [(3e4 * z.detach().sign()).half().requires_grad_() for z in heads]
    loss = criterion(large[:2], large[2], LABELS)
    assert loss.isfinite() and all(z.isfinite().all() for z in torch.autograd.grad(loss, large))
    broken = [z.detach().clone() for z in heads]
    broken[1][3, 2] = math.nan
    assert criterion(broken[:2], broken[2], LABELS).isnan()


@pytest.mark.parametrize("kind", ["labels", "mix"])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_fullgraph_compile_with_dynamic_batch(impl: str, kind: str) -> None:
    torch.compiler.reset()
    criterion, backend = FFLLoss(impl=impl), CompileCounterWithBackend("aot_eager")

    def step(heads: list[Tensor], targets: Any, weight: Tensor) -> Any:
        return criterion(heads[:-1], heads[-1], targets, consistency_weight=weight, return_parts=True)

    compiled = torch.compile(step, backend=backend, fullgraph=True, dynamic=True)
    compilations = []
    for rows in (5, 7, 9):  # unlike any other size, which the compiler would tie to the batch
        heads = heads_of(2, rows, 4, torch.float32)
        labels = torch.randint(4, (rows,))
        targets: Any = {"labels": labels, "mix": (labels, labels.flip(0), 0.25)}[kind]
        weight = torch.tensor(0.1 * rows)
        parts, wanted = compiled(heads, targets, weight), step(heads, targets, weight)
        torch.testing.assert_close(tuple(parts), tuple(wanted))
        torch.testing.assert_close(torch.autograd.grad(parts.loss, heads), torch.autograd.grad(wanted.loss, heads))
        compilations.append(backend.frame_count)
    assert compilations[0] == compilations[-1], f"recompiled for another batch size: {compilations}"


def test_operator_check() -> None:
    heads = [z.detach() for z in heads_of(rows=5, dtype=torch.float32)]
    operator = torch.ops.frskd_fast.mutual_logits_forward.default
    torch.library.opcheck(operator, (heads, LABELS, torch.tensor(0.5), 3.0, 1e-7, -100, "cpu"))


@pytest.mark.parametrize(
    ("call", "error", "sentence"),
    [
        (lambda loss, z: loss(z[0], z[2], LABELS), TypeError, "logits is a Tensor, but a list of each network's"),
        (lambda loss, z: loss(z[:1], z[2], LABELS), ValueError, "logits has 1 entries, but those of at least two"),
        (lambda loss, z: loss(z[:2], z[2][0], LABELS), ValueError, r"fused_logits has shape \(6,\)"),
        (lambda loss, z: loss(z[:2], None, LABELS), TypeError, "fused_logits is a NoneType"),
        (lambda loss, z: loss([z[0], z[1][:, :3]], z[2], LABELS), ValueError, r"logits\[1\] has shape \(5, 3\)"),
        (lambda loss, z: loss([z[0], z[1].float()], z[2], LABELS), TypeError, r"logits\[1\] has dtype torch.float32"),
        (lambda loss, z: loss([z[0], z[1].to("meta")], z[2], LABELS), ValueError, r"logits\[1\] is on meta"),
        (lambda loss, z: loss(z[:2], z[2], LABELS[:3]), ValueError, r"targets has shape \(3,\)"),
        (lambda loss, z: loss(z[:2], z[2], None), TypeError, "targets is None"),
        (lambda loss, z: loss(z[:2], z[2], LABELS + 3), ValueError, "holds the label 7, but with 6 classes"),
        (lambda loss, z: loss(z[:2], z[2], LABELS, consistency_weight="a"), TypeError, "consistency_weight is 'a'"),
        (lambda loss, z: loss(z[:2], z[2], LABELS, consistency_weight=math.nan), ValueError, "weight is nan"),
        (
            lambda loss, z: loss(z[:2], z[2], LABELS, consistency_weight=torch.ones(2)),
            ValueError,
            r"consistency_weight is a tensor of shape \(2,\)",
        ),
        (lambda loss, z: FFLLoss(0.0), ValueError, "temperature is 0.0"),
        (lambda loss, z: FFLLoss(target_offset=-1e-7), ValueError, "target_offset is -1e-07, but at least 0"),
        (lambda loss, z: FFLLoss(impl="gpu"), ValueError, "the argument impl is 'gpu'"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_the_loss_refuses(impl: str, call: Callable[..., Any], error: type[Exception], sentence: str) -> None:
    with pytest.raises(error, match=sentence) as caught:
        call(FFLLoss(impl=impl), heads_of())
    assert str(caught.value).endswith(".")
    assert repr(FFLLoss()) == "FFLLoss(temperature=3.0, target_offset=1e-07, impl='auto')"
