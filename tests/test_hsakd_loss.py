"""HSAKD's three losses: the original's numbers, plain formulas, labels, autograd, compile, limits, refusals."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from golden_utils import golden_settings, load_golden
from numerics import assert_close
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import frskd_fast
from frskd_fast.losses import HSAKDLoss, HSAKDOnlineLoss, HSAKDTeacherLoss

IMPLEMENTATIONS = ["reference", "cpu"]
EXACT = {"rtol": 1e-9, "atol": 1e-13}


class Case(NamedTuple):
    """One of the losses on tensors of a fixed order: those with a gradient, then the frozen teacher's."""

    name: str
    trained: int  # networks with a gradient
    frozen: int
    build: Callable[..., Any]
    arguments: Callable[[list[list[Tensor]]], tuple[Any, ...]]  # networks -> what the loss is called with
    parts: tuple[str, ...]


CASES = {
    "offline": Case(
        "offline",
        1,
        1,
        HSAKDLoss,
        lambda n: (n[0][0], n[1][0], n[0][1:], n[1][1:]),
        ("loss", "ce", "kd", "auxiliary_kd"),
    ),
    "teacher": Case("teacher", 1, 0, HSAKDTeacherLoss, lambda n: (n[0][0], n[0][1:]), ("loss", "ce", "auxiliary_ce")),
    "online": Case(
        "online",
        2,
        0,
        HSAKDOnlineLoss,
        lambda n: ([n[0][0], n[1][0]], [n[0][1:], n[1][1:]]),
        ("loss", "ce", "auxiliary_ce", "kd", "auxiliary_kd"),
    ),
}


def networks_of(case: Case, images: int = 5, classes: int = 6, heads: int = 3, dtype: Any = torch.float64) -> Any:
    """Logits (4N, K) and heads x (4N, 4K) of every network of a case."""
    shapes = [(4 * images, classes), *[(4 * images, 4 * classes)] * heads]
    return [[(2 * torch.randn(shape)).to(dtype) for shape in shapes] for _ in range(case.trained + case.frozen)]


def leaves_of(case: Case, networks: list[list[Tensor]], dtype: Any) -> list[list[Tensor]]:
    return [
        [x.detach().to(dtype, copy=True).requires_grad_(index < case.trained) for x in network]
        for index, network in enumerate(networks)
    ]


def divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    p = F.softmax(teacher.detach() / temperature, 1)
    ratio = F.log_softmax(teacher.detach() / temperature, 1) - F.log_softmax(student / temperature, 1)
    return temperature**2 * (p * ratio).sum() / max(len(student), 1)


def plain_parts(
    case: Case, networks: list[list[Tensor]], cross_entropy: Callable[[Tensor, bool], Tensor], temperature: float
) -> dict[str, Tensor]:
    """The objective step by step; `cross_entropy(logits, joint)` knows the labels."""

    def stacked(values: list[Tensor]) -> Tensor:
        return torch.stack(values) if values else networks[0][0].new_zeros(0)

    ce = [cross_entropy(network[0][0::4], False) for network in networks]
    if case.name == "teacher":
        auxiliary = stacked([cross_entropy(head, True) for head in networks[0][1:]])
        return {"loss": ce[0] + auxiliary.sum(), "ce": ce[0], "auxiliary_ce": auxiliary}
    if case.name == "offline":
        kd, *auxiliary_kd = (divergence(s, t, temperature) for s, t in zip(*networks, strict=True))
        pulled = stacked(auxiliary_kd)
        return {"loss": ce[0] + kd + pulled.sum(), "ce": ce[0], "kd": kd, "auxiliary_kd": pulled}
    auxiliary_ce = torch.stack([stacked([cross_entropy(head, True) for head in net[1:]]) for net in networks])
    pulls = torch.stack(
        [
            torch.stack([divergence(s, t, temperature) for s, t in zip(net, other, strict=True)])
            for net, other in zip(networks, networks[::-1], strict=True)
        ]
    )
    total = sum(ce) + auxiliary_ce.sum() + pulls.sum()
    parts = {"loss": total, "ce": torch.stack(ce), "auxiliary_ce": auxiliary_ce}
    return {**parts, "kd": pulls[:, 0], "auxiliary_kd": pulls[:, 1:]}


def joint_of(labels: Tensor) -> Tensor:
    """4y + r, ignored labels kept."""
    return torch.stack([4 * labels + r for r in range(4)], 1).where(labels[:, None] != -100, -100).flatten()


def of_labels(labels: Tensor) -> Callable[[Tensor, bool], Tensor]:
    return lambda logits, joint: F.cross_entropy(logits, joint_of(labels) if joint else labels)


def gradients_of(total: Tensor, leaves: list[list[Tensor]]) -> tuple[Tensor, ...]:
    trained = [x for network in leaves for x in network if x.requires_grad]
    return torch.autograd.grad(total, trained, allow_unused=True, materialize_grads=True)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_golden_offline(impl: str) -> None:
    """Stored in float32: ours in that dtype is no further from float64 than the original's numbers."""
    stored, settings = load_golden("hsakd_offline"), golden_settings("hsakd_offline")
    names = ["logits", *(f"aux.{head}" for head in range(3))]

    def run(dtype: torch.dtype, function: Callable[[list[list[Tensor]]], Tensor]) -> dict[str, Tensor]:
        networks = [[stored[f"{side}_{name}"] for name in names] for side in ("student", "teacher")]
        leaves = leaves_of(CASES["offline"], networks, dtype)
        loss = function(leaves)
        gradients = dict(zip((f"grad.student_{name}" for name in names), gradients_of(loss, leaves), strict=True))
        return {"loss": loss.detach(), **gradients}

    criterion = HSAKDLoss(settings["temperature"], impl=impl)
    labels = stored["targets"]
    truth = run(
        torch.float64,
        lambda n: plain_parts(CASES["offline"], n, of_labels(labels), settings["temperature"])["loss"],
    )
    ours = run(torch.float32, lambda n: criterion(*CASES["offline"].arguments(n), labels))
    for name, value in ours.items():
        assert_close(value, stored[name].reshape(value.shape), truth[name], name)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_golden_online(impl: str) -> None:
    stored, settings = load_golden("hsakd_online"), golden_settings("hsakd_online")
    heads = range(settings["heads"])
    leaves = {k: v.requires_grad_() for k, v in stored.items() if k.startswith(("logits.", "aux."))}
    auxiliary = [[leaves[f"aux.{network}.{head}"] for head in heads] for network in range(2)]
    criterion = HSAKDOnlineLoss(settings["temperature"], impl=impl)
    parts = criterion([leaves["logits.0"], leaves["logits.1"]], auxiliary, stored["targets"], return_parts=True)
    for part, name in zip(parts, ("loss", "ce", "aux_ce", "kl", "aux_kl"), strict=True):
        torch.testing.assert_close(part.detach(), stored[name], **EXACT)
    parts.loss.backward()
    for name, leaf in leaves.items():
        torch.testing.assert_close(leaf.grad, stored[f"grad.{name}"], **EXACT)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_golden_teacher(impl: str) -> None:
    stored = load_golden("hsakd_teacher")
    leaves = {k: v.requires_grad_() for k, v in stored.items() if k == "logits" or k.startswith("aux.")}
    auxiliary = [leaves[f"aux.{head}"] for head in range(golden_settings("hsakd_teacher")["heads"])]
    parts = HSAKDTeacherLoss(impl=impl)(leaves["logits"], auxiliary, stored["targets"], return_parts=True)
    for part, name in zip(parts, ("loss", "ce", "aux_ce"), strict=True):
        torch.testing.assert_close(part.detach(), stored[name], **EXACT)
    parts.loss.backward()
    for name, leaf in leaves.items():
        torch.testing.assert_close(leaf.grad, stored[f"grad.{name}"], **EXACT)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_closed_form(impl: str) -> None:
    """The numbers of a transcription of the original's expressions on sines, in float64; two heads."""

    def sine(columns: int, a: float, b: float) -> Tensor:
        return torch.sin(a * torch.arange(8 * columns, dtype=torch.float64) + b).view(8, columns)

    student = [sine(5, 0.37, 0.0), sine(20, 0.31, 0.5), sine(20, 0.29, 0.7)]
    teacher = [sine(5, 0.23, 1.0), sine(20, 0.19, 0.2), sine(20, 0.17, 0.4)]
    labels = torch.tensor([3, 1])
    parts = HSAKDLoss(impl=impl)(student[0], teacher[0], student[1:], teacher[1:], labels, return_parts=True)
    wanted = (2.3869333608196204, 1.4106268148568333, 0.09149218146034227, [0.4339241489566201, 0.45089021554582476])
    torch.testing.assert_close(tuple(parts), tuple(torch.tensor(x, dtype=torch.float64) for x in wanted), **EXACT)
    assert HSAKDTeacherLoss(impl=impl)(student[0], student[1:], labels).item() == pytest.approx(8.421194754886823, 1e-9)
    online = HSAKDOnlineLoss(impl=impl)([student[0], teacher[0]], [student[1:], teacher[1:]], labels)
    assert online.item() == pytest.approx(18.244437350476577, 1e-9)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("heads", [0, 3])
@pytest.mark.parametrize("name", CASES)
def test_every_kind_of_target(name: str, heads: int, impl: str) -> None:
    case = CASES[name]
    labels, other = torch.tensor([4, 0, -100, 2, 5]), torch.tensor([1, 1, 3, -100, 0])
    mix = 0.3
    both = torch.tensor(mix, dtype=torch.float64)

    def of_two(logits: Tensor, joint: bool) -> Tensor:
        first, second = (joint_of(labels), joint_of(other)) if joint else (labels, other)
        terms = [F.cross_entropy(logits, side, reduction="sum") for side in (first, second)]
        weight = mix * (first != -100).sum() + (1 - mix) * (second != -100).sum()
        return (mix * terms[0] + (1 - mix) * terms[1]) / weight

    probabilities = torch.softmax(torch.randn(5, 6, dtype=torch.float64), 1)

    def of_probabilities(logits: Tensor, joint: bool) -> Tensor:
        spread = torch.zeros(5, 4, 6, 4, dtype=torch.float64)
        for r in range(4):
            spread[:, r, :, r] = probabilities
        return F.cross_entropy(logits, spread.view(20, 24) if joint else probabilities)

    kinds: list[tuple[Any, Callable[[Tensor, bool], Tensor]]] = [
        (labels, of_labels(labels)),
        (labels.int(), of_labels(labels)),
        ((labels, other, mix), of_two),
        ((labels, other, both), of_two),
        (probabilities, of_probabilities),
        (torch.full((5,), -100), lambda logits, joint: 0.0 * logits.sum()),
    ]
    settings = {} if name == "teacher" else {"temperature": 1.7}
    criterion = case.build(**settings, impl=impl)
    for targets, cross_entropy in kinds:
        leaves = leaves_of(case, networks_of(case, heads=heads), torch.float64)
        parts = criterion(*case.arguments(leaves), targets, return_parts=True)
        wanted = plain_parts(case, leaves, cross_entropy, 1.7)
        assert parts._fields == case.parts == tuple(wanted)
        for part, value in zip(parts, wanted.values(), strict=True):
            torch.testing.assert_close(part.detach(), value.detach(), **EXACT)
        assert [part.requires_grad for part in parts] == [True, *[False] * (len(parts) - 1)]
        assert torch.equal(criterion(*case.arguments(leaves), targets), parts.loss)
        got, truth = gradients_of(parts.loss, leaves), gradients_of(wanted["loss"], leaves)
        torch.testing.assert_close(got, truth, **EXACT)
        assert frskd_fast.last_impl()["logits"] == impl


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("ignored", [255, 3, -1])  # 255 is also the joint label of class 63, turned three times
@pytest.mark.parametrize("name", CASES)
def test_an_ignored_label_is_no_joint_label(name: str, ignored: int, impl: str) -> None:
    case = CASES[name]
    leaves = leaves_of(case, networks_of(case, images=4, classes=100), torch.float64)
    labels, other = torch.tensor([63, 0, -100, 1]), torch.tensor([1, 63, 2, -100])
    renamed, renamed_other = (side.masked_fill(side == -100, ignored) for side in (labels, other))
    for given, wanted in (
        (renamed, labels),
        ((renamed, renamed_other, 0.3), (labels, other, 0.3)),
        ((renamed, renamed_other, torch.tensor(0.3)), (labels, other, torch.tensor(0.3))),
    ):
        parts = case.build(ignore_index=ignored, impl=impl)(*case.arguments(leaves), given, return_parts=True)
        truth = case.build(impl=impl)(*case.arguments(leaves), wanted, return_parts=True)
        torch.testing.assert_close(tuple(parts), tuple(truth), **EXACT)
        torch.testing.assert_close(gradients_of(parts.loss, leaves), gradients_of(truth.loss, leaves), **EXACT)
    # 300 is beyond the classes and among the joint labels, -100 is an ignored label elsewhere.
    for wrong in (300, -100):
        with pytest.raises(ValueError, match=f"targets holds the label {wrong}, but .*or ignore_index={ignored}"):
            case.build(ignore_index=ignored, impl=impl)(*case.arguments(leaves), labels.new_full((4,), wrong))


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_three_way(name: str, dtype: torch.dtype, impl: str) -> None:
    case = CASES[name]
    networks = networks_of(case, images=3, classes=7, dtype=dtype)
    labels = torch.tensor([6, 0, 3])
    criterion = case.build(impl=impl)

    def run(function: Callable[[list[list[Tensor]]], Tensor], dtype: torch.dtype) -> list[Tensor]:
        leaves = leaves_of(case, networks, dtype)
        loss = function(leaves)
        return [loss.detach(), *gradients_of(loss * 128, leaves)]

    def plain(leaves: list[list[Tensor]]) -> Tensor:
        return plain_parts(case, leaves, of_labels(labels), 3.0)["loss"]

    ours = run(lambda leaves: criterion(*case.arguments(leaves), labels), dtype)
    assert ours[0].dtype == torch.float32
    for index, triple in enumerate(zip(ours, run(plain, dtype), run(plain, torch.float64), strict=True)):
        assert_close(*triple, f"result {index}", scale=16.0 if index == 0 else 0.0)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", CASES)
def test_gradcheck(name: str, impl: str) -> None:
    case = CASES[name]
    networks = leaves_of(case, networks_of(case, images=1, classes=2, heads=1), torch.float64)
    fixed = networks[case.trained :]
    labels = torch.tensor([1])
    criterion = case.build(impl=impl)
    if name != "online":  # whose detached halves no difference quotient sees
        flat = [x for network in networks[: case.trained] for x in network]
        assert torch.autograd.gradcheck(lambda *x: criterion(*case.arguments([list(x), *fixed]), labels), flat)
    total = criterion(*case.arguments(networks), labels)
    (first,) = torch.autograd.grad(total, networks[0][0], create_graph=True)
    if impl == "reference":
        assert torch.autograd.grad(first.sum(), networks[0][0])[0].isfinite().all()
    else:
        with pytest.raises(RuntimeError, match="have no second derivative"):
            first.sum().backward()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_nothing_reaches_the_teacher_and_it_may_come_from_inference_mode(impl: str) -> None:
    student, teacher = leaves_of(CASES["offline"], networks_of(CASES["offline"]), torch.float64)
    labels = torch.tensor([4, 0, 3, 2, 5])
    criterion = HSAKDLoss(impl=impl)
    with torch.inference_mode():
        answers = [2.0 * x for x in teacher]
    criterion(student[0], answers[0], student[1:], answers[1:], labels).backward()
    gradients = [x.grad for x in student]
    doubled = [(2.0 * x).requires_grad_() for x in teacher]
    total = criterion(student[0], doubled[0], student[1:], doubled[1:], labels)
    assert all(map(torch.equal, torch.autograd.grad(total, student, retain_graph=True), gradients))
    reached = torch.autograd.grad(total, doubled, allow_unused=True)
    assert all(gradient is None for gradient in reached)
    with torch.no_grad():
        assert not criterion(student[0], doubled[0], student[1:], doubled[1:], labels).requires_grad


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", CASES)
def test_limits(name: str, impl: str) -> None:
    """No images; a single head trained; strides of all kinds; a mask and a NaN."""
    case = CASES[name]
    criterion = case.build(impl=impl)
    leaves = leaves_of(case, networks_of(case, images=0), torch.float64)
    total = criterion(*case.arguments(leaves), torch.zeros(0, dtype=torch.int64))
    assert total == 0 and all(gradient.shape[0] == 0 for gradient in gradients_of(total, leaves))

    networks = networks_of(case)
    labels = torch.tensor([4, 0, 3, 2, 5])
    strided = [[torch.stack([x, x], 2)[..., 0] for x in network] for network in networks]
    wanted = criterion(*case.arguments(networks), labels)
    torch.testing.assert_close(criterion(*case.arguments(strided), labels.repeat(2, 1).T[:, 0]), wanted, **EXACT)
    full = leaves_of(case, networks, torch.float64)
    only = networks[0][1].requires_grad_()
    (alone,) = torch.autograd.grad(criterion(*case.arguments(networks), labels), only)
    assert torch.equal(alone, gradients_of(criterion(*case.arguments(full), labels), full)[1])

    for network in networks:  # a class that everybody excludes, and nobody is
        network[0] = network[0].index_fill(1, torch.tensor(1), -math.inf)
    leaves = leaves_of(case, networks, torch.float64)
    total = criterion(*case.arguments(leaves), labels)
    assert total.isfinite() and all(gradient.isfinite().all() for gradient in gradients_of(total, leaves))
    networks[0][2][7, 3] = math.nan
    assert criterion(*case.arguments(networks), labels).isnan()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("name", "kind"), [("offline", "labels"), ("offline", "mix"), ("teacher", "labels"), ("online", "labels")]
)
def test_fullgraph_compile_with_dynamic_batch(name: str, kind: str, impl: str) -> None:
    torch.compiler.reset()
    case = CASES[name]
    criterion = case.build(impl=impl)
    backend = CompileCounterWithBackend("aot_eager")

    def step(networks: list[list[Tensor]], targets: Any) -> Any:
        return criterion(*case.arguments(networks), targets, return_parts=True)

    compiled = torch.compile(step, backend=backend, fullgraph=True, dynamic=True)
    compilations = []
    for images in (5, 7, 9):  # unlike any other size, which the compiler would tie to the batch
        leaves = leaves_of(case, networks_of(case, images=images, classes=3, heads=2), torch.float32)
        labels = torch.randint(3, (images,))
        targets: Any = {"labels": labels, "mix": (labels, labels.flip(0), 0.25)}[kind]
        parts = compiled(leaves, targets)
        wanted = step(leaves, targets)
        torch.testing.assert_close(tuple(parts), tuple(wanted))
        torch.testing.assert_close(gradients_of(parts.loss, leaves), gradients_of(wanted.loss, leaves))
        compilations.append(backend.frame_count)
    assert compilations[0] == compilations[-1], f"recompiled for another batch size: {compilations}"


def test_settings_and_what_tasks_are_told() -> None:
    assert repr(HSAKDLoss()) == "HSAKDLoss(temperature=3.0, impl='auto')"
    assert repr(HSAKDOnlineLoss(4)) == "HSAKDOnlineLoss(temperature=4.0, impl='auto')"
    assert repr(HSAKDTeacherLoss(impl="cpu")) == "HSAKDTeacherLoss(impl='cpu')"
    assert HSAKDLoss.passes == HSAKDTeacherLoss.passes == HSAKDOnlineLoss.passes == "one"
    for settings, sentence in (
        ({"temperature": 0}, "temperature is 0"),
        ({"ignore_index": 0.5}, "ignore_index is 0.5"),
        ({"impl": "gpu"}, "the argument impl is 'gpu'"),
    ):
        with pytest.raises(ValueError, match=sentence):
            HSAKDLoss(**settings)  # type: ignore[arg-type]


def test_inputs_that_do_not_fit_are_refused() -> None:
    student, teacher = networks_of(CASES["offline"])
    z, auxiliary, z_t, auxiliary_t = student[0], student[1:], teacher[0], teacher[1:]
    labels, lam = torch.tensor([4, 0, 3, 2, 5]), torch.tensor(0.3)
    offline, stage, online = HSAKDLoss(), HSAKDTeacherLoss(), HSAKDOnlineLoss()
    cases: list[tuple[Callable[[], Any], type[Exception], str]] = [
        (lambda: offline(z[:5], z_t, auxiliary, auxiliary_t, labels), ValueError, r"student_logits has shape \(5, 6\)"),
        (lambda: offline(z[0], z_t, auxiliary, auxiliary_t, labels), ValueError, r"student_logits has shape \(6,\)"),
        (lambda: offline(None, z_t, auxiliary, auxiliary_t, labels), TypeError, "student_logits is a NoneType"),
        (lambda: offline(z, z_t, auxiliary[0], auxiliary_t, labels), TypeError, "student_aux is a Tensor, but a list"),
        (
            lambda: offline(z, z_t, auxiliary, auxiliary_t[:2], labels),
            ValueError,
            "teacher_aux has 2 heads, but student_aux has 3",
        ),
        (
            lambda: offline(z, z_t, [auxiliary[0].float(), *auxiliary[1:]], auxiliary_t, labels),
            TypeError,
            r"student_aux\[0\] has dtype torch.float32, but student_logits has torch.float64",
        ),
        (
            lambda: offline(z.half(), z_t.half(), [a.bfloat16() for a in auxiliary], auxiliary_t, labels),
            TypeError,
            r"student_aux\[0\] has dtype torch.bfloat16",
        ),
        (
            lambda: offline(z, z_t.float(), auxiliary, [a.float() for a in auxiliary_t], labels),
            TypeError,
            "teacher_logits has dtype torch.float32, but student_logits has torch.float64",
        ),
        (
            lambda: offline(z, z_t[:8], auxiliary, [a[:8] for a in auxiliary_t], labels),
            ValueError,
            r"teacher_logits has shape \(8, 6\)",
        ),
        (
            lambda: stage(z, [auxiliary[0], auxiliary[1][:, :6]], labels),
            ValueError,
            r"aux\[1\] has shape \(20, 6\), but \(20, 24\)",
        ),
        (lambda: stage(z, [a.to("meta") for a in auxiliary], labels), ValueError, r"aux\[0\] is on meta"),
        (lambda: stage(z, auxiliary, labels.repeat(4)), ValueError, r"targets has shape \(20,\)"),
        (lambda: stage(z, auxiliary, labels.bool()), TypeError, "targets has dtype torch.bool"),
        (lambda: stage(z, auxiliary, None), TypeError, "targets is None"),
        (lambda: stage(z, auxiliary, "cat"), TypeError, "targets is a str"),
        (lambda: stage(z, auxiliary, labels + 3), ValueError, "holds the label 7, but with 6 classes"),
        (lambda: stage(z, auxiliary, (labels, labels, 1.5)), ValueError, r"targets\[2\] \(lam\) is 1.5"),
        (lambda: stage(z, auxiliary, (labels, labels[:3], lam)), ValueError, r"targets\[1\] has shape \(3,\)"),
        (lambda: stage(z, auxiliary, (labels.double(), labels, lam)), TypeError, r"targets\[0\] has dtype"),
        (lambda: stage(z, auxiliary, (labels, labels + 3, lam)), ValueError, r"targets\[1\] holds the label 7"),
        (lambda: online(z, [auxiliary, auxiliary_t], labels), TypeError, "logits has type Tensor"),
        (lambda: online([z, z_t], [auxiliary], labels), TypeError, "aux has 1 entries"),
        (lambda: online([z, z_t], [auxiliary, []], labels), ValueError, r"aux\[1\] has 0 heads, but aux\[0\] has 3"),
        (lambda: online([z, z_t.float()], [[], []], labels), TypeError, r"logits\[1\] has dtype"),
    ]
    for call, error, sentence in cases:
        for impl in IMPLEMENTATIONS:
            offline.impl = stage.impl = online.impl = impl
            with pytest.raises(error, match=sentence) as caught:
                call()
            assert str(caught.value).endswith(".")
