"""`FitNetLoss` and `OverhaulLoss`: the originals' numbers, plain formulas in float64, margins, limits, refusals."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from golden_utils import golden_settings, load_golden
from numerics import assert_close, largest_error
from torch import Tensor, nn

from frskd_fast.losses import FitNetLoss, FRSKDLoss, OverhaulLoss
from frskd_fast.losses.hints import HintLoss, feature_distance
from frskd_fast.models import BiFPN, BiFPNc
from frskd_fast.reference import hints as reference

IMPLEMENTATIONS = ["reference", "cpu"]
FRESH_MARGIN = -math.sqrt(2 / math.pi)
LOSSES = [FitNetLoss, OverhaulLoss]
STUDENTS, TEACHERS = [3, 4], [6, 5]


def sines(shape: tuple[int, ...], step: float, start: float) -> Tensor:
    return torch.sin(step * torch.arange(math.prod(shape), dtype=torch.float64) + start).view(shape)


def adapted_by(loss: HintLoss, level: int, feature: Tensor) -> Tensor:
    """Convolution and batch normalisation written out, with the loss's parameters."""
    convolution, batch_norm = loss.linear[level]
    raw = torch.einsum("nchw,dc->ndhw", feature, convolution.weight[:, :, 0, 0])
    mean = raw.mean((0, 2, 3), keepdim=True)
    variance = (raw - mean).square().mean((0, 2, 3), keepdim=True)
    normalised = (raw - mean) / (variance + batch_norm.eps).sqrt()
    return normalised * batch_norm.weight.view(1, -1, 1, 1) + batch_norm.bias.view(1, -1, 1, 1)


def plain_feature_term(loss: HintLoss, students: list[Tensor], teachers: list[Tensor]) -> Tensor:
    """The originals' feature terms: mse_loss for hints, masked squares for the overhaul distance."""
    total = students[0].new_zeros(())
    for level, (student, teacher) in enumerate(zip(students, teachers, strict=True)):
        s, t = adapted_by(loss, level, student), teacher.detach()
        if isinstance(loss, FitNetLoss):
            total = total + F.mse_loss(s.relu(), t)
            continue
        u = torch.maximum(t, loss.get_buffer(f"margin{level + 1}"))
        counts = ((s > u) | (u > 0)).to(s.dtype)
        total = total + ((s - u) ** 2 * counts).sum() / len(s) / 2 ** (len(students) - 1 - level)
    return total


def plain_kd(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    log_student, target = F.log_softmax(student / temperature, 1), F.softmax(teacher.detach() / temperature, 1)
    return temperature**2 * F.kl_div(log_student, target, reduction="sum") / len(student)


def pyramids(batch: int = 4, dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], list[Tensor]]:
    sizes = [(6, 4), (3, 2)]
    students = [torch.randn(batch, c, *size).to(dtype) for c, size in zip(STUDENTS, sizes, strict=True)]
    teachers = [torch.randn(batch, c, *size).to(dtype) for c, size in zip(TEACHERS, sizes, strict=True)]
    return students, teachers


def built(kind: type[HintLoss], *arguments: Any, **settings: Any) -> HintLoss:
    """The loss for `pyramids` with parameters and margins that are no special case."""
    loss = kind(STUDENTS, TEACHERS, *arguments, **settings)
    for parameter in loss.parameters():
        nn.init.normal_(parameter)
    for buffer in (buffer for name, buffer in loss.named_buffers() if name.startswith("margin")):
        nn.init.uniform_(buffer, -1.0, 0.2)
    return loss


def arguments_for(batch: int = 4, dtype: torch.dtype = torch.float64) -> tuple[Any, ...]:
    student, teacher = (torch.randn(batch, 7).to(dtype).requires_grad_() for _ in range(2))
    students, teachers = pyramids(batch, dtype)
    return student, teacher, [x.requires_grad_() for x in students], [x.requires_grad_() for x in teachers]


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", LOSSES)
def test_golden(kind: type[HintLoss], impl: str) -> None:
    """Loss and gradients that the original implementation computed in float32."""
    case = {FitNetLoss: "frskd_fit_loss", OverhaulLoss: "frskd_od_loss"}[kind]
    stored, settings = load_golden(case), golden_settings(case)
    state = {name.removeprefix("state."): value for name, value in stored.items() if name.startswith("state.")}
    widths = [settings["width"] * count for count in settings["channels"]]
    weights = settings["alpha"], settings["beta"], settings["temperature"]
    loss = kind(settings["channels"], widths, *weights, impl=impl)
    loss.load_state_dict(state, strict=True)
    batch_norm = [f"1.{name}" for name in nn.BatchNorm2d(1).state_dict()]
    adapters = [name for name in loss.state_dict() if not name.startswith("margin")]
    assert adapters == [f"linear.{level}.{name}" for level in range(3) for name in ("0.weight", *batch_norm)]

    def run(dtype: torch.dtype, plain: bool) -> dict[str, Tensor]:
        module = copy.deepcopy(loss).to(dtype).train()
        students = [stored[f"student_feats.{level}"].to(dtype).requires_grad_() for level in range(3)]
        teachers = [stored[f"teacher_feats.{level}"].to(dtype) for level in range(3)]
        student = stored["student_logits"].to(dtype).requires_grad_()
        teacher = stored["teacher_logits"].to(dtype)
        if plain:
            kd = plain_kd(student, teacher, weights[2])
            total = weights[0] * kd + weights[1] * plain_feature_term(module, students, teachers)
        else:
            total = module(student, teacher, students, teachers)
        total.backward()
        gradients = {f"grad.student_feats.{level}": feature.grad for level, feature in enumerate(students)}
        parameters = {f"grad.{name}": parameter.grad for name, parameter in module.named_parameters()}
        return {"loss": total.detach(), "grad.student_logits": student.grad, **gradients, **parameters}

    truth, ours = run(torch.float64, plain=True), run(torch.float32, plain=False)
    names = {name for name in stored if name == "loss" or name.startswith("grad.")}
    assert len(names) >= 5 and names <= set(ours)
    for name in names:
        largest = float(truth[name].abs().max())
        assert largest_error(stored[name], truth[name]) < 1e-5 * largest, name
        assert_close(ours[name], stored[name], truth[name], name)


def test_values_of_one_level() -> None:
    """One level of sines, with the sines of another step as the convolution; values of the official loss modules."""
    student, teacher = sines((2, 3, 4, 4), 0.37, 0.0), sines((2, 6, 4, 4), 0.23, 1.0)
    for kind, wanted in ((OverhaulLoss, 134.28992853819102), (FitNetLoss, 1.0070416272269322)):
        for impl in IMPLEMENTATIONS:
            loss = kind([3], [6], 0.0, 1.0, impl=impl).double()
            loss.linear[0][0].weight.data = sines((6, 3, 1, 1), 0.5, 0.1)
            logits = torch.zeros(2, 4, dtype=torch.float64)
            assert loss(logits, logits, [student], [teacher]).item() == pytest.approx(wanted, rel=1e-9)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", LOSSES)
def test_every_kind_of_targets_has_the_terms_of_frskd(kind: type[HintLoss], impl: str) -> None:
    loss = built(kind, 1.5, 0.7, 3.0, impl=impl, label_smoothing=0.1, ignore_index=2).double()
    student, teacher, students, teachers = arguments_for()
    labels = torch.tensor([0, 2, 6, 1])
    plain = FRSKDLoss(1.5, 0.0, 3.0, impl=impl, label_smoothing=0.1, ignore_index=2)
    feature = plain_feature_term(loss, students, teachers)
    for targets in (None, labels, (labels, labels.flip(0), 0.3), torch.rand(4, 7).softmax(1)):
        parts = loss(student, teacher, students, teachers, targets, return_parts=True)
        wanted = plain(student, teacher, students, teachers, targets, return_parts=True)
        torch.testing.assert_close(parts[1:4], wanted[1:4])
        torch.testing.assert_close(parts.feature, feature.detach())
        total = wanted.loss + 0.7 * feature
        torch.testing.assert_close(parts.loss, total)
        assert torch.equal(loss(student, teacher, students, teachers, targets), parts.loss)
        assert [part.requires_grad for part in parts] == [True, False, False, False, False]
        leaves = [student, *students, *loss.parameters()]
        leaves += [] if targets is None else [teacher]
        got, gradients = (torch.autograd.grad(value, leaves, retain_graph=True) for value in (parts.loss, total))
        torch.testing.assert_close(got, gradients, rtol=1e-9, atol=1e-12)
        reached = torch.autograd.grad(parts.loss, teachers, retain_graph=True, allow_unused=True)
        assert all(gradient is None for gradient in reached)
    assert type(parts).__name__ == "FRSKDLossParts"


@pytest.mark.parametrize("kind", LOSSES)
def test_distances_and_gradients_are_those_of_the_formula(kind: type[HintLoss]) -> None:
    """The hand-written gradient against autograd's and against finite differences, over layouts."""
    layouts: list[Callable[[Tensor], Tensor]] = [
        lambda x: x,
        lambda x: x.contiguous(memory_format=torch.channels_last),
        lambda x: torch.stack([x, x], -1)[..., 0],
        lambda x: x.flip(3).transpose(2, 3).contiguous().transpose(2, 3),
    ]
    loss = built(kind).double()
    for of_student in layouts:
        for of_teacher in layouts[:2]:
            # Values on the kinks of the formulas: s = 0, t = 0, s = u.
            students = [of_student(x.mul(2).round().div(2) + 1e-3).requires_grad_() for x in (pyramids()[1])]
            teachers = [of_teacher(x.mul(2).round().div(2)) for x in pyramids()[1]]
            copies = [x.clone() for x in (*students, *teachers)]
            upstream = torch.randn((), dtype=torch.float64)
            fused, plain = (loss.distance(students, teachers, plain) for plain in (False, True))
            torch.testing.assert_close(fused, plain, rtol=1e-12, atol=0)
            got, wanted = (torch.autograd.grad(value, students, upstream) for value in (fused, plain))
            torch.testing.assert_close(got, wanted, rtol=1e-12, atol=0)
            assert all(torch.equal(x, copy) for x, copy in zip((*students, *teachers), copies, strict=True))
            assert torch.autograd.gradcheck(
                lambda *s, teachers=teachers: loss.distance([*s], teachers, False), students
            )


def test_what_counts_in_the_overhaul_distance() -> None:
    cases = [  # s, t, margin, distance, gradient
        (0.5, 1.0, -0.8, 0.25, -1.0),  # t > 0: pulled up
        (1.5, 1.0, -0.8, 0.25, 1.0),  # and down
        (-0.2, -0.5, -0.8, 0.09, 0.6),  # margin < t <= 0: pushed down to t
        (-0.7, -0.5, -0.8, 0.0, 0.0),  # and left alone below it
        (-0.3, -2.0, -0.8, 0.25, 1.0),  # t below the margin: pushed down to the margin
        (-1.0, -2.0, -0.8, 0.0, 0.0),
        (0.3, 0.0, -0.8, 0.09, 0.6),
        (-0.3, 0.0, -0.8, 0.0, 0.0),  # t = 0 does not count as positive
    ]
    for s, t, m, distance, gradient in cases:
        student = torch.full((1, 1, 1, 1), s, dtype=torch.float64, requires_grad=True)
        teacher, margin = torch.full_like(student, t).detach(), torch.full((1, 1, 1, 1), m, dtype=torch.float64)
        for value in (
            reference.overhaul_distance(student, teacher, margin),
            feature_distance((1.0,), True, [student], [teacher], [margin]),
        ):
            assert value.item() == pytest.approx(distance)
            assert torch.autograd.grad(value, student)[0].item() == pytest.approx(gradient)


def test_one_map_a_level_is_kept_for_backward() -> None:
    students, teachers = pyramids()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        adapted = [x.requires_grad_() for x in pyramids()[1]]
        feature_distance((1.0, 1.0), False, adapted, teachers)
    assert [tuple(x.shape) for x in kept if x.numel()] == [tuple(x.shape) for x in teachers]
    assert students[0].shape[1] != kept[0].shape[1]


@pytest.mark.parametrize("kind", LOSSES)
def test_second_derivatives_are_refused_or_right(kind: type[HintLoss]) -> None:
    student, teacher, students, teachers = arguments_for()
    for impl in IMPLEMENTATIONS:
        loss = built(kind, impl=impl).double().eval()
        total = loss(student, teacher, students, teachers)
        (gradient,) = torch.autograd.grad(total, students[0], create_graph=True)
        if impl == "reference":
            assert torch.autograd.grad(gradient.square().sum(), students[0])[0].abs().max() > 0
        else:
            with pytest.raises(RuntimeError, match="no second derivative"):
                gradient.square().sum().backward()


def test_margins_are_the_mean_of_a_normal_variable_below_zero() -> None:
    weight = torch.tensor([1.0, -1.0, 0.5, 2.0, 1.0, 1.0, 0.0, 0.0, 0.0], dtype=torch.float64)
    bias = torch.tensor([0.0, 0.0, 0.7, -1.0, 3.05, 3.1, -0.4, 0.4, 0.0], dtype=torch.float64)
    got = reference.overhaul_margin(weight, bias)
    for g, b, margin in zip(weight[:5].abs().tolist(), bias[:5].tolist(), got[:5].tolist(), strict=True):
        x = torch.linspace(b - 40 * g, 0.0, 400_001, dtype=torch.float64)
        density = torch.exp(-(((x - b) / g) ** 2) / 2)
        wanted = torch.trapezoid(x * density, x) / torch.trapezoid(density, x)
        assert margin == pytest.approx(float(wanted), rel=1e-6)
    assert got[5:].tolist() == [-3.0, -0.4, 0.0, 0.0]  # too little below zero; constant channels
    assert got[0].item() == pytest.approx(FRESH_MARGIN, rel=1e-12)
    torch.testing.assert_close(reference.overhaul_margin(weight.float(), bias.float()), got.float())
    stored = load_golden("frskd_od_loss")
    for level in range(3):
        margin = reference.overhaul_margin(stored[f"bn_weight.{level}"].double(), stored[f"bn_bias.{level}"].double())
        torch.testing.assert_close(margin.float(), stored[f"state.margin{level + 1}"].flatten(), rtol=1e-6, atol=0)


def test_margins_stay_or_follow_the_self_teacher() -> None:
    for self_teacher in (BiFPNc(STUDENTS, 7), BiFPN(STUDENTS, 7, num_channels=5)):
        batch_norms = self_teacher.get_bn_before_relu()
        initial, live = (OverhaulLoss(STUDENTS, self_teacher, margins=kind) for kind in ("initial", "live"))
        assert initial.teacher_channels == self_teacher.out_channels
        names = [name for name, _ in live.named_buffers() if name.startswith("margin")]
        assert names == ["margin1", "margin2"] and len(list(live.parameters())) == 6
        nn.init.constant_(batch_norms[0].weight, 2.0)
        features = [torch.randn(2, 3, 4, 4), torch.randn(2, 4, 2, 2)]
        teacher_features, logits = self_teacher(features, preact=True)
        values = []
        for loss, first in ((initial, FRESH_MARGIN), (live, 2 * FRESH_MARGIN)):
            parts = loss(logits, logits, features, teacher_features, return_parts=True)
            values.append(parts.feature)
            assert torch.allclose(loss.margin1, torch.tensor(first))
            assert torch.allclose(loss.margin2, torch.tensor(FRESH_MARGIN))
            torch.testing.assert_close(parts.feature, plain_feature_term(loss, features, teacher_features).detach())
        assert values[0] != values[1]
        # A copy of both follows the copy, not the original.
        both = copy.deepcopy(nn.ModuleList([self_teacher, live]))
        nn.init.constant_(both[0].get_bn_before_relu()[0].weight, 3.0)
        both[1](logits, logits, features, teacher_features)
        assert torch.allclose(both[1].margin1, torch.tensor(3 * FRESH_MARGIN))
        assert torch.allclose(live.margin1, torch.tensor(2 * FRESH_MARGIN))


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_three_way(kind: type[HintLoss], dtype: torch.dtype) -> None:
    """The distance of maps in half precision, and its gradient, against plain PyTorch in the same dtype."""
    loss = built(kind)
    adapted, teachers = ([(3 * x).to(dtype) for x in pyramids(6)[1]] for _ in range(2))
    margins = [loss.get_buffer(f"margin{level + 1}") if kind is OverhaulLoss else None for level in range(2)]

    def plain(dtype: torch.dtype) -> list[Tensor]:
        leaves = [x.to(dtype).requires_grad_() for x in adapted]
        total = torch.zeros((), dtype=dtype)
        for level, (s, t, m) in enumerate(zip(leaves, teachers, margins, strict=True)):
            if m is None:
                total = total + F.mse_loss(s.relu(), t.to(dtype))
            else:
                u = torch.maximum(t.to(dtype), m.to(dtype))
                total = total + ((s - u) ** 2 * ((s > u) | (u > 0)).to(dtype)).sum() / len(s) / 2 ** (1 - level)
        return [total.detach(), *torch.autograd.grad(total, leaves)]

    leaves = [x.clone().requires_grad_() for x in adapted]
    total = loss.distance(leaves, teachers, plain=False)
    assert total.dtype == torch.float32
    ours = [total.detach(), *torch.autograd.grad(total, leaves)]
    assert [x.dtype for x in ours[1:]] == [dtype, dtype]
    for position, triple in enumerate(zip(ours, plain(dtype), plain(torch.float64), strict=True)):
        assert_close(*triple, f"output {position}")


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_at_the_ends_of_its_range(kind: type[HintLoss], dtype: torch.dtype) -> None:
    loss = built(kind, 1.0, 1.0)
    student, teacher, students, teachers = arguments_for(dtype=torch.float32)
    halves = [[(30000.0 * x.detach().sign()).to(dtype).requires_grad_() for x in side] for side in (students, teachers)]
    logits = [(30000.0 * x.detach().sign()).to(dtype).requires_grad_() for x in (student, teacher)]
    wanted = copy.deepcopy(loss).double()
    doubles = [[x.detach().double() for x in side] for side in (logits, *halves)]
    truth = wanted(*doubles[0], doubles[1], doubles[2], return_parts=True)
    with torch.autocast("cpu", dtype):
        parts = loss(*logits, *halves, torch.arange(4), return_parts=True)
    assert parts.loss.dtype == torch.float32 and all(part.isfinite() for part in parts)
    torch.testing.assert_close(
        parts.feature.double(), truth.feature, rtol=2e-2 if dtype == torch.bfloat16 else 1e-5, atol=0
    )
    parts.loss.backward()
    assert all(x.grad.isfinite().all() for x in (logits[0], *halves[0], *loss.parameters()))
    assert halves[0][0].grad.dtype == dtype
    larger = [[1e3 * x.detach().float() for x in side] for side in halves]
    with torch.autocast("cpu", dtype):  # maps that a layer kept in float32 are not narrowed either
        assert loss(*logits, *larger).isfinite()
    outside = loss(*logits, *halves)  # without autocast maps are widened to the adapters' dtype
    assert outside.dtype == torch.float32 and outside.isfinite()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", LOSSES)
def test_limits(kind: type[HintLoss], impl: str) -> None:
    loss = built(kind, impl=impl).double()
    student, teacher, students, teachers = arguments_for(0)
    total = loss(student, teacher, students, teachers, torch.zeros(0, dtype=torch.int64))
    total.backward()
    assert total == 0 and students[0].grad.shape == (0, 3, 6, 4)
    assert all(torch.equal(parameter.grad, torch.zeros_like(parameter)) for parameter in loss.parameters())

    student, teacher, students, teachers = arguments_for(2)
    for side in (students, teachers):
        broken = [x.detach().clone() for x in side]
        broken[0][0, 0, 0, 0] = math.nan
        arguments = (broken, teachers) if side is students else (students, broken)
        assert loss(student, teacher, *arguments).isnan()

    # A student that already agrees has no distance and no gradient.
    loss = built(kind, impl=impl).double().eval()
    with torch.no_grad():
        agreed = [adapter(x) for adapter, x in zip(loss.linear, students, strict=True)]
    agreed = [x.relu() for x in agreed] if kind is FitNetLoss else agreed
    if kind is OverhaulLoss:
        for level in range(2):
            loss.get_buffer(f"margin{level + 1}").fill_(-100.0)
    parts = loss(student, student, students, agreed, return_parts=True)
    assert parts.feature < 1e-20
    gradients = torch.autograd.grad(parts.loss, students)
    assert max(float(gradient.abs().max()) for gradient in gradients) < 1e-9

    loss = built(kind, 2.0, 0.0, impl=impl).double()
    parts = loss(student, teacher, students, teachers, return_parts=True)
    assert parts.feature == 0 and parts.loss == 2.0 * parts.kd
    loss.alpha = 3.0
    assert loss(student, teacher, students, teachers) == 3.0 * parts.kd


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", LOSSES)
def test_without_targets_logits_and_features_may_be_of_other_batches(kind: type[HintLoss], impl: str) -> None:
    """With `--aux sla` the original's criterion gets 2N rows of logits and 5N feature maps."""
    loss = built(kind, 1.5, 0.7, 3.0, impl=impl).double()
    (student, teacher, _, _), (_, _, students, teachers) = arguments_for(4), arguments_for(10)
    feature = plain_feature_term(loss, students, teachers)
    wanted = 1.5 * plain_kd(student, teacher, 3.0) + 0.7 * feature
    parts = loss(student, teacher, students, teachers, return_parts=True)
    torch.testing.assert_close(parts.loss, wanted)
    torch.testing.assert_close(parts.feature, feature.detach())
    leaves = [student, *students, *loss.parameters()]
    got, gradients = (torch.autograd.grad(value, leaves) for value in (parts.loss, wanted))
    torch.testing.assert_close(got, gradients, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", LOSSES)
def test_inputs_that_do_not_fit_are_refused(kind: type[HintLoss]) -> None:
    loss = built(kind)
    student, teacher, students, teachers = arguments_for(2, torch.float32)
    double = [torch.zeros(2, 7).double()] * 2, [x.double() for x in students], [x.double() for x in teachers]
    name = kind.__name__
    cases: list[tuple[tuple[Any, ...], type[Exception], str]] = [
        (
            (student, teacher, students[:1], teachers[:1]),
            ValueError,
            f"student_feats has 1 levels, but {name} was built",
        ),
        ((student, teacher, students, students), ValueError, r"teacher_feats\[0\] has 3 channels, but .*\[6, 5\]"),
        ((student, teacher, teachers, teachers), ValueError, r"student_feats\[0\] has 6 channels"),
        ((student, teacher, students, teachers[:1]), ValueError, "teacher_feats has 1 levels, but student_feats has 2"),
        ((student, teacher, students, [x[..., :1] for x in teachers]), ValueError, "equal sizes were wanted"),
        ((student, teacher[:1], students, teachers), ValueError, "the same batch"),
        (
            (student[:1], teacher[:1], students, teachers, torch.tensor([0])),
            ValueError,
            "has batch size 2, but student_logits has 1",
        ),
        (
            (student[:1], teacher[:1], students, [x[:1] for x in teachers]),
            ValueError,
            r"teacher_feats\[0\] has batch size 1",
        ),
        ((student, teacher, students, None), TypeError, "teacher_feats is a NoneType"),
        ((student, None, students, teachers), TypeError, "teacher_logits is None"),
        ((*double[0], *double[1:]), TypeError, f"dtype torch.float64, but the parameters of {name} have torch.float32"),
        ((student, teacher, students, teachers, "cat"), TypeError, "targets is a str"),
    ]
    for arguments, error, sentence in cases:
        with pytest.raises(error, match=sentence):
            loss(*arguments)
    with pytest.raises(ValueError, match=f"student_feats\\[0\\] is on cpu, but the parameters of {name} are on meta"):
        copy.deepcopy(loss).to("meta")(student, teacher, students, teachers)


@pytest.mark.parametrize(
    ("build", "error", "sentence"),
    [
        (lambda: FitNetLoss([3], [6, 5]), ValueError, "teacher_channels lists 2 levels, but student_channels lists 1"),
        (lambda: FitNetLoss([], []), ValueError, r"student_channels is \[\], but at least one level"),
        (lambda: FitNetLoss([3], [0]), ValueError, r"teacher_channels is \[0\]"),
        (lambda: FitNetLoss(3, [6]), TypeError, "student_channels is 3, but a list"),
        (lambda: FitNetLoss([3], [6], beta=math.inf), ValueError, "beta is inf"),
        (lambda: FitNetLoss([3], [6], temperature=0), ValueError, "temperature is 0.0"),
        (lambda: FitNetLoss([3], [6], impl="fast"), ValueError, "impl is 'fast'"),
        (lambda: OverhaulLoss([3], [6], margins="dead"), ValueError, "margins is 'dead', but 'initial' or 'live'"),
        (lambda: OverhaulLoss([3], [6], margins="live"), TypeError, "margins='live' needs the self-teacher itself"),
        (lambda: OverhaulLoss([3], nn.Flatten()), TypeError, "Flatten without get_bn_before_relu"),
    ],
)
def test_wrong_settings_are_refused(build: Callable[[], Any], error: type[Exception], sentence: str) -> None:
    with pytest.raises(error, match=sentence):
        build()


@pytest.mark.parametrize("loss", [FitNetLoss, OverhaulLoss])
def test_one_value_per_channel_is_refused_in_a_sentence(loss: type) -> None:
    criterion, logits = loss([4], [6]), torch.zeros(1, 3)
    maps = [torch.ones(1, 4, 1, 1)], [torch.ones(1, 6, 1, 1)]
    with pytest.raises(
        ValueError, match=r"student_feats\[0\] has shape \(1, 4, 1, 1\), .* use a larger batch, or eval\(\)\."
    ):
        criterion(logits, logits, *maps)
    assert criterion.eval()(logits, logits, *maps).isfinite()
