"""Operation ``attention``: every implementation that runs on the CPU against float64, layouts, limits, autograd, compile."""

from __future__ import annotations

import itertools
import threading

import formulas
import pytest
import torch
from layouts import LAYOUTS
from problems import Problem
from problems.attention import LARGE_LEVELS, LEVELS, PROBLEMS
from torch import Tensor

import frskd_fast
from frskd_fast import functional
from frskd_fast.ops import attention as attention_ops

IMPLEMENTATIONS = ["reference", "cpu"]


@pytest.mark.parametrize("implementation", [*IMPLEMENTATIONS, "auto"])
@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: problem.name)
def test_problems(problem: Problem, implementation: str) -> None:
    problem.run(implementation, "cpu")


def _pyramids(batch: int, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    students = [torch.randn(batch, c, h, w).to(dtype) for c, _, h, w in LEVELS + LARGE_LEVELS]
    teachers = [torch.randn(batch, d, h, w).to(dtype) for _, d, h, w in LEVELS + LARGE_LEVELS]
    return students, teachers


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("exponent", [2.0, 1.0, 2.5])
def test_gradcheck(exponent: float, impl: str) -> None:
    students = [torch.randn(2, 3, 2, 3, dtype=torch.float64), torch.randn(2, 1, 1, 2, dtype=torch.float64)]
    teachers = [torch.randn(2, 2, 2, 3, dtype=torch.float64), torch.randn(2, 4, 1, 2, dtype=torch.float64)]
    inputs = [x.requires_grad_() for x in students + teachers]

    def function(*features: Tensor) -> Tensor:
        return functional.attention_transfer(
            list(features[:2]), list(features[2:]), exponent, "none", detach_teacher=False, impl=impl
        )

    assert torch.autograd.gradcheck(function, inputs)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_map_gradcheck(impl: str) -> None:
    feature = torch.randn(2, 3, 2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda f: functional.attention_map(f, 2.0, impl=impl), [feature])
    assert torch.autograd.gradcheck(lambda f: functional.attention_map(f, 3.0, impl=impl), [feature])


@pytest.mark.parametrize("batch", [2, 900])
@pytest.mark.parametrize("bits", [0x7F800001, 0x7FFFFFFF, 0xFFFFFFFF], ids=hex)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_nan_from_above_reaches_every_gradient(dtype: torch.dtype, layout: str, bits: int, batch: int) -> None:
    """Also one that rounding up would make a number; 900 samples are more than 16 MiB, whose stores bypass the cache."""
    features = [LAYOUTS[layout](torch.ones(batch, 35, 17, 16).to(dtype)).requires_grad_()]
    loss = functional.attention_transfer(features, [torch.ones(batch, 3, 17, 16).to(dtype)], impl="cpu")
    upstream = torch.tensor(bits, dtype=torch.uint32).view(torch.float32)
    assert upstream.isnan()
    (gradient,) = torch.autograd.grad(loss, features, upstream)
    assert gradient.isnan().all()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_long_sums_round_as_those_of_plain_pytorch(layout: str) -> None:
    feature = LAYOUTS[layout](torch.rand(8, 8192, 5, 5))
    truth = functional.attention_map(feature.double(), impl="reference")

    def error(impl: str) -> float:
        return (functional.attention_map(feature, impl=impl) - truth).square().mean().sqrt().item()

    assert error("cpu") < 2.0 * error("reference")


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_empty_batch(impl: str) -> None:
    feature = torch.randn(0, 4, 3, 3, requires_grad=True)
    loss = functional.attention_transfer([feature], [torch.randn(0, 2, 3, 3)], impl=impl)
    loss.backward()
    assert loss.item() == 0.0 and feature.grad is not None and feature.grad.shape == feature.shape


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_invariants(impl: str) -> None:
    feature = torch.rand(3, 5, 4, 4, dtype=torch.float64)
    scale = torch.rand(3, 1, 1, 1, dtype=torch.float64) + 0.5
    assert functional.attention_transfer([scale * feature], [feature], impl=impl).item() < 1e-28
    assert functional.attention_transfer([feature[:, torch.randperm(5)]], [feature], impl=impl).item() < 1e-28


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_stated_value(impl: str) -> None:
    """Value and gradient norm of a closed-form case computed by the original loss."""

    def wave(shape: tuple[int, ...], slope: float, shift: float) -> Tensor:
        count = torch.Size(shape).numel()
        return torch.sin(slope * torch.arange(count, dtype=torch.float64) + shift).view(shape)

    student = wave((2, 3, 4, 4), 0.37, 0.0).requires_grad_()
    teacher = wave((2, 6, 4, 4), 0.23, 1.0)
    loss = functional.attention_transfer([student], [teacher], impl=impl)
    loss.backward()
    assert student.grad is not None
    assert abs(loss.item() - 0.017923377135645808) < 1e-15
    assert abs(student.grad.norm().item() - 0.011262648723507492) < 1e-15


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_teacher_is_detached_by_default_and_differentiable_on_request(impl: str) -> None:
    student, teacher = torch.randn(2, 3, 4, 4, requires_grad=True), torch.randn(2, 3, 4, 4, requires_grad=True)
    functional.attention_transfer([student], [teacher], impl=impl).backward()
    assert teacher.grad is None and student.grad is not None
    frozen = student.detach()
    functional.attention_transfer([frozen], [teacher], detach_teacher=False, impl=impl).backward()
    assert teacher.grad is not None and teacher.grad.abs().sum() > 0


def test_dictionaries_and_single_maps() -> None:
    students, teachers = _pyramids(2, torch.float32)
    names = [f"level{index}" for index in range(len(students))]
    as_list = functional.attention_transfer(students, teachers)
    as_dict = functional.attention_transfer(
        dict(zip(names, students, strict=True)), dict(zip(names, teachers, strict=True))
    )
    assert torch.equal(as_list, as_dict)
    assert torch.equal(
        functional.attention_transfer(students[0], teachers[0]),
        functional.attention_transfer(students[:1], teachers[:1]),
    )


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_pooling_the_larger_map(impl: str) -> None:
    student, teacher = torch.randn(2, 3, 8, 6, dtype=torch.float64), torch.randn(2, 5, 4, 9, dtype=torch.float64)
    pool = torch.nn.functional.adaptive_avg_pool2d
    wanted = formulas.attention_rows([pool(student, (4, 6))], [pool(teacher, (4, 6))]).mean()
    value = functional.attention_transfer([student], [teacher], resize="pool", impl=impl)
    torch.testing.assert_close(value, wanted)


def test_inputs_are_left_alone_and_backward_can_run_twice() -> None:
    student, teacher = torch.randn(2, 3, 4, 4, requires_grad=True), torch.randn(2, 3, 4, 4)
    before = student.detach().clone(), teacher.clone()
    loss = functional.attention_transfer([student], [teacher], impl="cpu")
    (first,) = torch.autograd.grad(loss, student, retain_graph=True)
    (second,) = torch.autograd.grad(loss, student)
    assert torch.equal(first, second)
    assert torch.equal(student, before[0]) and torch.equal(teacher, before[1])


def test_double_backward_is_refused() -> None:
    student = torch.randn(2, 3, 4, 4, requires_grad=True)
    loss = functional.attention_transfer([student], [torch.randn(2, 3, 4, 4)], impl="cpu")
    (gradient,) = torch.autograd.grad(loss, student, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        gradient.sum().backward()


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_bits_do_not_depend_on_the_number_of_threads(threads: int) -> None:
    """Also covers the path for fewer samples than threads."""
    students, teachers = _pyramids(2, torch.float32)

    def run() -> list[Tensor]:
        leaves = [student.clone().requires_grad_() for student in students]
        rows = functional.attention_transfer(leaves, teachers, reduction="none", impl="cpu")
        rows.sum().backward()
        return [rows.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = run()
        torch.set_num_threads(threads)
        for one, other in zip(alone, run(), strict=True):
            assert torch.equal(one, other)
    finally:
        torch.set_num_threads(before)


def test_large_gradients_are_streamed_to_the_same_values() -> None:
    """More than 16 MiB of gradients bypass the cache; the values must be those of the ordinary stores."""
    for layout, dtype in itertools.product(("contiguous", "channels_last"), (torch.float32, torch.bfloat16)):
        student = LAYOUTS[layout](torch.randn(80, 64, 32, 32).to(dtype)).requires_grad_()
        teacher = torch.randn(80, 8, 32, 32).to(dtype)
        functional.attention_transfer([student], [teacher], reduction="sum", impl="cpu").backward()
        piece = student.detach()[:2].clone(memory_format=torch.preserve_format).requires_grad_()
        functional.attention_transfer([piece], [teacher[:2]], reduction="sum", impl="cpu").backward()
        assert student.grad is not None and piece.grad is not None
        assert torch.equal(student.grad[:2], piece.grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("need_teacher", [True, False])
def test_operators_pass_opcheck(need_teacher: bool, dtype: torch.dtype) -> None:
    students = [torch.randn(2, 3, 4, 4).to(dtype), LAYOUTS["channels_last"](torch.randn(2, 5, 2, 2).to(dtype))]
    teachers = [torch.randn(2, 4, 4, 4).to(dtype), torch.randn(2, 5, 2, 2).to(dtype)]
    losses, student, _ = attention_ops.forward(students, teachers, 2.0, True, need_teacher, "cpu")
    operators = torch.ops.frskd_fast
    torch.library.opcheck(operators.attention_forward.default, (students, teachers, 2.0, True, need_teacher, "cpu"))
    grad = torch.ones_like(losses)
    torch.library.opcheck(operators.attention_backward.default, (grad, 1.0, True, students, student, 2.0, "cpu"))
    torch.library.opcheck(operators.attention_map.default, (students[1], 2.0, "cpu"))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_fullgraph_compile_with_dynamic_batch(impl: str) -> None:
    torch.compiler.reset()

    def function(student: Tensor, teacher: Tensor) -> Tensor:
        return functional.attention_transfer([student], [teacher], impl=impl)

    compiled = torch.compile(function, fullgraph=True, dynamic=True)
    for batch in (6, 7, 9):
        student, teacher = torch.randn(batch, 3, 4, 4, requires_grad=True), torch.randn(batch, 6, 4, 4)
        (gradient,) = torch.autograd.grad(compiled(student, teacher), student)
        (wanted,) = torch.autograd.grad(function(student, teacher), student)
        torch.testing.assert_close(gradient, wanted)
    assert torch.compiler.is_compiling() is False


def test_last_impl_tells_which_ran() -> None:
    feature = torch.randn(2, 3, 4, 4)
    functional.attention_map(feature, impl="cpu")
    assert frskd_fast.last_impl()["attention"] == "cpu"
    functional.attention_map(feature, impl="reference")
    assert frskd_fast.last_impl()["attention"] == "reference"


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("students", "teachers", "options", "message"),
    [
        ([torch.zeros(2, 3, 4)], [torch.zeros(2, 3, 4)], {}, r"student_feats\[0\] has shape \(2, 3, 4\)"),
        ([torch.zeros(2, 3, 4, 4)], [], {}, "teacher_feats has 0 levels, but student_feats has 1"),
        ([], [], {}, "student_feats is empty"),
        ([torch.zeros(2, 3, 4, 4)], [torch.zeros(3, 3, 4, 4)], {}, r"teacher_feats\[0\] has batch size 3"),
        (
            [torch.zeros(2, 3, 4, 4)],
            [torch.zeros(2, 3, 2, 4)],
            {},
            r"teacher_feats\[0\] has maps of \(2, 4\).*resize='pool'",
        ),
        (
            [torch.zeros(2, 3, 4, 4)],
            [torch.zeros(2, 3, 4, 4).half()],
            {},
            r"teacher_feats\[0\] has dtype torch.float16",
        ),
        ([torch.zeros(2, 3, 4, 4).long()], [torch.zeros(2, 3, 4, 4)], {}, r"student_feats\[0\] has dtype torch.int64"),
        ([torch.zeros(2, 3, 4, 4)], [torch.zeros(2, 3, 4, 4, device="meta")], {}, r"teacher_feats\[0\] is on meta"),
        ([torch.zeros(2, 0, 4, 4)], [torch.zeros(2, 3, 4, 4)], {}, "at least one channel"),
        ([torch.zeros(2, 3, 4, 4)], [torch.zeros(2, 3, 4, 4)], {"exponent": 0.5}, "exponent is 0.5, but at least 1"),
        ([torch.zeros(2, 3, 4, 4)], [torch.zeros(2, 3, 4, 4)], {"exponent": float("nan")}, "exponent is nan"),
        ([torch.zeros(2, 3, 4, 4)], [torch.zeros(2, 3, 4, 4)], {"reduction": "batchmean"}, "reduction is 'batchmean'"),
        ([torch.zeros(2, 3, 4, 4)], [torch.zeros(2, 3, 4, 4)], {"resize": "crop"}, "resize is 'crop'"),
        ("pyramid", [torch.zeros(2, 3, 4, 4)], {}, "student_feats is a str"),
        ({"a": torch.zeros(2, 3, 4, 4)}, {"b": torch.zeros(2, 3, 4, 4)}, {}, "same keys in the same order"),
        ([None], [torch.zeros(2, 3, 4, 4)], {}, r"student_feats\[0\] is a NoneType"),
    ],
)
def test_bad_input_is_refused_in_a_sentence(
    students: object, teachers: object, options: dict[str, object], message: str, impl: str
) -> None:
    with pytest.raises((TypeError, ValueError), match=message) as caught:
        functional.attention_transfer(students, teachers, impl=impl, **options)  # type: ignore[arg-type]
    assert str(caught.value).endswith(".")


def test_a_choice_of_one_thread_is_not_seen_by_another() -> None:
    entered, leave = threading.Event(), threading.Event()

    def other() -> None:
        with frskd_fast.use_impl("triton"):
            entered.set()
            leave.wait()

    thread = threading.Thread(target=other)
    thread.start()
    entered.wait()
    with frskd_fast.use_impl("reference"):
        leave.set()
        thread.join()
        functional.attention_map(torch.rand(1, 2, 3, 3))
        assert frskd_fast.last_impl()["attention"] == "reference"


def test_unknown_and_missing_implementations() -> None:
    feature = torch.zeros(2, 3, 4, 4)
    with pytest.raises(ValueError, match="impl is 'fast', but the known implementations are"):
        functional.attention_map(feature, impl="fast")
    with pytest.raises(RuntimeError, match="impl='cuda' was asked for, but it computes on a CUDA device"):
        functional.attention_map(feature, impl="cuda")
