"""Operation ``logit_maps``: the originals' numbers, every implementation that runs on the CPU, refusals, ``torch.compile``."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from golden_utils import golden_settings, load_golden
from problems import Problem, problems
from torch import Tensor

import frskd_fast
from frskd_fast import _dispatch, functional
from frskd_fast.ops import logit_maps
from frskd_fast.reference.logit_maps import Maps, MapSettings, WantedGradients

IMPLEMENTATIONS = ["reference", "cpu"]
# The Triton kernel solves the problems in test_triton_kernels.py.
ORIGINALS = [*IMPLEMENTATIONS, "triton"]


@pytest.fixture(params=IMPLEMENTATIONS)
def impl(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    reason = _dispatch.problem(name, "cpu", torch.float32)
    if reason is not None:
        pytest.skip(f"impl={name!r}: {reason}")
    return name


@pytest.mark.parametrize("problem", problems("logit_maps"), ids=lambda problem: problem.name)
def test_problem(problem: Problem, impl: str) -> None:
    problem.run(impl, "cpu")
    assert frskd_fast.last_impl()["logit_maps"] == impl


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter computes masked lanes, too
@pytest.mark.parametrize("impl", ORIGINALS, indirect=True)
@pytest.mark.parametrize("case", ["seg_kd_T1", "seg_kd_T4"])
def test_divergence_of_maps_at_full_size_is_the_originals(case: str, impl: str) -> None:
    golden = load_golden(case)
    student, teacher = golden["student_logits"].requires_grad_(), golden["teacher_logits"]
    kd = functional.upsampled_kd_loss(student, teacher, size=student.shape[2:], impl=impl, **golden_settings(case)).kd
    kd.backward()
    torch.testing.assert_close(kd, golden["loss"], rtol=1e-6, atol=0)
    torch.testing.assert_close(student.grad, golden["grad.student_logits"], rtol=1e-5, atol=1e-8)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("impl", ORIGINALS, indirect=True)
def test_segmentation_losses_are_the_originals(impl: str) -> None:
    golden, settings = load_golden("seg_total_loss"), golden_settings("seg_total_loss")
    student, teacher = golden["student_logits"].requires_grad_(), golden["teacher_logits"].requires_grad_()
    parts = functional.upsampled_kd_loss(
        student, teacher, golden["targets"], temperature=settings["temperature"],
        ignore_index=settings["ignore_index"], impl=impl,
    )  # fmt: skip
    loss = parts.ce_student + parts.ce_teacher + settings["alpha"] * parts.kd
    loss.backward()
    torch.testing.assert_close(parts.kd, golden["kd"], rtol=1e-6, atol=0)
    torch.testing.assert_close(loss, golden["loss"], rtol=1e-6, atol=0)
    torch.testing.assert_close(student.grad, golden["grad.student_logits"], rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(teacher.grad, golden["grad.teacher_logits"], rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradients_are_those_of_differences(reduction: str, impl: str) -> None:
    student, teacher = torch.randn(2, 1, 3, 2, 3, dtype=torch.float64).requires_grad_().unbind()
    labels = torch.tensor([[0, 1, 2, 255, 1], [2, 2, 0, 0, 1], [1, 255, 0, 2, 2]]).unsqueeze(0)
    weights = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)

    def losses(student: Tensor, teacher: Tensor) -> tuple[Tensor, ...]:
        return functional.upsampled_kd_loss(
            student, teacher, labels, temperature=3.0, class_weights=weights, label_smoothing=0.1, reduction=reduction,
            detach_teacher=False, impl=impl,
        )  # fmt: skip

    assert torch.autograd.gradcheck(losses, (student, teacher))


def test_second_derivatives_are_refused() -> None:
    student = torch.randn(1, 3, 2, 2, requires_grad=True)
    for reduction in ("mean", "none"):
        kd = functional.upsampled_kd_loss(
            student, student.detach() + 1, size=(3, 3), reduction=reduction, impl="cpu"
        ).kd
        (gradient,) = torch.autograd.grad(kd.sum(), student, create_graph=True)
        with pytest.raises(RuntimeError, match="no second derivative"):
            gradient.sum().backward()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_an_empty_batch_has_losses_and_gradients_of_zero(reduction: str, impl: str) -> None:
    student, teacher = (torch.randn(0, 3, 2, 2, requires_grad=True) for _ in range(2))
    parts = functional.upsampled_kd_loss(student, teacher, torch.zeros(0, 4, 4).long(), reduction=reduction, impl=impl)
    total = sum(part.sum() for part in parts)
    total.backward()
    assert total == 0.0 and student.grad.shape == teacher.grad.shape == student.shape


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the limit of memory is Linux's")
def test_a_size_that_memory_does_not_hold_is_refused_in_a_sentence() -> None:
    maps = torch.zeros(1, 3, 1, 1)
    with pytest.raises(RuntimeError, match="width is 1073741824, but a number from 1 to 16777216 was wanted"):
        functional.upsampled_kd_loss(maps, maps, size=(1, 2**30), impl="cpu")
    script = """
        import resource, torch
        from frskd_fast import functional
        maps = torch.zeros(1, 99, 1, 1)
        functional.upsampled_kd_loss(maps, maps, size=(1, 2), impl="cpu")
        for line in open("/proc/self/status"):
            if line.startswith("VmSize:"):
                limit = 1024 * int(line.split()[1]) + 2**30
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        try:
            functional.upsampled_kd_loss(maps, maps, size=(1, 2**24), impl="cpu")
        except RuntimeError as error:
            print(error)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True)
    assert "No memory is left for" in done.stdout, (done.returncode, done.stderr)


def test_without_valid_pixels_only_the_divergence_counts(impl: str) -> None:
    student, teacher = torch.randn(2, 1, 3, 2, 2).unbind()
    parts = functional.upsampled_kd_loss(student, teacher, torch.full((1, 5, 5), 255), label_smoothing=0.1, impl=impl)
    assert parts.ce_student == 0.0 and parts.ce_teacher == 0.0 and parts.kd > 0.0


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_extreme_logits_stay_finite_and_nan_stays_nan(reduction: str, impl: str) -> None:
    student, teacher = (
        torch.tensor([3e4, -3e4, 0.0]).view(1, 3, 1, 1).expand(1, 3, 2, 2).half(),
        torch.zeros(1, 3, 2, 2),
    )
    student, labels = student.clone().requires_grad_(), torch.ones(1, 4, 4).long()
    parts = functional.upsampled_kd_loss(
        student, teacher.half(), labels, temperature=4.0, reduction=reduction, impl=impl
    )
    sum(part.sum() for part in parts).backward()
    assert all(part.isfinite().all() for part in parts) and student.grad.isfinite().all()
    spoiled = student.detach().clone()
    spoiled[0, 1, 0, 0] = float("nan")
    spoiled.requires_grad_()
    parts = functional.upsampled_kd_loss(spoiled, teacher.half(), labels, reduction=reduction, impl=impl)
    (parts.ce_student + parts.kd).sum().backward()
    assert parts.ce_student.isnan().any() and parts.kd.isnan().any() and spoiled.grad[0, :, 0, 0].isnan().all()
    assert parts.ce_teacher.isfinite().all()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("impl", ORIGINALS, indirect=True)
def test_masked_classes_have_no_probability(impl: str) -> None:
    student, teacher = torch.randn(2, 1, 4, 3, 3).unbind()
    student[:, 2], teacher[:, 2] = -1e30, -1e30
    labels = torch.tensor([0, 1, 3]).repeat(1, 6, 2)
    parts = functional.upsampled_kd_loss(student, teacher, labels, impl=impl)
    kept = [0, 1, 3]
    compact = torch.tensor([0, 1, 0, 2])[labels]
    wanted = functional.upsampled_kd_loss(student[:, kept], teacher[:, kept], compact, impl="reference")
    torch.testing.assert_close(parts, wanted)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("impl", ORIGINALS, indirect=True)
@pytest.mark.parametrize("classes", [4, 70])  # in one tile of the Triton kernels, and in several
def test_a_class_of_minus_infinity_is_none_between_neighbours(classes: int, impl: str) -> None:
    maps = torch.randn(2, 1, classes, 2, 2)
    kept = [k for k in range(classes) if k != 2]
    maps[:, :, 2] = -torch.inf
    labels = torch.tensor([0, 1, 3, 1]).repeat(1, 4, 1)
    compact = torch.tensor([0, 1, 0, 2])[labels]
    student, teacher = maps.unbind()
    parts = functional.upsampled_kd_loss(student, teacher, labels, temperature=2.0, reduction="none", impl=impl)
    wanted = functional.upsampled_kd_loss(
        student[:, kept], teacher[:, kept], compact, temperature=2.0, reduction="none", impl="reference"
    )
    inner = slice(1, 3)  # at the edges the neighbour that does not exist has a weight of 0
    for ours, theirs in zip(parts, wanted, strict=True):
        torch.testing.assert_close(ours[:, inner, inner], theirs[:, inner, inner], rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("impl", ORIGINALS, indirect=True)
def test_logits_of_ignored_pixels_do_not_count(impl: str) -> None:
    student = torch.randn(1, 3, 2, 4, requires_grad=True)
    with torch.no_grad():
        student[..., 2:] = torch.nan
    labels = torch.full((1, 4, 8), 255)
    labels[..., :2] = 1
    parts = functional.upsampled_kd_loss(student, None, labels, impl=impl)
    wanted = functional.upsampled_kd_loss(student, None, labels, impl="reference")
    assert wanted.ce_student.isfinite()
    torch.testing.assert_close(parts.ce_student, wanted.ce_student)


def test_the_number_of_threads_changes_no_bit() -> None:
    student, teacher = (torch.randn(3, 5, 40, 11, requires_grad=True) for _ in range(2))
    labels = torch.randint(5, (3, 64, 30))

    def run() -> list[Tensor]:
        parts = functional.upsampled_kd_loss(student, teacher, labels, impl="cpu")
        return [*parts, *torch.autograd.grad(sum(parts), (student, teacher))]

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = run()
        torch.set_num_threads(2)
        assert all(torch.equal(*pair) for pair in zip(alone, run(), strict=True))
    finally:
        torch.set_num_threads(threads)


def test_nothing_of_full_size_with_all_classes_is_in_memory() -> None:
    shape, size = (2, 19, 8, 8), (64, 64)
    student, teacher = (torch.randn(shape, requires_grad=True) for _ in range(2))
    labels = torch.randint(19, (2, *size))
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    for reduction, most in (("mean", 3 * student.nbytes + 4), ("none", 2 * student.nbytes + labels.nbytes)):
        kept.clear()
        with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                parts = functional.upsampled_kd_loss(student, teacher, labels, reduction=reduction, impl="cpu")
                total = sum(part.sum() for part in parts)
            total.backward()
        assert sum(tensor.nbytes for tensor in kept if tensor.numel() > 1) <= most
        largest = max(event.cpu_memory_usage for event in profile.events())
        assert 0 < largest < student.nbytes * 64 / 4, "a map of all classes at full size was made"
        student.grad = teacher.grad = None


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("impl", ORIGINALS, indirect=True)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_terms_that_nothing_depends_on_do_not_spoil_gradients(reduction: str, impl: str) -> None:
    student, teacher = torch.randn(2, 1, 3, 2, 2).unbind()
    student.requires_grad_()
    teacher[0, 1, 0, 0] = torch.inf
    labels = torch.randint(3, (1, 4, 4))

    def gradient(impl: str) -> Tensor:
        ce = functional.upsampled_kd_loss(student, teacher, labels, reduction=reduction, impl=impl).ce_student
        return torch.autograd.grad(ce.sum(), student)[0]

    wanted = gradient("reference")
    assert wanted.isfinite().all()
    torch.testing.assert_close(gradient(impl), wanted)


@pytest.mark.parametrize("impl", ["cpu"], indirect=True)
def test_gradients_are_computed_only_where_they_are_wanted(impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    maps = torch.randn(2, 1, 3, 2, 2)
    labels = torch.zeros(1, 4, 4).long()
    computed: list[int] = []
    sums = logit_maps.sums

    def counted(*arguments: Any) -> tuple[Tensor, list[Tensor]]:
        totals, gradients = sums(*arguments)
        computed.append(len(gradients))
        return totals, gradients

    monkeypatch.setattr(logit_maps, "sums", counted)

    def losses(student: bool, teacher: bool) -> Any:
        networks = (maps[0].clone().requires_grad_(student), maps[1].clone().requires_grad_(teacher))
        return functional.upsampled_kd_loss(*networks, labels, impl=impl)

    with torch.no_grad():
        parts = losses(True, True)
    wanted = losses(True, True)
    assert not parts.kd.requires_grad and wanted.kd.requires_grad
    torch.testing.assert_close(parts, tuple(part.detach() for part in wanted))
    losses(True, False), losses(False, True), losses(False, False)
    assert computed == [0, 3, 2, 1, 0]


@pytest.mark.parametrize("present", ["both", "no teacher", "no targets"])
def test_operators_are_well_formed(present: str) -> None:
    student, teacher = torch.randn(2, 2, 3, 3, 4).requires_grad_().unbind()
    maps = Maps(
        student.detach(),
        None if present == "no teacher" else teacher.detach(),
        None if present == "no targets" else torch.randint(3, (2, 5, 7)),
        torch.rand(3),
    )
    settings = MapSettings(5, 7, 0.1, 255, 2.0)
    wanted = WantedGradients(True, present != "no teacher", present != "no teacher")
    operators = torch.ops.frskd_fast
    torch.library.opcheck(operators.logit_maps_sums.default, (*maps, *settings, *wanted, "cpu"))
    torch.library.opcheck(operators.logit_maps_pixels.default, (*maps, *settings, "cpu"))
    grads = list(torch.randn(3, 2, 5, 7).unbind())
    torch.library.opcheck(operators.logit_maps_pixels_backward.default, (grads, *maps, *settings, *wanted, "cpu"))
    assert len(logit_maps.pixels_backward(grads, maps, settings, wanted, "cpu")) == 1 + wanted.teacher_gradient


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_fullgraph_compile_with_dynamic_batch(reduction: str, impl: str) -> None:
    torch.compiler.reset()

    def function(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        parts = functional.upsampled_kd_loss(student, teacher, labels, reduction=reduction, impl=impl)
        return (parts.ce_student + parts.ce_teacher + 2 * parts.kd).sum()

    compiled = torch.compile(function, fullgraph=True, dynamic=True)
    for batch in (2, 3, 5):
        student, teacher = (torch.randn(batch, 4, 3, 5, requires_grad=True) for _ in range(2))
        labels = torch.randint(4, (batch, 6, 9))
        gradients = torch.autograd.grad(compiled(student, teacher, labels), [student, teacher])
        wanted = torch.autograd.grad(function(student, teacher, labels), [student, teacher])
        torch.testing.assert_close(gradients, wanted)


def test_autocast_and_mixed_losses_train(impl: str) -> None:
    """Half-precision maps of a network under autocast; the upstream gradient carries a loss scale."""
    head = torch.nn.Conv2d(3, 4, 1)
    images, labels = torch.randn(2, 3, 4, 4), torch.randint(4, (2, 8, 8))
    with torch.autocast("cpu", torch.bfloat16):
        maps = head(images)
        parts = functional.upsampled_kd_loss(maps, maps.detach() * 0.5, labels, impl=impl)
    assert maps.dtype == torch.bfloat16 and parts.ce_student.dtype == torch.float32
    (1024.0 * (parts.ce_student + parts.kd)).backward()
    z = F.interpolate(maps.detach().float(), (8, 8), mode="bilinear")
    torch.testing.assert_close(parts.ce_student.detach(), F.cross_entropy(z, labels))
    assert head.weight.grad.isfinite().all() and head.weight.grad.abs().sum() > 0


Z, Y = torch.zeros(2, 5, 3, 3), torch.zeros(2, 6, 6).long()


@pytest.mark.parametrize(
    ("student", "teacher", "targets", "options", "message"),
    [
        (torch.zeros(2, 5), Z, Y, {}, r"student_maps has shape \(2, 5\)"),
        (torch.zeros(2, 0, 3, 3), None, Y, {}, "at least one channel"),
        (Z, torch.zeros(2, 6, 3, 3), Y, {}, r"teacher_maps has shape \(2, 6, 3, 3\).*same classes"),
        (Z, torch.zeros(2, 5, 3, 4), Y, {}, r"teacher_maps has shape \(2, 5, 3, 4\).*same resolution"),
        (Z, Z.half(), Y, {}, "teacher_maps has dtype torch.float16"),
        (Z.long(), None, Y, {}, "student_maps has dtype torch.int64"),
        (Z, Z, Y[:1], {}, "targets has 1 masks, but student_maps has 2 images"),
        (Z, Z, Y.float(), {}, r"targets has dtype torch.float32.*cast labels with \.long\(\)"),
        (Z, Z, Y.unsqueeze(1), {}, r"targets has shape \(2, 1, 6, 6\).*\.squeeze\(1\)"),
        (Z, Z, Y.unsqueeze(3).expand(-1, -1, -1, 3), {}, r"targets has shape \(2, 6, 6, 3\).*colours"),
        (Z, Z, Y[:, :2], {}, r"student_maps has shape \(2, 5, 3, 3\), but the labels are of 2 x 6 pixels.*not larger"),
        (Z, Z, Y + 5, {}, "holds the label 5.*from 0 to 4 .*ignore_index=255"),
        (Z, Z, Y - 1, {}, "holds the label -1"),
        (Z, Z, "masks", {}, "targets is a str"),
        (Z, Z, Y.to("meta"), {}, "targets is on meta"),
        (Z, Z, None, {}, "Neither targets nor size is given"),
        (Z, Z, None, {"size": 6}, r"size is 6, but \(height, width\)"),
        (Z, Z, None, {"size": (6, 2)}, "6 x 2 pixels"),
        (Z, Z, Y, {"size": (7, 6)}, r"size is \(7, 6\), but targets has shape"),
        (Z, Z, Y, {"class_weights": torch.ones(4)}, r"class_weights has shape \(4,\).*5 classes"),
        (Z, Z, Y, {"class_weights": torch.ones(5).requires_grad_()}, "class_weights requires grad"),
        (Z, Z, Y, {"class_weights": torch.ones(5).to("meta")}, "class_weights is on meta"),
        (Z, Z, Y, {"class_weights": [1.0] * 5}, "class_weights is a list"),
        (Z, Z, Y, {"temperature": 0.0}, "temperature is 0.0"),
        (Z, Z, Y, {"label_smoothing": 1.5}, "label_smoothing is 1.5"),
        (Z, Z, Y, {"ignore_index": 0.5}, "ignore_index is 0.5"),
        (Z, Z, Y, {"reduction": "batchmean"}, "reduction is 'batchmean', but one of 'mean', 'sum', 'none'"),
    ],
)
def test_bad_input_is_refused_in_a_sentence(
    student: Any, teacher: Any, targets: Any, options: dict[str, Any], message: str, impl: str
) -> None:
    for reduction in ({}, {"reduction": "none"}):
        with pytest.raises((TypeError, ValueError), match=message) as caught:
            functional.upsampled_kd_loss(student, teacher, targets, impl=impl, **{**reduction, **options})
        assert str(caught.value).endswith(".")


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_teachers_cross_entropy_alone_knows_nothing_of_the_student(reduction: str) -> None:
    student = torch.randn(1, 3, 2, 2).index_fill(1, torch.tensor(2), float("nan")).requires_grad_()
    teacher = torch.randn(1, 3, 2, 2, requires_grad=True)
    labels = torch.randint(3, (1, 4, 4))
    parts = functional.upsampled_kd_loss(
        student, teacher, labels, reduction=reduction, detach_teacher=False, impl="cpu"
    )
    parts.ce_teacher.sum().backward()
    alone = teacher.detach().requires_grad_()
    functional.upsampled_kd_loss(alone, None, labels, reduction=reduction, impl="cpu").ce_student.sum().backward()
    assert student.grad is None and teacher.grad is not None
    torch.testing.assert_close(teacher.grad, alone.grad)
