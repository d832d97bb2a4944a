"""Operation ``logits``: every implementation that runs on the CPU against float64, layouts, targets, autograd, compile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import formulas
import pytest
import torch
import torch.nn.functional as F
from numerics import assert_close
from torch import Tensor

import frskd_fast
from frskd_fast import functional
from frskd_fast.ops import logits as logits_ops
from frskd_fast.reference.logits import Heads, Saved, Settings, Upstream, Wanted

IMPLEMENTATIONS = ["reference", "cpu"]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# One class, fewer classes than a vector, one more than a vector, more than a tile of 1024, maps of odd size, a map with more
# pixels than a tile of 128, rows with one spatial axis.
SHAPES = [(3, 1), (5, 3), (4, 9), (2, 1100), (2, 5, 3, 7), (2, 4, 15, 11), (3, 6, 5)]
# layout, temperature, label smoothing: every layout, every way to take the exponentials, with and without smoothing
SETTINGS = [
    ("contiguous", 4.0, 0.0),
    ("channels_last", 1.0, 0.1),
    ("sliced", 2.0, 0.0),
    ("expanded", 4.0, 0.1),
    ("contiguous", 0.7, 0.1),
    ("channels_last", 10.0, 0.0),
]
PARTS = ("ce_student", "ce_teacher", "kd")


def _channels_last(logits: Tensor) -> Tensor:
    return logits.movedim(1, -1).contiguous().movedim(-1, 1)


def _sliced(logits: Tensor) -> Tensor:
    storage = torch.full([2 * size + 1 for size in logits.shape], 9.0, dtype=logits.dtype)
    view = storage[tuple(slice(1, None, 2) for _ in logits.shape)]
    view.copy_(logits)
    return view


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda logits: logits,
    "channels_last": _channels_last,
    "sliced": _sliced,
    "expanded": lambda logits: logits[:1].expand(logits.shape),
}


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


def _distribution(targets: Any, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor | float]:
    if isinstance(targets, tuple):
        first, second, lam = targets
        one = lam * formulas.label_distribution(first, shape[1], -100, dtype)
        both = one + (1 - lam) * formulas.label_distribution(second, shape[1], -100, dtype)
        return both, both.sum(1, keepdim=True)
    if targets.dtype.is_floating_point:
        return targets.to(dtype), 1.0
    hot = formulas.label_distribution(targets, shape[1], -100, dtype)
    return hot, hot.sum(1, keepdim=True)


def _plain(
    student: Tensor, teacher: Tensor, targets: Any, temperature: float, smoothing: float
) -> tuple[Tensor, Tensor, Tensor]:
    kd = formulas.divergence(student, teacher, temperature)
    if targets is None:
        return torch.zeros_like(kd), torch.zeros_like(kd), kd
    distribution, mass = _distribution(targets, tuple(student.shape), student.dtype)
    ce_student = formulas.cross_entropy(student, distribution, mass, smoothing)
    return ce_student, formulas.cross_entropy(teacher, distribution, mass, smoothing), kd


def _run(
    function: Callable[[Tensor, Tensor], Any], student: Tensor, teacher: Tensor, grads: Tensor, dtype: torch.dtype
) -> list[Tensor]:
    leaves = [x.detach().to(dtype, copy=True, memory_format=torch.preserve_format) for x in (student, teacher)]
    leaves = [student, teacher] if dtype == student.dtype else leaves
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    parts = function(*leaves)
    sum((part * grad.to(part.dtype)).sum() for part, grad in zip(parts, grads, strict=True)).backward()
    gradients = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves]
    return [part.detach() for part in parts] + gradients


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
@pytest.mark.parametrize("shape", [(4, 6), (2, 6, 3, 4)], ids=str)
def test_all_labels_ignored(shape: tuple[int, ...], impl: str) -> None:
    student = torch.randn(shape, requires_grad=True)
    labels = torch.full((shape[0], *shape[2:]), -100)
    parts = functional.cross_entropy_kd(student, torch.randn(shape), labels, label_smoothing=0.1, impl=impl)
    (parts.ce_student + parts.ce_teacher).backward()
    assert parts.ce_student.item() == 0.0 and parts.ce_teacher.item() == 0.0
    assert student.grad is not None and torch.equal(student.grad, torch.zeros_like(student))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", [(4, 6), (2, 6, 3, 4)], ids=str)
def test_masked_classes_contribute_nothing(shape: tuple[int, ...], impl: str) -> None:
    """A class whose logit is -inf on both sides is as good as absent."""
    student, teacher = torch.randn(shape, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)
    keep = [0, 1, 3, 5]
    for side in (student, teacher):
        side[:, [2, 4]] = -torch.inf
    student.requires_grad_()
    wanted_leaf = student.detach()[:, keep].requires_grad_()
    labels = torch.ones(shape[0], *shape[2:], dtype=torch.int64)
    parts = functional.cross_entropy_kd(student, teacher, labels, impl=impl)
    wanted = functional.cross_entropy_kd(wanted_leaf, teacher[:, keep], labels, impl="reference")
    for one, other in zip(parts, wanted, strict=True):
        torch.testing.assert_close(one, other)
    (parts.ce_student + parts.kd).backward()
    (wanted.ce_student + wanted.kd).backward()
    assert student.grad is not None
    torch.testing.assert_close(student.grad[:, keep], wanted_leaf.grad)
    assert torch.equal(student.grad[:, [2, 4]], torch.zeros_like(student.grad[:, [2, 4]]))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("teacher_mask", [-1e9, -torch.inf])
@pytest.mark.parametrize("masked", [1024, 1000, 2048])
def test_masked_tiles_contribute_nothing(masked: int, teacher_mask: float, impl: str) -> None:
    """Whole tiles of classes that the student masks and the teacher gives no weight."""
    student, teacher = torch.randn(2, 3000), torch.randn(2, 3000)
    student[:, :masked] = -torch.inf
    teacher[:, :masked] = teacher_mask
    student.requires_grad_()
    loss = functional.kd_loss(student, teacher, impl=impl)
    wanted = functional.kd_loss(student.detach()[:, masked:].double(), teacher[:, masked:].double(), impl="reference")
    torch.testing.assert_close(loss.double(), wanted, rtol=1e-5, atol=1e-5)
    loss.backward()
    assert student.grad is not None and student.grad.isfinite().all()


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
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(4, 3000), (2, 21, 4, 5)], ids=str)
def test_huge_logits_keep_their_digits(shape: tuple[int, ...], dtype: torch.dtype, impl: str) -> None:
    student, teacher = ((3e4 + 8 * torch.randn(shape)).to(dtype).requires_grad_() for _ in range(2))
    labels = torch.randint(shape[1], (shape[0], *shape[2:]))
    parts = functional.cross_entropy_kd(student, teacher, labels, reduction="none", impl=impl)
    true_student = student.detach().double().requires_grad_()
    true = _plain(true_student, teacher.detach().double(), labels, 4.0, 0.0)
    for name, one, other in zip(PARTS, parts, true, strict=True):
        assert_close(one, other, other, name, scale=16.0)
    (parts.ce_student + parts.kd).sum().backward()
    (true[0] + true[2]).sum().backward()
    assert student.grad is not None and true_student.grad is not None
    assert_close(student.grad, true_student.grad, true_student.grad, "gradient", scale=4.0)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", [(3, 2000), (3, 5), (2, 5, 3, 4)], ids=str)
def test_nan_is_never_hidden(shape: tuple[int, ...], impl: str) -> None:
    student = torch.randn(shape)
    student[1, shape[1] - 1] = float("nan")
    student.requires_grad_()
    labels = torch.zeros(shape[0], *shape[2:], dtype=torch.int64)
    parts = functional.cross_entropy_kd(student, torch.randn(shape), labels, reduction="none", impl=impl)
    assert parts.ce_student[0].isfinite().all() and parts.kd[0].isfinite().all()
    assert parts.ce_student[1].isnan().all() and parts.kd[1].isnan().all()
    (parts.ce_student + parts.kd).sum().backward()
    assert student.grad is not None and student.grad[0].isfinite().all() and student.grad[1].isnan().any()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", [(0, 4), (0, 4, 3, 3), (2, 4, 0, 3)], ids=str)
def test_no_rows(shape: tuple[int, ...], impl: str) -> None:
    student = torch.randn(shape, requires_grad=True)
    labels = torch.zeros(shape[0], *shape[2:], dtype=torch.int64)
    parts = functional.cross_entropy_kd(student, torch.randn(shape), labels, impl=impl)
    sum(parts).backward()
    assert [part.item() for part in parts] == [0.0, 0.0, 0.0]
    assert student.grad is not None and student.grad.shape == student.shape


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
def test_student_alone(impl: str) -> None:
    student = torch.randn(5, 7, requires_grad=True)
    labels = torch.randint(7, (5,))
    parts = functional.cross_entropy_kd(student, None, labels, impl=impl)
    torch.testing.assert_close(parts.ce_student, F.cross_entropy(student, labels))
    assert parts.ce_teacher.item() == 0.0 and parts.kd.item() == 0.0
    (gradient,) = torch.autograd.grad(parts.ce_student, student)
    torch.testing.assert_close(gradient, torch.autograd.grad(F.cross_entropy(student, labels), student)[0])


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8], ids=str)
def test_other_integer_labels(dtype: torch.dtype, impl: str) -> None:
    student, labels = torch.randn(5, 7), torch.randint(7, (5,))
    parts = functional.cross_entropy_kd(student, student, labels.to(dtype), impl=impl)
    torch.testing.assert_close(parts.ce_student, F.cross_entropy(student, labels))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_strided_labels(impl: str) -> None:
    student = torch.randn(2, 5, 3, 4)
    labels = torch.randint(5, (4, 3, 2)).permute(2, 1, 0)
    parts = functional.cross_entropy_kd(student, student, labels, impl=impl)
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
