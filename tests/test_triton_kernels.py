"""The raw Triton functions against plain formulas in float64.

With a GPU the kernels run on it. Without one they run in Triton's interpreter, which must be switched on before Triton
is first imported: conftest.py does so.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import pkgutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import problems
import pytest
import torch
from problems import _raw_fusion
from torch import Tensor

from frskd_fast import _dispatch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ON_GPU = torch.cuda.is_available() and not INTERPRETED
DEVICE = "cuda" if ON_GPU else "cpu"

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed"),
    pytest.mark.skipif(not (INTERPRETED or ON_GPU), reason="needs a GPU, or Triton's interpreter"),
    # The interpreter computes masked lanes too: 0 / 0 and log(0) there are warnings of numpy.
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]


def test_the_folder_is_no_package_of_its_own() -> None:
    root = str(Path(__file__).resolve().parents[1])
    done = subprocess.run([sys.executable, "-c", "import kernels"], capture_output=True, text=True, cwd=root)
    assert "from frskd_fast.kernels import" in done.stderr


def test_importing_the_package_loads_nothing_heavy() -> None:
    root = str(Path(__file__).resolve().parents[1])
    program = (
        "import runpy, sys; runpy.run_path('kernels/__init__.py', run_name='frskd_fast.kernels');"
        "sys.exit('torch' in sys.modules or 'triton' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], cwd=root).returncode == 0


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory is NaN, so an element that a kernel forgets shows."""
    empty, empty_like = torch.empty, torch.empty_like

    def poison(tensor: Tensor) -> Tensor:
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: poison(empty(*args, **kwargs)))
    monkeypatch.setattr(torch, "empty_like", lambda *args, **kwargs: poison(empty_like(*args, **kwargs)))


def accumulate(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def rounded(values: Tensor, dtype: torch.dtype) -> Tensor:
    """``values`` in ``dtype``, rounded as the kernels' machine does it: the interpreter cuts bfloat16 off."""
    if INTERPRETED and dtype == torch.bfloat16:
        values = (values.float().view(torch.int32) & -65536).view(torch.float32)
    return values.to(dtype)


def check(ours: Tensor, truth: Tensor, plain: Tensor | None, what: str) -> None:
    """Our error against float64 is at most that of plain PyTorch plus a few roundings of the largest value.

    Where plain PyTorch overflows (``plain`` is None), the rounding of the truth to our dtype takes its place.
    """
    assert ours.shape == truth.shape, what
    if truth.numel() == 0:
        return
    ours64 = ours.detach().double()
    assert torch.equal(ours64.isnan(), truth.isnan()), f"{what}: NaN where the truth has none, or the reverse"
    wanted = truth.detach().nan_to_num()
    plain = rounded(truth if plain is None else plain.detach(), ours.dtype)
    error, plain_error = ((value.double().nan_to_num() - wanted).abs().max().item() for value in (ours64, plain))
    scale = wanted.abs().max().item()
    floor = 4.0 * torch.finfo(accumulate(ours.dtype)).eps * scale
    assert error <= plain_error + floor, (
        f"{what}: error {error:.3e}, plain PyTorch {plain_error:.3e}, scale {scale:.3e}"
    )


def arrange(tensor: Tensor, layout: str) -> Tensor:
    """The same values in another memory format."""
    if layout == "channels_last":
        return tensor.contiguous(memory_format=torch.channels_last)
    if layout == "sliced":
        # Every axis has a step or an offset: nothing is contiguous, nothing is aligned.
        shape = tensor.shape
        room = tensor.new_zeros((shape[0] + 1, *(2 * extent + 1 for extent in shape[1:])))
        view = room[(slice(1, None), *(slice(1, None, 2) for _ in shape[1:]))]
        return view.copy_(tensor)
    if layout == "batch_last":
        return tensor.movedim(0, -1).contiguous().movedim(-1, 0)
    assert layout == "contiguous"
    return tensor.contiguous()


def random(generator: torch.Generator, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(20210608)


def kernel_modules() -> list[ModuleType]:
    """All files of kernels."""
    from frskd_fast import kernels

    return [importlib.import_module(f"{kernels.__name__}.{module.name}")
            for module in pkgutil.iter_modules(kernels.__path__) if module.name != "_interpreter"]  # fmt: skip


def forget_plans() -> None:
    """Launch plans are kept by shapes and strides."""
    for module in kernel_modules():
        for value in vars(module).values():
            if hasattr(value, "cache_clear"):
                value.cache_clear()


@pytest.fixture
def wide_layouts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every tensor counts as too large for 32-bit offsets."""
    from frskd_fast.kernels import _common

    original = _common.layout_of

    def wide(*arguments: Any, **options: Any) -> Any:
        return original(*arguments, **options)._replace(wide=True)

    for module in kernel_modules():
        if hasattr(module, "layout_of"):
            monkeypatch.setattr(module, "layout_of", wide)
    forget_plans()
    yield
    forget_plans()


@pytest.fixture(autouse=True)
def quick_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter prepares the language again for each call of a helper, which takes most of its time."""
    if not INTERPRETED:
        return
    from triton.runtime import interpreter

    prepared: set[int] = set()

    def call(function: Any, *arguments: Any, **options: Any) -> Any:
        if id(function.fn.__globals__) not in prepared:
            prepared.add(id(function.fn.__globals__))
            interpreter._patch_lang(function.fn)
        return function.rewrite()(*arguments, **options)

    monkeypatch.setattr(interpreter.InterpretedFunction, "__call__", call)


def of_every_operation() -> list[Any]:
    """All problems as parameters; interpreted, which is slow, no more than about 32 of each operation's, spread evenly."""
    found = []
    for operation in problems.operations():
        plain = problems.problems(operation)
        step = max(1, len(plain) // 32) if INTERPRETED else 1
        for problem in [*plain[::step], *problems.of_kernels(operation)[len(plain) :]]:
            found.append(pytest.param(problem, id=f"{operation}: {problem.name}"))
    return found


@pytest.mark.parametrize("problem", of_every_operation())
def test_problems(problem: problems.Problem) -> None:
    torch.manual_seed(0)
    problem.run("triton", DEVICE)


def attention_formula(students: Sequence[Tensor], teachers: Sequence[Tensor], exponent: float) -> Tensor:
    rows = []
    for student, teacher in zip(students, teachers, strict=True):
        maps = []
        for feature in (student, teacher):
            activity = feature.abs().pow(exponent).mean(1).flatten(1)
            maps.append(activity / torch.linalg.vector_norm(activity, dim=1, keepdim=True).clamp_min(1e-12))
        rows.append((maps[0] - maps[1]).square().mean(1))
    return torch.stack(rows)


def by_autograd(
    formula: Callable[..., Any], inputs: Sequence[Tensor], dtype: torch.dtype, upstream: Sequence[Tensor], scale: float
) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs of the formula in ``dtype``, and the gradients of ``inputs`` for ``scale * upstream``."""
    leaves = [tensor.detach().to(dtype).requires_grad_() for tensor in inputs]
    outputs = formula(*leaves)
    weighted = [(output * grad.to(dtype)).sum() * scale for output, grad in zip(outputs, upstream, strict=True)]
    gradients = torch.autograd.grad(torch.stack(weighted).sum(), leaves, allow_unused=True)
    return list(outputs), [
        torch.zeros_like(leaf) if gradient is None else gradient
        for leaf, gradient in zip(leaves, gradients, strict=True)
    ]


class TestAttention:
    def compare(
        self,
        students: list[Tensor],
        teachers: list[Tensor],
        exponent: float,
        generator: torch.Generator,
        plain: bool = True,
    ) -> None:
        from frskd_fast.kernels import attention

        students, teachers = [s.to(DEVICE) for s in students], [t.to(DEVICE) for t in teachers]
        levels, batch = len(students), students[0].shape[0]
        dtype = accumulate(students[0].dtype)
        grad = random(generator, levels, batch, dtype=dtype).to(DEVICE)
        losses, student_coefficients, teacher_coefficients = attention.forward(students, teachers, exponent, True, True)
        assert student_coefficients is not None and teacher_coefficients is not None
        ours = attention.backward(grad, 1.75, students, student_coefficients, exponent)
        ours += attention.backward(grad, 1.75, teachers, teacher_coefficients, exponent)

        def formula(*features: Tensor) -> tuple[Tensor]:
            return (attention_formula(features[:levels], features[levels:], exponent),)

        inputs = [*students, *teachers]
        (truth,), truth_gradients = by_autograd(formula, inputs, torch.float64, [grad], 1.75)
        (plain_losses,), plain_gradients = by_autograd(formula, inputs, dtype, [grad], 1.75)
        assert losses.dtype == dtype
        check(losses, truth, plain_losses if plain else None, "losses")
        for index, (gradient, wanted, eager, feature) in enumerate(
            zip(ours, truth_gradients, plain_gradients, inputs, strict=True)
        ):
            assert gradient.dtype == feature.dtype
            assert gradient.stride() == torch.empty_like(feature).stride()
            check(gradient, wanted, eager if plain else None, f"gradient {index}")

    @pytest.mark.parametrize(
        ("layout", "dtype", "exponent"),
        [
            ("contiguous", torch.float32, 2.0),
            ("contiguous", torch.float16, 1.0),
            ("contiguous", torch.bfloat16, 3.0),
            ("contiguous", torch.float64, 2.0),
            ("channels_last", torch.float32, 1.5),
            ("channels_last", torch.bfloat16, 2.0),
            ("sliced", torch.float32, 3.0),
            ("sliced", torch.float16, 2.0),
            ("batch_last", torch.float32, 1.0),
            ("batch_last", torch.float32, 2.25),
        ],
    )
    def test_levels(self, layout: str, dtype: torch.dtype, exponent: float, generator: torch.Generator) -> None:
        # One odd level, one of a single channel, one of a single pixel; rectified, so that many values are 0.
        sizes = (((3, 5, 7), (4, 5, 7)), ((1, 4, 4), (9, 4, 4)), ((6, 1, 1), (2, 1, 1)))
        students = [arrange(random(generator, 2, *size, dtype=dtype).relu(), layout) for size, _ in sizes]
        teachers = [arrange(random(generator, 2, *size, dtype=dtype), layout) for _, size in sizes]
        self.compare(students, teachers, exponent, generator)

    @pytest.mark.parametrize(
        ("size", "layout"),
        [
            ((40, 12, 12), "contiguous"),  # two tiles of pixels, two of channels
            ((300, 4, 5), "channels_last"),  # two tiles of channels
            ((2, 33, 32), "contiguous"),  # a map longer than one step of the comparison
        ],
    )
    def test_several_tiles(self, size: tuple[int, int, int], layout: str, generator: torch.Generator) -> None:
        feature = arrange(random(generator, 1, *size, dtype=torch.float32), layout)
        teacher = arrange(random(generator, 1, *size, dtype=torch.float32), layout)
        self.compare([feature], [teacher], 2.0, generator)

    def test_mixed_layouts_and_expanded_teachers(self, generator: torch.Generator) -> None:
        students = [random(generator, 3, 4, 3, 6, dtype=torch.float32) for _ in range(3)]
        students[1] = arrange(students[1], "channels_last")
        students[2] = students[2].transpose(2, 3)
        teachers = [
            random(generator, 1, 4, 3, 6, dtype=torch.float32).expand(3, -1, -1, -1),
            random(generator, 3, 1, 3, 6, dtype=torch.float32).expand(-1, 5, -1, -1),
            random(generator, 3, 2, 6, 1, dtype=torch.float32).expand(-1, -1, -1, 3),
        ]
        self.compare(students, teachers, 2.0, generator)

    def test_more_levels_than_one_launch_takes(self, generator: torch.Generator) -> None:
        students = [random(generator, 2, 2, 1 + level % 2, 2, dtype=torch.float32) for level in range(9)]
        teachers = [random(generator, 2, 1, 1 + level % 2, 2, dtype=torch.float32) for level in range(9)]
        self.compare(students, teachers, 2.0, generator)

    def test_64_bit_offsets(self, wide_layouts: None, generator: torch.Generator) -> None:
        students, teachers = ([random(generator, 2, 3, 5, 4, dtype=torch.float32)] for _ in range(2))
        self.compare(students, teachers, 2.0, generator)

    @pytest.mark.parametrize(
        ("dtype", "magnitude"),
        [(torch.float16, 3e4), (torch.float32, 1e17), (torch.float32, 1e-7), (torch.bfloat16, 1e15)],
    )
    def test_extreme_magnitudes(self, dtype: torch.dtype, magnitude: float, generator: torch.Generator) -> None:
        # The squares of the map leave the range of float32; plain float32 gives 0 or NaN here.
        student = (random(generator, 2, 3, 4, 4).clamp(-1, 1) * magnitude).to(dtype)
        teacher = (random(generator, 2, 3, 4, 4).clamp(-1, 1) * magnitude).to(dtype)
        self.compare([student], [teacher], 2.0, generator, plain=False)

    @pytest.mark.parametrize("exponent", [1.0, 1.5, 2.0])
    def test_zero_maps(self, exponent: float, generator: torch.Generator) -> None:
        zeros = torch.zeros(2, 3, 4, 4)
        self.compare([zeros, zeros], [zeros, random(generator, 2, 3, 4, 4, dtype=torch.float32)], exponent, generator)

    def test_nan_stays_in_its_sample(self, generator: torch.Generator) -> None:
        student = random(generator, 3, 2, 3, 3, dtype=torch.float32)
        student[1, 0, 2, 1] = float("nan")
        self.compare([student], [random(generator, 3, 2, 3, 3, dtype=torch.float32)], 2.0, generator)

    def test_expanded_upstream_gradient_and_one_side(self, generator: torch.Generator) -> None:
        from frskd_fast.kernels import attention

        students = [random(generator, 2, 3, 4, 4, dtype=torch.float32).to(DEVICE)] * 2
        teachers = [random(generator, 2, 3, 4, 4, dtype=torch.float32).to(DEVICE)] * 2
        _, coefficients, absent = attention.forward(students, teachers, 2.0, True, False)
        assert coefficients is not None and absent is None
        _, absent, of_teachers = attention.forward(students, teachers, 2.0, False, True)
        assert absent is None and of_teachers is not None and of_teachers.isfinite().all()
        one = torch.tensor(0.5, device=DEVICE)
        expanded = attention.backward(one.expand(2, 2), 3.0, students, coefficients, 2.0)
        dense = attention.backward(torch.full((2, 2), 1.5, device=DEVICE), 1.0, students, coefficients, 2.0)
        for left, right in zip(expanded, dense, strict=True):
            assert torch.equal(left, right)

    @pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
    def test_attention_map(self, layout: str, generator: torch.Generator) -> None:
        from frskd_fast.kernels import attention

        feature = arrange(random(generator, 3, 5, 3, 4, dtype=torch.float32), layout)
        feature[1] = 0.0
        attention_map, norm = attention.attention_map(feature.to(DEVICE), 2.0)
        for dtype in (torch.float64,):
            activity = feature.to(DEVICE, dtype).square().mean(1).flatten(1)
            wanted = torch.linalg.vector_norm(activity, dim=1)
            check(norm, wanted, None, "norm")
            check(attention_map, activity / wanted.clamp_min(1e-12).unsqueeze(1), None, "map")

    def test_empty_batch(self) -> None:
        from frskd_fast.kernels import attention

        feature = torch.zeros(0, 3, 4, 4, device=DEVICE)
        losses, coefficients, _ = attention.forward([feature], [feature], 2.0, True, False)
        assert losses.shape == (1, 0) and coefficients is not None and coefficients.shape == (0,)
        assert attention.backward(losses, 1.0, [feature], coefficients, 2.0)[0].shape == feature.shape
        attention_map, norm = attention.attention_map(feature, 2.0)
        assert attention_map.shape == (0, 16) and norm.shape == (0,)

    def test_refuses_integers(self) -> None:
        from frskd_fast.kernels import attention

        feature = torch.zeros(1, 1, 2, 2, dtype=torch.int32, device=DEVICE)
        with pytest.raises(TypeError, match="int32"):
            attention.forward([feature], [feature], 2.0, False, False)


def cross_entropy_formula(
    logits: Tensor, labels: Sequence[Tensor], mix: float, smoothing: float, ignore: int
) -> Tensor:
    """Rows (R,) of the cross-entropy; logits (N, K, ...)."""
    classes = logits.shape[1]
    log_probability = torch.log_softmax(logits, 1)
    if labels[0].is_floating_point():
        label = (1.0 - smoothing) * labels[0].to(logits.dtype) + smoothing / classes
        return -(label * log_probability.masked_fill(label == 0, 0.0)).sum(1).flatten()
    total = torch.zeros_like(log_probability[:, 0])
    for target, share in zip(labels, (mix, 1.0 - mix) if len(labels) == 2 else (1.0,), strict=True):
        kept = target != ignore
        known = (target >= 0) & (target < classes)
        one_hot = torch.nn.functional.one_hot(target.where(known, 0), classes).movedim(-1, 1)
        label = (1.0 - smoothing) * one_hot.to(logits.dtype) + smoothing / classes
        loss = -(label * log_probability.masked_fill(label == 0, 0.0)).sum(1)
        weight = torch.where(known, share, float("nan")).masked_fill(~kept, 0.0).to(logits.dtype)
        total = total + weight * loss
    return total.flatten()


def divergence_formula(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    log_student, log_teacher = (torch.log_softmax(logits / temperature, 1) for logits in (student, teacher))
    probability = log_teacher.exp()
    ratio = (log_teacher - log_student).masked_fill(probability == 0, 0.0)
    return temperature**2 * (probability * ratio).sum(1).flatten()


class TestLogits:
    def compare(
        self,
        students: list[Tensor],
        teachers: list[Tensor],
        targets: list[Tensor],
        generator: torch.Generator,
        *,
        targets_b: Sequence[Tensor] = (),
        mix: float = 1.0,
        smoothing: float = 0.0,
        temperature: float = 4.0,
        detach_teacher: bool = False,
        plain: bool = True,
        with_gradients: bool = True,
    ) -> tuple[Tensor, Tensor]:
        """Forward and backward of one call; returns losses and statistics."""
        from frskd_fast.kernels import logits

        students, teachers, targets, second = (
            [tensor.to(DEVICE) for tensor in tensors] for tensors in (students, teachers, targets, targets_b)
        )
        ignore = -100
        heads = len(students)
        dtype = accumulate(students[0].dtype)
        settings = (targets, second, mix, smoothing, ignore, temperature)
        losses, statistics, inverse_valid = logits.forward(students, teachers, *settings)
        counts = [student.numel() // student.shape[1] for student in students]
        rows = sum(counts)
        assert losses.shape == statistics.shape == (4, rows) and losses.dtype == statistics.dtype == dtype
        grads = [random(generator, rows, dtype=dtype).to(DEVICE) for _ in range(3)]
        present = (bool(targets), bool(targets and teachers), bool(teachers))
        scales = [
            float(there) * factor for _ in range(heads) for there, factor in zip(present, (0.5, 0.25, 3.0), strict=True)
        ]

        def formula(*tensors: Tensor) -> tuple[Tensor, ...]:
            columns: list[list[Tensor]] = [[], [], []]
            for head in range(heads):
                zeros = tensors[head].new_zeros(counts[head])
                teacher = tensors[heads + head] if teachers else None
                labels = [part[head] for part in (targets, second) if part]
                for column, side in zip(columns[:2], (tensors[head], teacher), strict=True):
                    if side is None or not labels:
                        column.append(zeros)
                    else:
                        column.append(cross_entropy_formula(side, labels, mix, smoothing, ignore))
                if teacher is not None and detach_teacher:
                    teacher = teacher.detach()
                columns[2].append(zeros if teacher is None else divergence_formula(tensors[head], teacher, temperature))
            # The backward's scales, with the mean over valid rows for the cross-entropies.
            factors = [torch.cat([inverse_valid[h].expand(counts[h]) for h in range(heads)]) * 0.5 for _ in range(2)]
            factors[1] = factors[1] * 0.5
            weighted = [torch.cat(columns[j]) * factors[j].to(zeros.dtype) for j in range(2)]
            return (*weighted, 3.0 * torch.cat(columns[2]), *(torch.cat(column) for column in columns))

        inputs = [*students, *teachers]
        nothing = [torch.zeros_like(grad) for grad in grads]
        truth, truth_gradients = by_autograd(formula, inputs, torch.float64, [*grads, *nothing], 1.0)
        eager, eager_gradients = by_autograd(formula, inputs, dtype, [*grads, *nothing], 1.0)
        for index, name in enumerate(("ce_student", "ce_teacher", "kd")):
            check(losses[index], truth[3 + index], eager[3 + index] if plain else None, name)
        self.check_statistics(statistics, students, teachers, temperature)
        self.check_weights(losses[3], inverse_valid, targets, second, mix, ignore, counts)
        if not with_gradients:
            return losses, statistics
        ours_student, ours_teacher = logits.backward(
            grads, 0, 1, scales, inverse_valid, students, teachers, *settings, statistics, losses,
            not detach_teacher, True, bool(teachers),
        )  # fmt: skip
        assert ours_student is not None and (ours_teacher is not None) == bool(teachers)
        for index, (gradient, logit) in enumerate(zip([*ours_student, *(ours_teacher or [])], inputs, strict=True)):
            assert gradient.dtype == logit.dtype
            assert gradient.stride() == torch.empty_like(logit).stride()
            check(gradient, truth_gradients[index], eager_gradients[index] if plain else None, f"gradient {index}")
        return losses, statistics

    def check_statistics(
        self, statistics: Tensor, students: Sequence[Tensor], teachers: Sequence[Tensor], temperature: float
    ) -> None:
        for row, (side, divisor) in enumerate(
            ((students, 1.0), (teachers, 1.0), (students, temperature), (teachers, temperature))
        ):
            if side:
                wanted = torch.cat([(logit.double() / divisor).logsumexp(1).flatten() for logit in side])
                check(statistics[row], wanted, None, f"statistics[{row}]")
            else:
                assert statistics[row].eq(0).all()

    def check_weights(
        self,
        weights: Tensor,
        inverse_valid: Tensor,
        targets: Sequence[Tensor],
        second: Sequence[Tensor],
        mix: float,
        ignore: int,
        counts: Sequence[int],
    ) -> None:
        wanted = torch.zeros_like(weights)
        if targets and targets[0].is_floating_point():
            wanted = torch.ones_like(weights)
        elif targets:
            wanted = torch.cat([(target != ignore).flatten() for target in targets]).to(weights.dtype)
            if second:
                kept = torch.cat([(target != ignore).flatten() for target in second]).to(weights.dtype)
                wanted = mix * wanted + (1.0 - mix) * kept
        torch.testing.assert_close(weights, wanted)
        sums = torch.stack([part.sum() for part in wanted.split(list(counts))])
        torch.testing.assert_close(inverse_valid, torch.where(sums == 0, 0.0, 1.0 / sums))

    def labels(self, generator: torch.Generator, rows: tuple[int, ...], classes: int) -> Tensor:
        target = torch.randint(0, classes, rows, generator=generator)
        target.view(-1)[::3] = -100
        return target

    @pytest.mark.parametrize("temperature", [1.0, 4.0, 10.0, 0.5])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_indices(self, dtype: torch.dtype, temperature: float, generator: torch.Generator) -> None:
        student, teacher = (3 * random(generator, 10, 13, dtype=dtype) for _ in range(2))
        target = self.labels(generator, (10,), 13)
        self.compare([student], [teacher], [target], generator, temperature=temperature)

    @pytest.mark.parametrize("kind", ["none", "student only", "two labels", "probabilities"])
    @pytest.mark.parametrize("smoothing", [0.0, 0.1])
    def test_kinds_of_labels(self, kind: str, smoothing: float, generator: torch.Generator) -> None:
        student, teacher = (3 * random(generator, 7, 11, dtype=torch.float32) for _ in range(2))
        first, second = self.labels(generator, (7,), 11), self.labels(generator, (7,), 11).roll(1)
        probabilities = random(generator, 7, 11, dtype=torch.float32).softmax(1)
        probabilities[2] = 0.0
        probabilities[2, 3] = 1.0
        targets = {"none": [], "probabilities": [probabilities]}.get(kind, [first])
        self.compare(
            [student], [] if kind == "student only" else [teacher], targets, generator,
            targets_b=[second] if kind == "two labels" else [], mix=0.3, smoothing=smoothing, detach_teacher=True,
        )  # fmt: skip

    @pytest.mark.parametrize(
        ("layout", "dtype", "shape"),
        [
            ("contiguous", torch.float32, (2, 6, 3, 5)),
            ("contiguous", torch.bfloat16, (2, 21, 4, 4)),
            ("channels_last", torch.float32, (2, 6, 3, 5)),
            ("sliced", torch.float32, (2, 6, 3, 5)),
            ("batch_last", torch.float32, (5, 6, 2, 3)),
            ("contiguous", torch.float32, (3, 4, 7)),
            ("contiguous", torch.float64, (2, 6, 3, 5)),
        ],
    )
    def test_maps(self, layout: str, dtype: torch.dtype, shape: tuple[int, ...], generator: torch.Generator) -> None:
        student, teacher = (arrange(3 * random(generator, *shape, dtype=dtype), layout) for _ in range(2))
        target = self.labels(generator, (shape[0], *shape[2:]), shape[1])
        if layout == "sliced":
            target = arrange(target, layout)
        self.compare([student], [teacher], [target], generator, smoothing=0.1)

    def test_64_bit_offsets(self, wide_layouts: None, generator: torch.Generator) -> None:
        student, teacher = (random(generator, 2, 21, 5, 4, dtype=torch.float32) for _ in range(2))
        target = self.labels(generator, (2, 5, 4), 21)
        self.compare([student], [teacher], [target], generator, targets_b=[target.flip(0)], mix=0.3)

    def test_rows_of_mixed_layouts(self, generator: torch.Generator) -> None:
        student = 3 * random(generator, 2, 5, 3, 4, dtype=torch.float32)
        teacher = arrange(3 * random(generator, 2, 5, 3, 4, dtype=torch.float32), "channels_last")
        probabilities = arrange(random(generator, 2, 5, 3, 4, dtype=torch.float32).softmax(1), "batch_last")
        self.compare([student], [teacher], [probabilities], generator)

    def test_expanded_teacher_and_transposed_student(self, generator: torch.Generator) -> None:
        student = 3 * random(generator, 9, 6, dtype=torch.float32).T
        teacher = 3 * random(generator, 1, 9, dtype=torch.float32).expand(6, -1)
        target = torch.tensor([4]).expand(6)
        self.compare([student], [teacher], [target], generator)

    def test_heads_of_different_sizes(self, generator: torch.Generator) -> None:
        shapes = ((4, 5), (2, 3, 2, 2), (16, 20), (1, 1), (3, 2))
        students, teachers = (
            [3 * random(generator, *shape, dtype=torch.float32) for shape in shapes] for _ in range(2)
        )
        targets = [self.labels(generator, (shape[0], *shape[2:]), shape[1]) for shape in shapes]
        self.compare(students, teachers, targets, generator)

    def test_more_heads_than_one_launch_takes(self, generator: torch.Generator) -> None:
        students, teachers = ([random(generator, 2, 3, dtype=torch.float32) for _ in range(9)] for _ in range(2))
        self.compare(students, teachers, [torch.tensor([2, 0])] * 9, generator)

    def test_head_strides_of_the_upstream_gradient(self, generator: torch.Generator) -> None:
        from frskd_fast.kernels import logits

        students = [random(generator, 2, 3, dtype=torch.float32).to(DEVICE) for _ in range(9)]
        teachers = [random(generator, 2, 3, dtype=torch.float32).to(DEVICE) for _ in range(9)]
        settings: tuple[Any, ...] = ([], [], 1.0, 0.0, -100, 4.0)
        losses, statistics, _ = logits.forward(students, teachers, *settings)
        per_head = random(generator, 9, dtype=torch.float32).to(DEVICE)
        unread = torch.full((9,), float("nan"), device=DEVICE)

        def gradients(grad: Tensor, head_stride: int, row_stride: int) -> list[Tensor]:
            found, _ = logits.backward(
                [unread, unread, grad], head_stride, row_stride, [0.0, 0.0, 1.0] * 9, None, students, teachers,
                *settings, statistics, losses, True, True, False,
            )  # fmt: skip
            assert isinstance(found, list)
            return found

        by_row = gradients(per_head.repeat_interleave(2), 0, 1)
        for left, right in zip(gradients(per_head, 1, 0), by_row, strict=True):
            assert torch.equal(left, right)

    @pytest.mark.parametrize("kind", ["indices", "probabilities"])
    def test_more_classes_than_a_tile(self, kind: str, generator: torch.Generator) -> None:
        student, teacher = (3 * random(generator, 2, 5000, dtype=torch.float32) for _ in range(2))
        # Maxima in different tiles of the two sides.
        student[0, 4999], teacher[0, 3] = 12.0, 14.0
        target = torch.tensor([4999, 17])
        soft = random(generator, 2, 5000, dtype=torch.float32).softmax(1)
        self.compare(
            [student], [teacher], [target if kind == "indices" else soft], generator, smoothing=0.1, temperature=3.0
        )

    @pytest.mark.parametrize("shape", [(3, 1), (1, 1), (1, 7), (2, 1, 2, 2)])
    def test_one_class_and_one_row(self, shape: tuple[int, ...], generator: torch.Generator) -> None:
        student, teacher = (random(generator, *shape, dtype=torch.float32) for _ in range(2))
        target = torch.zeros((shape[0], *shape[2:]), dtype=torch.int64)
        self.compare([student], [teacher], [target], generator)

    def test_all_labels_ignored(self, generator: torch.Generator) -> None:
        student, teacher = (random(generator, 4, 5, dtype=torch.float32) for _ in range(2))
        losses, _ = self.compare([student], [teacher], [torch.full((4,), -100)], generator)
        assert losses[:2].eq(0).all() and losses[3].eq(0).all()

    def test_label_that_is_no_class(self, generator: torch.Generator) -> None:
        student, teacher = (random(generator, 4, 5, dtype=torch.float32) for _ in range(2))
        losses, _ = self.compare([student], [teacher], [torch.tensor([0, 5, -1, 4])], generator)
        assert losses[0].isnan().tolist() == [False, True, True, False]

    def test_many_rows_are_counted_in_a_second_launch(
        self, monkeypatch: pytest.MonkeyPatch, generator: torch.Generator
    ) -> None:
        from frskd_fast.kernels import logits

        monkeypatch.setattr(logits, "_COUNT_LIMIT", 20)
        students, teachers = (
            [random(generator, *shape, dtype=torch.float32) for shape in ((40, 100), (2, 3, 5, 5), (3, 4))]
            for _ in range(2)
        )
        targets = [self.labels(generator, (40,), 100), self.labels(generator, (2, 5, 5), 3), torch.full((3,), -100)]
        self.compare(students, teachers, targets, generator, with_gradients=False)

    def test_masked_classes(self, generator: torch.Generator) -> None:
        from frskd_fast.kernels import logits

        # Class 2 is masked for both sides: everything must be as if it did not exist, with a gradient of 0 there.
        full, masked = ([random(generator, 3, 6, dtype=torch.float32).to(DEVICE) for _ in range(2)] for _ in range(2))
        for side, without in zip(full, masked, strict=True):
            side[:, 2] = float("-inf")
            without.resize_(3, 5).copy_(side[:, [0, 1, 3, 4, 5]])
        grads = [random(generator, 3, dtype=torch.float32).to(DEVICE) for _ in range(3)]
        found = []
        for (student, teacher), labels in ((full, [0, 1, 5]), (masked, [0, 1, 4])):
            settings: tuple[Any, ...] = ([torch.tensor(labels, device=DEVICE)], [], 1.0, 0.0, -100, 3.0)
            losses, statistics, inverse_valid = logits.forward([student], [teacher], *settings)
            first, second = logits.backward(
                grads,
                0,
                1,
                [1.0] * 3,
                inverse_valid,
                [student],
                [teacher],
                *settings,
                statistics,
                losses,
                True,
                True,
                True,
            )
            assert first is not None and second is not None
            found.append((losses, first[0], second[0]))
        (losses, *gradients), (wanted, *wanted_gradients) = found
        torch.testing.assert_close(losses, wanted)
        for gradient, expected in zip(gradients, wanted_gradients, strict=True):
            assert gradient[:, 2].eq(0).all()
            torch.testing.assert_close(gradient[:, [0, 1, 3, 4, 5]], expected)

    def test_teacher_that_excludes_a_class(self, generator: torch.Generator) -> None:
        student, teacher = (random(generator, 3, 6, dtype=torch.float32) for _ in range(2))
        teacher[1, 4] = float("-inf")
        losses, _ = self.compare([student], [teacher], [torch.tensor([0, 1, 5])], generator, with_gradients=False)
        assert losses.isfinite().all()

    def test_masked_first_tile(self, generator: torch.Generator) -> None:
        student, teacher = (random(generator, 1, 5000, dtype=torch.float32) for _ in range(2))
        student[:, :4096], teacher[:, :4096] = float("-inf"), float("-inf")
        losses, _ = self.compare(
            [student], [teacher], [torch.tensor([4500])], generator, temperature=3.0, with_gradients=False
        )
        assert losses.isfinite().all()

    def test_nan_stays_in_its_row(self, generator: torch.Generator) -> None:
        student, teacher = (random(generator, 3, 6, dtype=torch.float32) for _ in range(2))
        student[1, 4] = float("nan")
        losses, _ = self.compare([student], [teacher], [torch.tensor([0, 1, 5])], generator)
        assert losses[0].isnan().tolist() == losses[2].isnan().tolist() == [False, True, False]

    @pytest.mark.parametrize(
        ("dtype", "classes", "temperature"),
        [(torch.float16, 9, 4.0), (torch.float32, 9, 10.0), (torch.float32, 9, 0.5), (torch.float32, 4500, 4.0)],
    )
    def test_large_offsets(
        self, dtype: torch.dtype, classes: int, temperature: float, generator: torch.Generator
    ) -> None:
        # An offset common to a row changes nothing; in the log-sum-exps it leaves no digits for the differences.
        student = (random(generator, 4, classes) + torch.tensor([[3e4], [-3e4], [0.0], [3e4]])).to(dtype)
        teacher = (random(generator, 4, classes) + torch.tensor([[-3e4], [3e4], [2e4], [3e4]])).to(dtype)
        student[3, :2] = torch.tensor([-3e4, 3e4])
        # A few classes decide, however many there are.
        student[:, -3:] += 10
        teacher[:, -3:] += 10
        target = torch.tensor([0, 3, 1, 0])
        self.compare([student], [teacher], [target], generator, temperature=temperature)

    def test_tied_classes_at_a_low_temperature(self, generator: torch.Generator) -> None:
        # Relative to the log-sum-exp at T = 1, every exponential at T = 0.02 would be 0.
        student, teacher = (0.01 * random(generator, 3, 13, dtype=torch.float32) for _ in range(2))
        self.compare([student], [teacher], [torch.tensor([0, 3, 12])], generator, temperature=0.02)

    def test_one_side_only(self, generator: torch.Generator) -> None:
        from frskd_fast.kernels import logits

        student, teacher = (random(generator, 4, 5, dtype=torch.float32).to(DEVICE) for _ in range(2))
        settings: tuple[Any, ...] = ([torch.tensor([0, 1, 2, 3], device=DEVICE)], [], 1.0, 0.0, -100, 4.0)
        losses, statistics, inverse_valid = logits.forward([student], [teacher], *settings)
        grads = [torch.ones(4, device=DEVICE)] * 3

        def gradients(need_student: bool, need_teacher: bool) -> Any:
            return logits.backward(
                grads, 0, 1, [1.0] * 3, inverse_valid, [student], [teacher], *settings, statistics, losses,
                True, need_student, need_teacher,
            )  # fmt: skip

        student_gradients, teacher_gradients = gradients(True, True)
        first, absent = gradients(True, False)
        also_absent, second = gradients(False, True)
        assert absent is None and also_absent is None and gradients(False, False) == (None, None)
        assert first and second and student_gradients and teacher_gradients
        assert torch.equal(student_gradients[0], first[0]) and torch.equal(teacher_gradients[0], second[0])

    @pytest.mark.parametrize("shape", [(0, 5), (0, 5, 2, 2)])
    def test_empty_batch(self, shape: tuple[int, ...]) -> None:
        from frskd_fast.kernels import logits

        student = torch.zeros(shape, device=DEVICE)
        target = torch.zeros((0, *shape[2:]), dtype=torch.int64, device=DEVICE)
        settings: tuple[Any, ...] = ([target], [], 1.0, 0.0, -100, 4.0)
        losses, statistics, inverse_valid = logits.forward([student], [student], *settings)
        assert losses.shape == statistics.shape == (4, 0) and inverse_valid.tolist() == [0.0]
        gradients, _ = logits.backward(
            [torch.zeros(0, device=DEVICE)] * 3, 0, 1, [1.0] * 3, inverse_valid, [student], [student], *settings,
            statistics, losses, True, True, False,
        )  # fmt: skip
        assert gradients is not None and gradients[0].shape == shape


class TestFusionPlans:
    """What depends on block shapes, which are those of large maps elsewhere."""

    @pytest.fixture
    def small_blocks(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        """Every program of the sums adds up two tiles, and the last one tile; all partial sums take several steps."""
        from frskd_fast.kernels import _fusion

        monkeypatch.setattr(_fusion, "_ENOUGH_PROGRAMS", 3)
        monkeypatch.setattr(_fusion, "_MOST_STEPS", 2)
        for module in kernel_modules():
            if hasattr(module, "FINISH"):
                monkeypatch.setattr(module, "FINISH", _fusion.FinishBlock(rows=2, channels=256, step=2))
        forget_plans()
        yield
        forget_plans()

    @pytest.mark.usefixtures("small_blocks")
    @pytest.mark.parametrize("normalised", [(), (0,)], ids=["plain", "normalised"])
    @pytest.mark.parametrize(
        ("channels", "size", "layout"), [(18, (12, 12), "contiguous"), (260, (3, 3), "channels_last")]
    )
    def test_several_tiles_and_steps(
        self, channels: int, size: tuple[int, int], layout: str, normalised: tuple[int, ...]
    ) -> None:
        case = _raw_fusion.Case(channels, size, (("none", *size),) * 2, normalised=normalised, batch=1)
        self.solve(case, layout)

    @pytest.mark.usefixtures("small_blocks")
    def test_statistics_of_several_chunks(self) -> None:
        _raw_fusion.RawProblem(_raw_fusion._statistics_of_hard_channels).run("triton", DEVICE)

    @pytest.mark.usefixtures("wide_layouts")
    def test_64_bit_offsets(self) -> None:
        inputs = (("none", 2, 3), ("up", 1, 2), ("pool", 3, 5))
        self.solve(_raw_fusion.Case(2, (2, 3), inputs, normalised=(1, 2)), "contiguous")

    def solve(self, case: _raw_fusion.Case, layout: str) -> None:
        tensors = _raw_fusion.make(case, [layout] * 4, torch.float32, DEVICE)
        _raw_fusion.three_way(layout, _dispatch.raw("fusion", "triton"), case, tensors)


class TestCombine:
    @pytest.mark.parametrize(
        ("levels", "batch", "rows"), [(3, 5, 7), (0, 5, 5), (1, 1, 1), (4, 600, 2100), (2, 3, 40_000), (2, 0, 0)]
    )
    @pytest.mark.parametrize("has_targets", [True, False])
    def test_parts(self, levels: int, batch: int, rows: int, has_targets: bool, generator: torch.Generator) -> None:
        from frskd_fast.kernels import combine

        attention_losses = random(generator, levels, batch, dtype=torch.float32).abs().to(DEVICE)
        logits_losses = random(generator, 4, rows, dtype=torch.float32).abs().to(DEVICE)
        logits_losses[3] = (logits_losses[3] > 0.5).float()
        parts, (total,) = combine.forward(attention_losses, logits_losses, 2.0, 100.0, has_targets, split=False)
        assert torch.equal(total, parts[0])
        again, apart = combine.forward(attention_losses, logits_losses, 2.0, 100.0, has_targets, split=True)
        assert torch.equal(again, parts)
        assert torch.equal(torch.stack(apart), parts[1:4])
        exact = logits_losses.double()
        valid = exact[3].sum() if has_targets else torch.zeros(())
        inverse = 1.0 / valid if valid > 0 else torch.zeros(())
        kd = exact[2].sum() / max(rows, 1)
        feature = attention_losses.double().sum() / max(batch, 1)
        student, teacher = (exact[row].sum() * inverse for row in (0, 1))
        wanted = [student + teacher + 2.0 * kd + 100.0 * feature, student, teacher, kd, feature, inverse]
        for part, value in zip(parts, wanted, strict=True):
            check(part.reshape(1), value.double().reshape(1), None, "part")

    def test_no_valid_row(self) -> None:
        from frskd_fast.kernels import combine

        losses = torch.zeros(4, 3, device=DEVICE)
        losses[2] = 1.0
        parts, _ = combine.forward(torch.zeros(0, 3, device=DEVICE), losses, 2.0, 100.0, True, split=False)
        assert parts.tolist() == [2.0, 0.0, 0.0, 1.0, 0.0, 0.0]

    def test_nan_is_not_hidden(self) -> None:
        from frskd_fast.kernels import combine

        losses = torch.zeros(4, 3, device=DEVICE)
        losses[0, 1] = float("nan")
        losses[3] = 1.0
        parts, _ = combine.forward(torch.zeros(1, 3, device=DEVICE), losses, 2.0, 100.0, True, split=False)
        assert parts.isnan().tolist() == [True, True, False, False, False, False]
