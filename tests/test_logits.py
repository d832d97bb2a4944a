"""Operation ``logits``: every implementation that runs on the CPU against float64, layouts, targets, autograd, compile."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from problems import Problem, problems
from torch import Tensor

import frskd_fast
from frskd_fast import _dispatch, functional
from frskd_fast.ops import logits as logits_ops
from frskd_fast.reference.logits import Heads, Saved, Settings, Upstream, Wanted

IMPLEMENTATIONS = ["reference", "cpu"]


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("problem", problems("logits"), ids=lambda problem: problem.name)
def test_problem(problem: Problem, impl: str) -> None:
    reason = _dispatch.problem(impl, "cpu", torch.float32)
    if reason is not None:
        pytest.skip(f"impl={impl!r}: {reason}")
    problem.run(impl, "cpu")


def _labels(shape: tuple[int, ...]) -> Tensor:
    labels = torch.randint(shape[1], (shape[0], *shape[2:]))
    labels.flatten()[::3] = -100
    return labels


def _targets(kind: str, shape: tuple[int, ...]) -> Any:
    if kind == "none":
        return None
    if kind == "labels":
        return _labels(shape)
    if kind == "mix":
        return _labels(shape), _labels(shape), 0.3
    return torch.softmax(torch.randn(shape), 1)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_reductions_follow_pytorch(smoothing: float, impl: str) -> None:
    student, teacher = torch.randn(6, 5, dtype=torch.float64), torch.randn(6, 5, dtype=torch.float64)
    labels = torch.tensor([1, 4, -100, 0, 2, -100])
    for reduction, name in (("batchmean", "mean"), ("sum", "sum"), ("none", "none")):
        leaf = student.clone().requires_grad_()
        parts = functional.cross_entropy_kd(
            leaf, teacher, labels, temperature=3.0, label_smoothing=smoothing, reduction=reduction, impl=impl
        )
        again = student.clone().requires_grad_()
        ce = F.cross_entropy(again, labels, reduction=name, label_smoothing=smoothing)
        kd = 9 * F.kl_div(
            F.log_softmax(again / 3, 1), F.softmax(teacher / 3, 1), reduction="none" if name == "none" else reduction
        )
        kd = kd.sum(1) if name == "none" else kd
        torch.testing.assert_close(parts.ce_student, ce)
        torch.testing.assert_close(
            parts.ce_teacher, F.cross_entropy(teacher, labels, reduction=name, label_smoothing=smoothing)
        )
        torch.testing.assert_close(parts.kd, kd)
        grad = torch.rand_like(ce)
        ((parts.ce_student + 2 * parts.kd) * grad).sum().backward()
        ((ce + 2 * kd) * grad).sum().backward()
        torch.testing.assert_close(leaf.grad, again.grad)


def test_gradients_can_be_asked_for_twice_and_apart() -> None:
    student, teacher = (torch.randn(6, 9, requires_grad=True) for _ in range(2))
    parts = functional.cross_entropy_kd(student, teacher, torch.arange(6), impl="cpu")
    apart = [torch.autograd.grad(part, student, retain_graph=True, allow_unused=True)[0] for part in parts]
    assert not apart[1].any()
    both = torch.autograd.grad(parts.ce_student + 3 * parts.kd, student, retain_graph=True)[0]
    torch.testing.assert_close(both, apart[0] + 3 * apart[2])
    total = parts.ce_student
    total += parts.ce_teacher  # a part is no view, so it can be added to in place
    gradients = torch.autograd.grad(total, [student, teacher])
    torch.testing.assert_close(gradients[0], apart[0])
    teacher_alone = F.cross_entropy(teacher, torch.arange(6))
    torch.testing.assert_close(gradients[1], torch.autograd.grad(teacher_alone, teacher)[0])


def test_logits_changed_between_the_passes_are_refused() -> None:
    student = torch.randn(5, 7, requires_grad=True)
    logits = student * 1.0
    kd = functional.kd_loss(logits, torch.randn(5, 7), impl="cpu")
    logits.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        kd.backward()


def test_a_teacher_under_inference_mode_is_one_like_any_other() -> None:
    """The usual way to ask a frozen teacher; PyTorch refuses to keep what it returns."""
    with torch.inference_mode():
        teacher, labels = torch.randn(4, 100), torch.randint(100, (4,))
    student = torch.randn(4, 100, requires_grad=True)
    for targets in (labels, (labels, labels.flip(0), 0.3), None):
        gradients = []
        for impl in ("cpu", "reference"):
            parts = functional.cross_entropy_kd(student, teacher, targets, impl=impl)
            total = parts.kd if targets is None else parts.ce_student + 2 * parts.kd
            gradients.append(torch.autograd.grad(total, student)[0])
        torch.testing.assert_close(gradients[0], gradients[1])


def test_parts_can_be_added_to_in_place() -> None:
    student = torch.randn(200, 1000, requires_grad=True)
    parts = functional.cross_entropy_kd(student, torch.randn(200, 1000), torch.arange(200), impl="cpu")
    total = parts.kd
    total += parts.ce_student
    total.backward()
    assert student.grad is not None


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", ["labels", "mix", "probabilities", "none"])
@pytest.mark.parametrize("shape", [(3, 4), (2, 3, 2, 5)], ids=str)
def test_gradcheck(shape: tuple[int, ...], kind: str, impl: str) -> None:
    student = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    targets = _targets(kind, shape)
    for reduction in ("none", "batchmean"):

        def function(s: Tensor, t: Tensor, reduction: str = reduction) -> tuple[Tensor, ...]:
            return functional.cross_entropy_kd(
                s,
                t,
                targets,
                temperature=1.7,
                label_smoothing=0.1,
                reduction=reduction,
                detach_teacher=False,
                impl=impl,
            )

        assert torch.autograd.gradcheck(function, [student, teacher])


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_several_heads_are_as_many_calls(impl: str) -> None:
    shapes = [(4, 7), (6, 3), (2, 5, 3, 3)]
    students = [torch.randn(shape, requires_grad=True) for shape in shapes]
    teachers = [torch.randn(shape) for shape in shapes]
    targets = [_labels(shape) for shape in shapes]
    for reduction in ("batchmean", "sum", "none"):
        together = functional.cross_entropy_kd(students, teachers, targets, reduction=reduction, impl=impl)
        weights = [torch.rand_like(part) if isinstance(part, Tensor) else None for part in together.kd]
        for head in range(3):
            alone = functional.cross_entropy_kd(
                students[head], teachers[head], targets[head], reduction=reduction, impl=impl
            )
            for one, other in zip(together, alone, strict=True):
                torch.testing.assert_close(one[head], other)
        # A plain sum sends one expanded number upstream.
        summed = torch.autograd.grad(sum(kd.sum() for kd in together.kd), students, retain_graph=True)
        for head in range(3):
            alone = functional.kd_loss(students[head], teachers[head], reduction=reduction, impl=impl)
            torch.testing.assert_close(summed[head], torch.autograd.grad(alone.sum(), students[head])[0])
        total = sum((kd * w).sum() for kd, w in zip(together.kd, weights, strict=True))
        total = total + sum((ce * 2).sum() for ce in together.ce_student)
        gradients = torch.autograd.grad(total, students)
        for head in range(3):
            alone = functional.cross_entropy_kd(
                students[head], teachers[head], targets[head], reduction=reduction, impl=impl
            )
            weight = weights[head]
            assert weight is not None
            (wanted,) = torch.autograd.grad((alone.kd * weight).sum() + (alone.ce_student * 2).sum(), students[head])
            torch.testing.assert_close(gradients[head], wanted)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_absent_parts_and_detached_teachers_ask_for_no_gradient(impl: str) -> None:
    student, teacher = torch.randn(3, 4, requires_grad=True), torch.randn(3, 4, requires_grad=True)
    parts = functional.cross_entropy_kd(student, teacher, impl=impl)
    assert [part.requires_grad for part in parts] == [False, False, True]
    parts.kd.backward()
    assert teacher.grad is None and student.grad is not None
    parts = functional.cross_entropy_kd(student, None, torch.zeros(3).long(), impl=impl)
    assert [part.requires_grad for part in parts] == [True, False, False]


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_stated_value(impl: str) -> None:
    """Value and gradient norm of a closed-form case computed by the original loss."""
    count = torch.arange(40, dtype=torch.float64)
    student = torch.sin(0.37 * count).view(4, 10).requires_grad_()
    teacher = torch.sin(0.23 * count + 1.0).view(4, 10)
    loss = functional.kd_loss(student, teacher, 4.0, impl=impl)
    loss.backward()
    assert student.grad is not None
    assert abs(loss.item() - 0.45851855558964416) < 1e-14
    assert abs(student.grad.norm().item() - 0.15025332027330648) < 1e-14
    assert student.grad.sum(1).abs().max().item() < 1e-15


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8], ids=str)
def test_other_integer_labels(dtype: torch.dtype, impl: str) -> None:
    student, labels = torch.randn(5, 7), torch.randint(7, (5,))
    parts = functional.cross_entropy_kd(student, student, labels.to(dtype), impl=impl)
    torch.testing.assert_close(parts.ce_student, F.cross_entropy(student, labels))


def test_equal_logits_have_exactly_no_divergence() -> None:
    logits = torch.randn(64, 100)
    assert functional.kd_loss(logits, logits, impl="cpu").item() == 0.0


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_bits_do_not_depend_on_the_number_of_threads(threads: int) -> None:
    student, teacher = torch.randn(300, 100), torch.randn(300, 100)
    labels = torch.randint(100, (300,))

    def run() -> list[Tensor]:
        leaf = student.clone().requires_grad_()
        parts = functional.cross_entropy_kd(leaf, teacher, labels, impl="cpu")
        (gradient,) = torch.autograd.grad(parts.ce_student + parts.kd, leaf)
        return [*(part.detach() for part in parts), gradient]

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = run()
        torch.set_num_threads(threads)
        assert all(torch.equal(one, other) for one, other in zip(alone, run(), strict=True))
    finally:
        torch.set_num_threads(before)


def test_double_backward_is_refused() -> None:
    student = torch.randn(3, 4, requires_grad=True)
    (gradient,) = torch.autograd.grad(
        functional.kd_loss(student, torch.randn(3, 4), impl="cpu"), student, create_graph=True
    )
    with pytest.raises(RuntimeError, match="no second derivative"):
        gradient.sum().backward()


@pytest.mark.parametrize("impl", ["cpu", "triton"])
@pytest.mark.parametrize("kind", ["labels", "mix", "probabilities", "none"])
def test_operators_pass_opcheck(kind: str, impl: str) -> None:
    """triton runs interpreted where there is no device."""
    if impl == "triton":
        pytest.importorskip("triton", reason="Triton is not installed")
    shapes = [(4, 5), (2, 3, 4, 4)]
    students, teachers = ([torch.randn(shape) for shape in shapes] for _ in range(2))
    targets = [_targets(kind, shape) for shape in shapes]
    first = [] if kind == "none" else [t[0] if isinstance(t, tuple) else t for t in targets]
    second = [t[1] for t in targets] if kind == "mix" else []
    heads, settings = Heads(students, teachers, first, second), Settings(0.3, 0.1, -100, 4.0)
    operators = torch.ops.frskd_fast
    torch.library.opcheck(operators.logits_forward.default, (*heads, *settings, impl))
    saved = Saved(*logits_ops.forward(heads, settings, impl))
    upstream = Upstream([torch.ones(1)] * 3, 0, 0, [float(bool(first)), float(bool(first)), 1.0], True)
    arguments = (*upstream, *heads, *settings, *saved, *Wanted(True, True, True), impl)
    torch.library.opcheck(operators.logits_backward.default, arguments)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_fullgraph_compile_with_dynamic_batch(impl: str) -> None:
    torch.compiler.reset()

    def function(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        parts = functional.cross_entropy_kd(student, teacher, labels, impl=impl)
        return parts.ce_student + parts.ce_teacher + 2 * parts.kd

    compiled = torch.compile(function, fullgraph=True, dynamic=True)
    for batch in (6, 7, 9):
        student, teacher = (torch.randn(batch, 5, requires_grad=True) for _ in range(2))
        labels = torch.randint(5, (batch,))
        gradients = torch.autograd.grad(compiled(student, teacher, labels), [student, teacher])
        wanted = torch.autograd.grad(function(student, teacher, labels), [student, teacher])
        torch.testing.assert_close(gradients, wanted)


def test_last_impl_tells_which_ran() -> None:
    functional.kd_loss(torch.zeros(2, 3), torch.zeros(2, 3))
    assert frskd_fast.last_impl()["logits"] == "cpu"
    with frskd_fast.use_impl("reference"):
        functional.kd_loss(torch.zeros(2, 3), torch.zeros(2, 3))
    assert frskd_fast.last_impl()["logits"] == "reference"


Z = torch.zeros(4, 5)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("student", "teacher", "targets", "options", "message"),
    [
        (torch.zeros(5), Z, None, {}, r"student_logits has shape \(5,\)"),
        (torch.zeros(4, 5, 1, 1, 1), Z, None, {}, "student_logits has shape"),
        (Z, torch.zeros(4, 6), None, {}, r"teacher_logits has shape \(4, 6\).*same classes"),
        (Z, torch.zeros(3, 5), None, {}, r"teacher_logits has shape \(3, 5\).*same batch"),
        (Z, Z.half(), None, {}, "teacher_logits has dtype torch.float16"),
        (Z, torch.zeros(4, 5, device="meta"), None, {}, "teacher_logits is on meta"),
        (Z.long(), Z.long(), None, {}, "student_logits has dtype torch.int64"),
        (torch.zeros(4, 0), torch.zeros(4, 0), None, {}, "at least one class"),
        (Z, Z, torch.tensor([0, 1, 2, 5]), {}, "holds the label 5.*from 0 to 4"),
        (Z, Z, torch.tensor([0, 1, 2, -1]), {}, "holds the label -1"),
        (Z, Z, torch.zeros(3).long(), {}, r"targets has shape \(3,\), but one class index for each row"),
        (Z, Z, torch.zeros(4), {}, "targets has dtype torch.float32 and shape"),
        (Z, Z, torch.zeros(4).bool(), {}, "targets has dtype torch.bool"),
        (Z, Z, (torch.zeros(4).long(), torch.zeros(4).long(), 1.5), {}, r"targets\[2\] \(lam\) is 1.5"),
        (Z, Z, (torch.zeros(4).long(), torch.zeros(4).long(), float("nan")), {}, r"targets\[2\] \(lam\) is nan"),
        (Z, Z, (torch.zeros(4).long(), torch.zeros(3).long(), 0.5), {}, r"targets\[1\] has shape \(3,\)"),
        (Z, Z, (torch.zeros(4).long(), torch.full((4,), 9), 0.5), {}, "holds the label 9"),
        (Z, Z, "labels", {}, "targets is a str"),
        (Z, Z, torch.zeros(4, 5, requires_grad=True), {}, "targets requires grad"),
        (Z, Z, None, {"temperature": 0.0}, "temperature is 0.0"),
        (Z, Z, None, {"temperature": -4.0}, "temperature is -4.0"),
        (Z, Z, None, {"temperature": float("nan")}, "temperature is nan"),
        (Z, Z, None, {"temperature": "warm"}, "temperature is 'warm'"),
        (Z, Z, None, {"label_smoothing": 1.5}, "label_smoothing is 1.5"),
        (Z, Z, None, {"reduction": "mean"}, "'batchmean' is the mean over rows"),
        ([Z, Z], [Z], None, {}, "teacher_logits has 1 heads"),
        ([Z, Z.double()], [Z, Z.double()], None, {}, r"student_logits\[1\] has dtype torch.float64"),
        ([], [], None, {}, "student_logits is empty"),
    ],
)
def test_bad_input_is_refused_in_a_sentence(
    student: Any, teacher: Any, targets: Any, options: dict[str, Any], message: str, impl: str
) -> None:
    with pytest.raises((TypeError, ValueError), match=message) as caught:
        functional.cross_entropy_kd(student, teacher, targets, impl=impl, **options)
    assert str(caught.value).endswith(".")
