"""`SLALoss`: a straightforward transcription of its formula, both passes, every inner loss, limits, refusals."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from frskd_fast.losses import FitNetLoss, FRSKDLoss, OverhaulLoss, SLALoss
from frskd_fast.losses.sla import aggregate_rotations
from frskd_fast.mixing import joint_labels

CLASSES = 5
STUDENTS, TEACHERS = [3, 4], [6, 5]
KINDS = ["att", "fit", "od"]


def distillation(kind: str, **settings: Any) -> Any:
    if kind == "att":
        return FRSKDLoss(1.5, 7.0, 3.0, **settings)
    return {"fit": FitNetLoss, "od": OverhaulLoss}[kind](STUDENTS, TEACHERS, 1.5, 0.7, 3.0, **settings)


def built(kind: str, passes: str = "two", **settings: Any) -> SLALoss:
    loss = SLALoss(distillation(kind, **settings), STUDENTS[-1], TEACHERS[-1], CLASSES, 0.6, passes=passes)
    for parameter in loss.parameters():
        nn.init.normal_(parameter)
    return loss


def outputs(rows: int, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    """What student and self-teacher might have made of `rows` images; with negative features, as before a ReLU."""
    sizes = [(4, 4), (2, 2)]
    pyramid = [
        [torch.randn(rows, c, *size).to(dtype).requires_grad_() for c, size in zip(channels, sizes, strict=True)]
        for channels in (STUDENTS, TEACHERS)
    ]
    logits = [(2 * torch.randn(rows, CLASSES)).to(dtype).requires_grad_() for _ in range(2)]
    return {"logits": logits, "students": pyramid[0], "teachers": pyramid[1]}


def divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    p = F.softmax(teacher.detach() / temperature, 1)
    difference = F.log_softmax(teacher.detach() / temperature, 1) - F.log_softmax(student / temperature, 1)
    return temperature**2 * (p * difference).sum() / len(student)


def aggregated(u: Tensor) -> Tensor:
    rows = []
    for n in range(len(u) // 4):
        rows.append(torch.stack([sum(u[4 * n + r, 4 * k + r] for r in range(4)) / 4 for k in range(u.shape[1] // 4)]))
    return torch.stack(rows)


def attention(f: Tensor) -> Tensor:
    return F.normalize(f.pow(2).mean(1).flatten(1))


def plain_feature_term(inner: Any, students: list[Tensor], teachers: list[Tensor]) -> Tensor:
    total = students[0].new_zeros(())
    for level, (student, teacher) in enumerate(zip(students, teachers, strict=True)):
        if isinstance(inner, FRSKDLoss):
            total = total + F.mse_loss(attention(student), attention(teacher.detach()))
            continue
        convolution, batch_norm = inner.linear[level]
        s = F.conv2d(student, convolution.weight)
        s = F.batch_norm(s, None, None, batch_norm.weight, batch_norm.bias, training=True)
        if isinstance(inner, FitNetLoss):
            total = total + F.mse_loss(s.relu(), teacher.detach())
            continue
        u = torch.maximum(teacher.detach(), inner.get_buffer(f"margin{level + 1}"))
        counts = ((s > u) | (u > 0)).to(s.dtype)
        total = total + ((s - u) ** 2 * counts).sum() / len(s) / 2 ** (len(students) - 1 - level)
    return total


def plain_sla(
    loss: SLALoss, upright: dict[str, Any], rotated: dict[str, Any], cross_entropy: Callable[[Tensor, bool], Tensor]
) -> dict[str, Tensor]:
    """The objective step by step; `cross_entropy(logits, joint)` knows the labels."""
    inner = loss.distillation
    (z_s, z_t) = upright["logits"]

    def joint_scores(head: nn.Linear, last: Tensor) -> Tensor:
        return F.linear((last.relu() if loss.needs_preact else last).mean((2, 3)), head.weight, head.bias)

    u_s, u_t = joint_scores(loss.fc1, rotated["students"][-1]), joint_scores(loss.fc2, rotated["teachers"][-1])
    v_s, v_t = aggregated(u_s), aggregated(u_t)
    joint = cross_entropy(u_s, True) + cross_entropy(u_t, True)
    sla = divergence(z_s, v_s, inner.temperature) + divergence(z_t, v_t, inner.temperature)
    kd = divergence(torch.cat([z_s, v_s]), torch.cat([z_t, v_t]), inner.temperature)
    students, teachers = (
        [torch.cat(pair) for pair in zip(upright[side], rotated[side], strict=True)]
        for side in ("students", "teachers")
    )
    feature = plain_feature_term(inner, students, teachers)
    ce_s, ce_t = cross_entropy(z_s, False), cross_entropy(z_t, False)
    total = ce_s + ce_t + joint + loss.weight * sla + inner.alpha * kd + inner.beta * feature
    parts = {"loss": total, "ce_student": ce_s, "ce_teacher": ce_t, "kd": kd, "feature": feature}
    return {**parts, "joint": joint, "sla": sla}


def called(loss: SLALoss, upright: dict[str, Any], rotated: dict[str, Any], targets: Any, **more: Any) -> Any:
    if loss.passes == "one":
        arguments = *rotated["logits"], rotated["students"], rotated["teachers"]
    else:
        arguments = *upright["logits"], upright["students"], upright["teachers"]
        more = {"rotated_student_feats": rotated["students"], "rotated_teacher_feats": rotated["teachers"], **more}
    return loss(*arguments, targets, **more)


def upright_rows(rotated: dict[str, Any]) -> dict[str, Any]:
    return {name: [tensor[::4] for tensor in tensors] for name, tensors in rotated.items()}


def leaves_of(*groups: dict[str, Any]) -> list[Tensor]:
    return [tensor for group in groups for tensors in group.values() for tensor in tensors]


@pytest.mark.parametrize("impl", ["reference", "cpu"])
@pytest.mark.parametrize("passes", ["two", "one"])
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_are_those_of_the_formula(kind: str, passes: str, impl: str) -> None:
    loss = built(kind, passes, impl=impl).double()
    rotated = outputs(12)
    upright = outputs(3) if passes == "two" else upright_rows(rotated)
    labels = torch.tensor([4, 0, 2])
    joint = torch.tensor([16, 17, 18, 19, 0, 1, 2, 3, 8, 9, 10, 11])
    other, other_joint = labels.flip(0), torch.cat([joint[8:], joint[4:8], joint[:4]])

    def of_labels(logits: Tensor, is_joint: bool) -> Tensor:
        return F.cross_entropy(logits, joint if is_joint else labels)

    def of_two(logits: Tensor, is_joint: bool) -> Tensor:
        pairs = (joint, other_joint) if is_joint else (labels, other)
        return 0.3 * F.cross_entropy(logits, pairs[0]) + 0.7 * F.cross_entropy(logits, pairs[1])

    probabilities = 0.3 * F.one_hot(labels, CLASSES).double() + 0.7 * F.one_hot(other, CLASSES).double()
    leaves = [*leaves_of(*([upright] if passes == "two" else []), rotated), *loss.parameters()]
    for targets, cross_entropy in (
        (labels, of_labels),
        ((labels, other, 0.3), of_two),
        ((labels, other, torch.tensor(0.3, dtype=torch.float64)), of_two),
        (probabilities, of_two),
        (None, lambda logits, is_joint: logits.new_zeros(())),
    ):
        parts = called(loss, upright, rotated, targets, return_parts=True)
        wanted = plain_sla(loss, upright, rotated, cross_entropy)
        assert list(parts._fields) == list(wanted)
        torch.testing.assert_close(
            {**parts._asdict()}, {k: v.detach() for k, v in wanted.items()}, rtol=1e-10, atol=1e-12
        )
        assert [part.requires_grad for part in parts] == [True, *[False] * 6]
        assert torch.equal(called(loss, upright, rotated, targets), parts.loss)
        got, gradients = (
            torch.autograd.grad(total, leaves, retain_graph=True, allow_unused=True, materialize_grads=True)
            for total in (parts.loss, wanted["loss"])
        )
        torch.testing.assert_close(got, gradients, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_the_distillation_alone_takes_what_the_original_hands_to_its_criterion(kind: str) -> None:
    """Its script concatenates by itself: logits [z, v], 2N rows, and the maps of images and rotations, 5N of them."""
    loss = built(kind).double()
    upright, rotated = outputs(3), outputs(12)
    parts = called(loss, upright, rotated, None, return_parts=True)
    students, teachers = (
        [torch.cat(pair) for pair in zip(upright[side], rotated[side], strict=True)]
        for side in ("students", "teachers")
    )
    last = [
        (x.relu() if loss.needs_preact else x).mean((2, 3)) for x in (rotated["students"][-1], rotated["teachers"][-1])
    ]
    logits = [
        torch.cat([z, aggregate_rotations(head(pooled))])
        for z, head, pooled in zip(upright["logits"], (loss.fc1, loss.fc2), last, strict=True)
    ]
    alone = loss.distillation(*logits, students, teachers, return_parts=True)
    torch.testing.assert_close((alone.kd, alone.feature), (parts.kd, parts.feature), rtol=1e-10, atol=1e-14)
    leaves = [*leaves_of(rotated), upright["logits"][0], *upright["students"], *loss.parameters()]
    wanted = parts.loss - loss.weight * plain_sla(loss, upright, rotated, lambda z, _: z.new_zeros(()))["sla"]
    got, gradients = (
        torch.autograd.grad(value, leaves, allow_unused=True, materialize_grads=True) for value in (alone.loss, wanted)
    )
    torch.testing.assert_close(got, gradients, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("ignored", [-1, 17])  # 17 is also the joint label of class 4, turned once
def test_label_smoothing_and_ignored_labels_hold_for_every_cross_entropy(ignored: int) -> None:
    loss = built("att", label_smoothing=0.1, ignore_index=ignored).double()
    upright, rotated = outputs(3), outputs(12)
    labels = torch.tensor([4, ignored, 2])

    def cross_entropy(logits: Tensor, is_joint: bool) -> Tensor:
        targets = joint_labels(labels, ignored) if is_joint else labels
        return F.cross_entropy(logits, targets, ignore_index=-100 if is_joint else ignored, label_smoothing=0.1)

    wanted = plain_sla(loss, upright, rotated, cross_entropy)
    parts = called(loss, upright, rotated, labels, return_parts=True)
    torch.testing.assert_close(parts._asdict(), {k: v.detach() for k, v in wanted.items()})
    mixed = (labels, labels, torch.tensor(0.3, dtype=torch.float64))
    torch.testing.assert_close(called(loss, upright, rotated, mixed, return_parts=True)._asdict(), parts._asdict())


def test_aggregation() -> None:
    u = torch.sin(0.37 * torch.arange(96, dtype=torch.float64)).view(8, 12).requires_grad_()
    wanted = [
        [sum(math.sin(0.37 * (12 * (4 * n + r) + 4 * k + r)) for r in range(4)) / 4 for k in range(3)] for n in range(2)
    ]
    v = aggregate_rotations(u)
    torch.testing.assert_close(v, torch.tensor(wanted, dtype=torch.float64), rtol=0, atol=1e-14)
    assert [f"{value:.6f}" for value in v.flatten()] == (
        ["-0.057949", "-0.048131", "0.049220", "0.011340", "-0.069974", "-0.024030"]
    )
    # Only column 4k + r of rotation r is read.
    reads = torch.autograd.grad(v.sum(), u)[0] != 0
    assert torch.equal(reads, torch.eye(4, dtype=torch.bool).repeat(2, 3))
    # Any strides; the mean of half precision is taken in float32.
    strided = torch.stack([u, u], 2)[..., 0]
    assert torch.equal(aggregate_rotations(strided), v)
    assert aggregate_rotations(u.half()).dtype == torch.float32
    assert aggregate_rotations(torch.full((4, 4), 6e4, dtype=torch.float16)).item() == torch.tensor(6e4).half().float()
    assert aggregate_rotations(u[:0]).shape == (0, 3)


def test_nothing_but_cross_entropies_reaches_the_self_teacher_apart_from_sla() -> None:
    loss = built("att").double()
    upright, rotated = outputs(2), outputs(8)
    parts = called(loss, upright, rotated, None, return_parts=True)
    z_t, leaves = upright["logits"][1], [*upright["teachers"], *rotated["teachers"], *loss.fc2.parameters()]
    reached = torch.autograd.grad(parts.loss, [z_t, *leaves], allow_unused=True, retain_graph=True)
    assert reached[0].abs().max() > 0  # of KD(z_t, v_t)
    assert all(gradient is None or not gradient.any() for gradient in reached[1:])
    assert torch.autograd.grad(parts.loss, loss.fc1.weight)[0].abs().max() > 0  # KD trains the student's head


@pytest.mark.parametrize("passes", ["two", "one"])
@pytest.mark.parametrize("kind", KINDS)
def test_half_precision(kind: str, passes: str) -> None:
    loss = built(kind, passes)
    for dtype in (torch.float16, torch.bfloat16):
        rotated = outputs(8, dtype)
        upright = outputs(2, dtype) if passes == "two" else upright_rows(rotated)
        targets = torch.tensor([0, 3])
        # Statistics of half-precision adapters are those of rounded maps: compare what float32 would have seen.
        wide = [{k: [x.detach().double() for x in v] for k, v in group.items()} for group in (upright, rotated)]
        wanted = called(copy.deepcopy(loss).double(), *wide, targets, return_parts=True)
        with torch.autocast("cpu", dtype):
            parts = called(loss, upright, rotated, targets, return_parts=True)
        assert parts.loss.dtype == torch.float32
        tolerance = 2e-5 if dtype == torch.float16 else 3e-2
        torch.testing.assert_close(parts.loss.double(), wanted.loss, rtol=tolerance, atol=0)
        parts.loss.backward()
        assert all(x.grad.isfinite().all() for x in (*rotated["students"], *loss.parameters()))
    large = {k: [(3e4 * x.detach().sign()).half().requires_grad_() for x in v] for k, v in rotated.items()}
    upright = {k: [x[:2].detach().requires_grad_() for x in v] for k, v in large.items()}
    with torch.autocast("cpu", torch.float16):
        total = called(loss, upright, large, targets)
    total.backward()
    assert total.isfinite()
    assert all(x.grad.isfinite().all() for x in (*large["students"], *loss.parameters()))


@pytest.mark.parametrize("passes", ["two", "one"])
@pytest.mark.parametrize("kind", KINDS)
def test_limits(kind: str, passes: str) -> None:
    loss = built(kind, passes).double()
    empty = torch.zeros(0, dtype=torch.int64)
    rotated = outputs(0)
    upright = outputs(0) if passes == "two" else upright_rows(rotated)
    total = called(loss, upright, rotated, empty)
    total.backward()
    assert total == 0 and all(not parameter.grad.any() for parameter in loss.parameters())
    rotated = outputs(8)
    upright = outputs(2) if passes == "two" else upright_rows(rotated)
    loss.distillation.beta = 0.0
    parts = called(loss, upright, rotated, torch.tensor([0, 1]), return_parts=True)
    assert parts.feature == 0 and parts.loss.isfinite()
    rotated["students"][-1] = rotated["students"][-1].detach().clone()
    rotated["students"][-1][5, 0, 0, 0] = math.nan
    assert called(loss, upright, rotated, None).isnan()


def test_parameters_are_called_as_in_the_original() -> None:
    loss = SLALoss(student_width=6, teacher_width=9, num_classes=7)
    shapes = {name: tuple(value.shape) for name, value in loss.state_dict().items()}
    assert shapes == {"fc1.weight": (28, 6), "fc1.bias": (28,), "fc2.weight": (28, 9), "fc2.bias": (28,)}
    assert type(loss.distillation) is FRSKDLoss and "num_classes=7, weight=1.0, passes='two'" in repr(loss)


def test_inputs_that_do_not_fit_are_refused() -> None:
    two, one = built("att").double(), built("att", "one").double()
    upright, rotated = outputs(2), outputs(8)
    (z_s, z_t), students, teachers = upright["logits"], upright["students"], upright["teachers"]
    turned = {"rotated_student_feats": rotated["students"], "rotated_teacher_feats": rotated["teachers"]}
    cases: list[tuple[Callable[[], Any], type[Exception], str]] = [
        (lambda: two(z_s, z_t, students, teachers), TypeError, "rotated_student_feats is None, but with passes='two'"),
        (
            lambda: one(z_s, z_t, students, teachers),
            ValueError,
            "student_logits has 2 rows, but .* four for each image",
        ),
        (lambda: one(z_s, z_t, students, teachers, **turned), TypeError, "rotated features were given"),
        (lambda: two(z_s, None, students, teachers, **turned), TypeError, "teacher_logits is None"),
        (lambda: two(z_s[:, :3], z_t[:, :3], students, teachers, **turned), ValueError, "of the 5 classes"),
        (
            lambda: two(z_s[:1], z_t[:1], students, teachers, **turned),
            ValueError,
            "batch size 2, but student_logits has 1",
        ),
        (
            lambda: two(z_s, z_t, students, teachers, rotated_student_feats=students, rotated_teacher_feats=teachers),
            ValueError,
            r"rotated_student_feats\[0\] has shape \(2, 3, 4, 4\), but \(8, 3, 4, 4\)",
        ),
        (
            lambda: two(z_s, z_t, students[1:], teachers[1:], **{name: value[::-1] for name, value in turned.items()}),
            ValueError,
            "rotated_student_feats has 2 levels, but student_feats has 1",
        ),
        (lambda: one(*rotated["logits"], rotated["students"], rotated["students"]), ValueError, "teacher_width=5"),
        (lambda: called(two, upright, rotated, torch.tensor([0])), ValueError, "targets has shape"),
        (lambda: called(two, upright, rotated, "cat"), TypeError, "targets is a str"),
        (lambda: called(copy.deepcopy(two).to("meta"), upright, rotated, None), ValueError, "SLALoss are on meta"),
        (lambda: called(copy.deepcopy(two).float(), upright, rotated, None), TypeError, "SLALoss have torch.float32"),
        (
            lambda: two(z_s.float(), z_t.float(), students, teachers, **turned),
            TypeError,
            "but student_logits has torch.float",
        ),
        (
            lambda: two(z_s.to("meta"), z_t.to("meta"), students, teachers, **turned),
            ValueError,
            "student_logits is on meta",
        ),
        (lambda: SLALoss(nn.MSELoss()), TypeError, "distillation is a MSELoss, but FRSKDLoss"),
        (lambda: SLALoss(passes="three"), ValueError, "passes is 'three', but 'two' or 'one'"),
        (lambda: SLALoss(num_classes=0), ValueError, "num_classes"),
        (lambda: SLALoss(weight=math.nan), ValueError, "weight is nan"),
    ]
    for call, error, sentence in cases:
        with pytest.raises(error, match=sentence):
            call()
