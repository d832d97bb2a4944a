"""``FRSKDLoss``: the original's numbers through every implementation that runs on the CPU, API, autograd, compile."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import formulas
import pytest
import torch
from numerics import assert_close, largest_error
from safetensors.torch import load_file
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import frskd_fast
from frskd_fast.losses import FRSKDLoss

GOLDEN = Path(__file__).parent / "golden"
IMPLEMENTATIONS = ["reference", "cpu"]
CASES = {"default": (2.0, 100.0, 4.0), "cold": (1.0, 50.0, 1.0), "hot": (3.0, 200.0, 10.0)}


def _skip_without_triton(impl: str) -> None:
    if impl == "triton":
        pytest.importorskip("triton", reason="Triton is not installed")


def _inputs(
    dtype: torch.dtype = torch.float32, batch: int = 4, classes: int = 10, channels_last: bool = False
) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor], Tensor]:
    sizes = [(6, 8), (10, 4), (12, 2)]
    students = [torch.randn(batch, c, s, s).to(dtype) for c, s in sizes]
    teachers = [torch.randn(batch, 2 * c, s, s).to(dtype) for c, s in sizes]
    if channels_last:
        students = [x.contiguous(memory_format=torch.channels_last) for x in students]
        teachers = [x.contiguous(memory_format=torch.channels_last) for x in teachers]
    logits = [(2 * torch.randn(batch, classes)).to(dtype) for _ in range(2)]
    return logits[0], logits[1], students, teachers, torch.randint(classes, (batch,))


@pytest.mark.parametrize("impl", [*IMPLEMENTATIONS, "triton"])
@pytest.mark.parametrize("case", CASES)
def test_golden(case: str, impl: str) -> None:
    """Loss and gradients computed by the original implementation, float32; triton is interpreted without a device."""
    _skip_without_triton(impl)
    stored = load_file(GOLDEN / f"frskd_loss_{case}.safetensors")
    weights = CASES[case]
    device = "cuda" if impl == "triton" and torch.cuda.is_available() else "cpu"
    names = ["student_logits", "teacher_logits", *(f"student_feats.{level}" for level in range(3))]

    def run(function: Any, dtype: torch.dtype) -> dict[str, Tensor]:
        leaves = {name: stored[name].to(device, dtype, copy=True).requires_grad_() for name in names}
        teachers = [stored[f"teacher_feats.{level}"].to(device, dtype) for level in range(3)]
        targets = stored["targets"].to(device)
        arguments = leaves["student_logits"], leaves["teacher_logits"], [leaves[name] for name in names[2:]], teachers
        distill, total = function(*arguments, None), function(*arguments, targets)
        total.backward()
        gradients = {f"grad.{name}": leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
        return {"loss_distill": distill.detach(), "loss_total": total.detach(), **gradients}

    truth = run(lambda *arguments: formulas.frskd_loss(*arguments, *weights), torch.float64)
    ours = run(FRSKDLoss(*weights, impl=impl), torch.float32)
    assert set(ours) == {"loss_distill", "loss_total", *(name for name in stored if name.startswith("grad."))}
    for name, value in ours.items():
        golden = stored[name].to(device).reshape(value.shape)
        # The stored number is the original's float32; ours must be the same quantity, and no further from the truth.
        assert largest_error(golden, truth[name]) < 1e-5 * float(truth[name].abs().max())
        assert_close(value, golden, truth[name], name)


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_three_way(dtype: torch.dtype, channels_last: bool, impl: str) -> None:
    student, teacher, students, teachers, targets = _inputs(dtype, channels_last=channels_last)

    def run(function: Any, dtype: torch.dtype) -> list[Tensor]:
        leaves = [x.detach().to(dtype, copy=True).requires_grad_() for x in (student, teacher, *students)]
        loss = function(leaves[0], leaves[1], leaves[2:], [t.to(dtype) for t in teachers])
        (loss * 128).backward()
        return [loss.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]

    def plain(s: Tensor, t: Tensor, fs: list[Tensor], ft: list[Tensor]) -> Tensor:
        return formulas.frskd_loss(s, t, fs, ft, targets, 2.0, 100.0, 4.0)

    criterion = FRSKDLoss(impl=impl)
    mine = run(lambda s, t, fs, ft: criterion(s, t, fs, ft, targets), dtype)
    for index, (one, other, truth) in enumerate(zip(mine, run(plain, dtype), run(plain, torch.float64), strict=True)):
        assert_close(
            one, other, truth, "loss" if index == 0 else f"gradient {index}", scale=16.0 if index == 0 else 0.0
        )


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("impl", [*IMPLEMENTATIONS, "triton"])
def test_without_targets_logits_and_features_may_be_of_other_batches(impl: str) -> None:
    """With `--aux sla` the original's criterion gets 2N rows of logits and 5N feature maps."""
    _skip_without_triton(impl)
    device = "cuda" if impl == "triton" and torch.cuda.is_available() else "cpu"
    dtype = torch.float32 if impl == "triton" else torch.float64
    tolerance = {"rtol": 1e-5, "atol": 1e-7} if impl == "triton" else {"rtol": 1e-10, "atol": 1e-14}
    student, teacher, *_ = (x.to(device) for x in _inputs(dtype, batch=4)[:2])
    _, _, students, teachers, _ = _inputs(dtype, batch=10)
    students, teachers = [x.to(device).requires_grad_() for x in students], [x.to(device) for x in teachers]
    student.requires_grad_()
    loss = FRSKDLoss(1.5, 70.0, 3.0, impl=impl)
    wanted = formulas.frskd_loss(student, teacher, students, teachers, None, 1.5, 70.0, 3.0)
    parts = loss(student, teacher, students, teachers, return_parts=True)
    torch.testing.assert_close(parts.loss, wanted, **tolerance)
    torch.testing.assert_close(1.5 * parts.kd + 70.0 * parts.feature, wanted.detach(), **tolerance)
    got, gradients = (torch.autograd.grad(value, [student, *students]) for value in (parts.loss, wanted))
    torch.testing.assert_close(got, gradients, **tolerance)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", ["none", "labels", "mix", "probabilities"])
def test_gradcheck_and_parts(kind: str, impl: str) -> None:
    student, teacher, students, teachers, labels = _inputs(torch.float64, batch=2, classes=4)
    targets: Any = {
        "none": None,
        "labels": labels % 4,
        "mix": (labels % 4, (labels + 1) % 4, 0.3),
        "probabilities": torch.softmax(torch.randn(2, 4, dtype=torch.float64), 1),
    }[kind]
    criterion = FRSKDLoss(0.7, 3.0, 2.0, impl=impl, label_smoothing=0.1)
    leaves = [student.requires_grad_(), *(x[:, :2].clone().requires_grad_() for x in students[1:])]
    maps = teachers[1:]
    assert torch.autograd.gradcheck(lambda s, *fs: criterion(s, teacher, list(fs), maps, targets), leaves)
    parts = criterion(student, teacher, leaves[1:], maps, targets, return_parts=True)
    assert not any(part.requires_grad for part in parts[1:])
    torch.testing.assert_close(parts.loss, parts.ce_student + parts.ce_teacher + 0.7 * parts.kd + 3.0 * parts.feature)
    if kind == "none":
        assert parts.ce_student.item() == 0.0 and parts.ce_teacher.item() == 0.0
    torch.testing.assert_close(parts.feature, formulas.attention_rows(leaves[1:], maps).mean(1).sum())


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_what_reaches_the_self_teacher(impl: str) -> None:
    """Its cross-entropy does; KD and the feature term do not."""
    student, teacher, students, teachers, targets = _inputs()
    leaves = [teacher.clone().requires_grad_(), *(t.clone().requires_grad_() for t in teachers)]
    FRSKDLoss(impl=impl)(student, leaves[0], students, leaves[1:], targets).backward()
    wanted = teacher.clone().requires_grad_()
    torch.nn.functional.cross_entropy(wanted, targets).backward()
    torch.testing.assert_close(leaves[0].grad, wanted.grad)
    assert all(leaf.grad is None for leaf in leaves[1:])
    loss = FRSKDLoss(impl=impl)(student.requires_grad_(), leaves[0], students, leaves[1:])
    loss.backward()
    torch.testing.assert_close(leaves[0].grad, wanted.grad)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_every_weight_matters(impl: str) -> None:
    arguments = _inputs()
    base = FRSKDLoss(2.0, 100.0, 4.0, impl=impl)(*arguments).item()
    changed = [
        FRSKDLoss(3.0, 100.0, 4.0, impl=impl),
        FRSKDLoss(2.0, 50.0, 4.0, impl=impl),
        FRSKDLoss(2.0, 100.0, 3.0, impl=impl),
        FRSKDLoss(2.0, 100.0, 4.0, impl=impl, exponent=3.0),
        FRSKDLoss(2.0, 100.0, 4.0, impl=impl, label_smoothing=0.1),
        FRSKDLoss(2.0, 100.0, 4.0, impl=impl, ignore_index=int(arguments[4][0])),
    ]
    for criterion in changed:
        assert abs(criterion(*arguments).item() - base) > 1e-3
    no_feature = FRSKDLoss(2.0, 0.0, 4.0, impl=impl)(*arguments, return_parts=True)
    assert no_feature.feature.item() == 0.0


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_partial_requires_grad_and_no_grad(impl: str) -> None:
    student, teacher, students, teachers, targets = _inputs()
    criterion = FRSKDLoss(impl=impl)
    with torch.no_grad():
        assert not criterion(student, teacher, students, teachers, targets).requires_grad
    only = students[1].requires_grad_()
    criterion(student, teacher, [students[0], only, students[2]], teachers, targets).backward()
    assert only.grad is not None and students[0].grad is None


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_with_a_scaler_trains(dtype: torch.dtype, impl: str) -> None:
    """A tiny network under CPU autocast: finite losses in float32 that go down."""

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = torch.nn.Conv2d(3, 8, 3, padding=1)
            self.refine = torch.nn.Conv2d(8, 16, 1)
            self.heads = torch.nn.ModuleList([torch.nn.Linear(8, 5), torch.nn.Linear(16, 5)])

        def forward(self, images: Tensor) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
            feature = self.conv(images).relu()
            refined = self.refine(feature).relu()
            return self.heads[0](feature.mean((2, 3))), self.heads[1](refined.mean((2, 3))), [feature], [refined]

    net = Net()
    optimiser = torch.optim.SGD(net.parameters(), lr=0.05)
    scaler = torch.amp.GradScaler("cpu", enabled=dtype == torch.float16, init_scale=1024.0)
    images, targets = torch.randn(16, 3, 8, 8), torch.randint(5, (16,))
    losses = []
    for _ in range(20):
        with torch.autocast("cpu", dtype=dtype):
            outputs = net(images)
            loss = FRSKDLoss(impl=impl)(*outputs, targets)
        assert outputs[0].dtype == dtype and loss.dtype == torch.float32
        optimiser.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimiser)
        scaler.update()
        losses.append(loss.item())
    assert all(map(torch.isfinite, torch.tensor(losses))) and losses[-1] < losses[0]


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", ["labels", "mix", "none"])
def test_fullgraph_compile_with_dynamic_batch(kind: str, impl: str) -> None:
    torch.compiler.reset()
    criterion = FRSKDLoss(impl=impl)
    backend = CompileCounterWithBackend("inductor")

    def step(student: Tensor, teacher: Tensor, students: list[Tensor], teachers: list[Tensor], targets: Any) -> Any:
        return criterion(student, teacher, students, teachers, targets, return_parts=True)

    compiled = torch.compile(step, backend=backend, fullgraph=True, dynamic=True)
    compilations = []
    for batch in (5, 7, 9):  # unlike any other size, which the compiler would tie to the batch
        student, teacher, students, teachers, labels = _inputs(batch=batch)
        targets: Any = {"labels": labels, "mix": (labels, labels.flip(0), 0.25), "none": None}[kind]
        leaves = [x.requires_grad_() for x in (student, teacher, *students)]
        parts = compiled(student, teacher, students, teachers, targets)
        wanted = criterion(student, teacher, students, teachers, targets, return_parts=True)
        torch.testing.assert_close(tuple(parts), tuple(wanted))
        got = torch.autograd.grad(parts.loss, leaves, allow_unused=True)
        truth = torch.autograd.grad(wanted.loss, leaves, allow_unused=True)
        for one, other in zip(got, truth, strict=True):
            if other is None:
                assert one is None or not one.any()
            else:
                torch.testing.assert_close(one, other)
        compilations.append(backend.frame_count)
    assert compilations[0] == compilations[-1], f"recompiled for another batch size: {compilations}"


@pytest.mark.parametrize(
    ("settings", "error", "sentence"),
    [
        ({"temperature": "4"}, TypeError, "temperature is '4', but a finite number greater than 0 was wanted"),
        ({"alpha": "2"}, TypeError, "alpha is '2', but a finite number was wanted"),
        ({"ignore_index": "x"}, TypeError, "ignore_index is 'x', but a whole number was wanted"),
        ({"ignore_index": 1.7}, ValueError, "ignore_index is 1.7, but a whole number was wanted"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_settings_that_are_no_numbers_are_refused(
    settings: dict[str, Any], error: type[Exception], sentence: str
) -> None:
    with pytest.raises(error, match=sentence):
        FRSKDLoss(**settings)


def test_combine_passes_opcheck() -> None:
    for split in (False, True):
        arguments = (torch.rand(3, 4), torch.rand(4, 4), 2.0, 100.0, True, split, "cpu")
        torch.library.opcheck(torch.ops.frskd_fast.combine_forward.default, arguments)


def test_deterministic_over_runs() -> None:
    arguments = _inputs()
    leaf = arguments[2][0].requires_grad_()
    criterion = FRSKDLoss(impl="cpu")
    first = [criterion(*arguments), *torch.autograd.grad(criterion(*arguments), leaf)]
    for _ in range(100):
        again = [criterion(*arguments), *torch.autograd.grad(criterion(*arguments), leaf)]
        assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))


def test_parallel_bodies_in_two_threads_agree() -> None:
    """Two Python threads use the kernels at once."""
    import threading

    arguments = _inputs(batch=64)
    criterion = FRSKDLoss(impl="cpu")
    wanted = criterion(*arguments)
    results: list[Tensor] = []

    def work() -> None:
        for _ in range(20):
            results.append(criterion(*arguments))

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 40 and all(torch.equal(result, wanted) for result in results)


def test_training_is_the_same_with_the_fused_and_the_plain_loss() -> None:
    """Thirty steps of a tiny network in float64: one curve."""

    def train(impl: str) -> list[float]:
        torch.manual_seed(1)
        conv = torch.nn.Conv2d(3, 6, 3, padding=1).double()
        refine = torch.nn.Conv2d(6, 9, 1).double()
        heads = torch.nn.Linear(6, 4).double(), torch.nn.Linear(9, 4).double()
        parameters = [p for module in (conv, refine, *heads) for p in module.parameters()]
        optimiser = torch.optim.SGD(parameters, lr=0.05, momentum=0.9)
        images, targets = torch.randn(8, 3, 6, 6, dtype=torch.float64), torch.randint(4, (8,))
        losses = []
        for _ in range(30):
            feature = conv(images).relu()
            refined = refine(feature).relu()
            student, teacher = heads[0](feature.mean((2, 3))), heads[1](refined.mean((2, 3)))
            loss = FRSKDLoss(impl=impl)(student, teacher, [feature], [refined], targets)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(loss.item())
        return losses

    plain, fused = torch.tensor(train("reference")), torch.tensor(train("cpu"))
    torch.testing.assert_close(fused, plain, rtol=1e-9, atol=0)
    assert plain[-1] < plain[0]


def test_from_args_and_repr() -> None:
    criterion = FRSKDLoss.from_args(argparse.Namespace(alpha=1, beta=0, temperature=3, extra="ignored"))
    assert (criterion.alpha, criterion.beta, criterion.temperature) == (1.0, 0.0, 3.0)
    assert "temperature=3.0" in repr(criterion)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": float("nan")}, "alpha is nan"),
        ({"beta": float("inf")}, "beta is inf"),
        ({"beta": "much"}, "beta is 'much'"),
        ({"temperature": 0}, "temperature is 0.0"),
        ({"temperature": -1}, "temperature is -1.0"),
        ({"exponent": 0.9}, "exponent is 0.9"),
        ({"label_smoothing": -0.1}, "label_smoothing is -0.1"),
        ({"impl": "gpu"}, "the argument impl is 'gpu'"),
        ({"resize": "crop"}, "resize is 'crop'"),
    ],
)
def test_bad_settings_are_refused_in_a_sentence(options: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message) as caught:
        FRSKDLoss(**options)
    assert str(caught.value).endswith(".")


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_bad_input_is_refused_in_a_sentence(impl: str) -> None:
    student, teacher, students, teachers, targets = _inputs()
    criterion = FRSKDLoss(impl=impl)
    cases: list[tuple[tuple[Any, ...], str]] = [
        ((student, teacher, students[:2], teachers), "teacher_feats has 3 levels, but student_feats has 2"),
        ((student, None, students, teachers), "teacher_logits is None"),
        (
            (student[:2], teacher[:2], students, teachers, targets[:2]),
            r"student_feats\[0\] has batch size 4, but student_logits has 2",
        ),
        (
            (student, teacher, students, teachers, targets[:2]),
            r"targets has shape \(2,\), but one class index for each",
        ),
        ((student, teacher, students, [t[:2] for t in teachers]), r"teacher_feats\[0\] has batch size 2"),
        ((student[:2], teacher, students, teachers), "the same batch"),
        ((student, teacher, students, teachers, targets + 100), "holds the label"),
        ((student, teacher, students, teachers, targets.float()), "targets has dtype torch.float32"),
        ((student, teacher[:, :5], students, teachers), "same classes"),
        ((student, teacher, [s.double() for s in students], [t.double() for t in teachers]), "either both or neither"),
        ((student, teacher, students, [t[:, :, :-1] for t in teachers]), r"teacher_feats\[0\] has maps of \(7, 8\)"),
    ]
    for arguments, message in cases:
        with pytest.raises((TypeError, ValueError), match=message) as caught:
            criterion(*arguments)
        assert str(caught.value).endswith(".")


def test_forced_implementation_that_is_missing_raises_with_the_reason() -> None:
    arguments = _inputs()
    with frskd_fast.use_impl("cuda"), pytest.raises(RuntimeError, match="impl='cuda' was asked for, but"):
        FRSKDLoss()(*arguments)
    with frskd_fast.use_impl("cuda"):
        FRSKDLoss(impl="reference")(*arguments)
    assert frskd_fast.last_impl()["combine"] == "reference"
