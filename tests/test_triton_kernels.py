"""The raw Triton functions against plain formulas in float64.

With a GPU the kernels run on it. Without one they run in Triton's interpreter, which must be switched on before Triton
is first imported: one test starts this file again in a process of its own, where the classes below are collected.
"""

from __future__ import annotations

import importlib.util
import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from numerics import assert_close
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ON_GPU = torch.cuda.is_available() and not INTERPRETED
RUNS_HERE = INTERPRETED or ON_GPU
DEVICE = "cuda" if ON_GPU else "cpu"

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed"),
    # The interpreter computes masked lanes too: 0 / 0 and log(0) there are warnings of numpy.
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]


@pytest.mark.slow
@pytest.mark.skipif(RUNS_HERE, reason="the kernels run in this process")
def test_kernels_in_the_interpreter() -> None:
    root = str(Path(__file__).resolve().parents[1])
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (root, environment.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__],
        capture_output=True,
        text=True,
        env=environment,
        cwd=root,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


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


@pytest.fixture
def wide_layouts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every tensor counts as too large for 32-bit offsets."""
    from frskd_fast.kernels import _common, attention, fusion, logits

    def wide(*arguments: Any, **options: Any) -> Any:
        return _common.layout_of(*arguments, **options)._replace(wide=True)

    plans = [plan for module in (attention, fusion, logits) for name, plan in vars(module).items() if "_plan" in name]
    for module in (attention, fusion, logits):
        monkeypatch.setattr(module, "layout_of", wide)
    for plan in plans:
        plan.cache_clear()
    yield
    for plan in plans:
        plan.cache_clear()


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
    __test__ = RUNS_HERE

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


class TestLogits:
    """What the problems of `logits` (tests/test_logits.py runs them) do not reach: launches of few rows and wide layouts."""

    __test__ = RUNS_HERE

    def run(self, name: str) -> None:
        from problems import problems

        (problem,) = (problem for problem in problems("logits") if problem.name == name)
        problem.run("triton", DEVICE)

    def test_64_bit_offsets(self, wide_layouts: None) -> None:
        for problem in ("all labels ignored, a map", "heads of different sizes, none", "maxima in different tiles"):
            self.run(problem)

    def test_many_rows_are_counted_in_a_second_launch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from frskd_fast.kernels import logits

        monkeypatch.setattr(logits, "_COUNT_LIMIT", 3)
        self.run("heads of different sizes, batchmean")

    def test_statistics_are_four_log_sums(self, generator: torch.Generator) -> None:
        from frskd_fast.kernels import logits

        from frskd_fast.reference.logits import Heads, Settings

        student, teacher = (3 * random(generator, 5, 13, dtype=torch.float32).to(DEVICE) for _ in range(2))
        settings = Settings(1.0, 0.0, -100, 4.0)
        for teachers in ([teacher], []):
            statistics = logits.forward(Heads([student], teachers, [], []), settings).statistics
            assert statistics.shape == (logits.STATISTICS, 5)
            for row, (divisor, sides) in enumerate(itertools.product((1.0, 4.0), ([student], teachers))):
                wanted = [(side.double() / divisor).logsumexp(1) for side in sides] or [torch.zeros(5, device=DEVICE)]
                check(statistics[row], wanted[0], None, f"statistics[{row}]")

    def test_upstream_gradients_of_heads_and_of_rows(self, generator: torch.Generator) -> None:
        from frskd_fast.kernels import logits

        from frskd_fast.reference.logits import Heads, Settings, Upstream, Wanted

        students, teachers = (
            [random(generator, 2, 3, dtype=torch.float32).to(DEVICE) for _ in range(9)] for _ in range(2)
        )
        heads, settings = Heads(students, teachers, [], []), Settings(1.0, 0.0, -100, 4.0)
        saved = logits.forward(heads, settings)
        per_head = random(generator, 9, dtype=torch.float32).to(DEVICE)
        unread = torch.full((9,), float("nan"), device=DEVICE)

        def gradients(grad: Tensor, head_stride: int, row_stride: int) -> list[Tensor]:
            upstream = Upstream([unread, unread, grad], head_stride, row_stride, [0.0, 0.0, 1.0], False)
            return logits.backward(upstream, heads, settings, saved, Wanted(True, False, True))

        by_row = gradients(per_head.repeat_interleave(2), 0, 1)
        assert len(by_row) == 9
        for left, right in zip(gradients(per_head, 1, 0), by_row, strict=True):
            assert torch.equal(left, right)

    def test_one_side_gives_the_same_bits_as_both(self, generator: torch.Generator) -> None:
        from frskd_fast.kernels import logits

        from frskd_fast.reference.logits import Heads, Settings, Upstream, Wanted

        student, teacher = (random(generator, 4, 5, dtype=torch.float32).to(DEVICE) for _ in range(2))
        heads = Heads([student], [teacher], [torch.tensor([0, 1, 2, 3], device=DEVICE)], [])
        settings = Settings(1.0, 0.0, -100, 4.0)
        saved = logits.forward(heads, settings)
        upstream = Upstream([torch.ones(4, device=DEVICE)] * 3, 0, 1, [1.0] * 3, True)

        def gradients(student: bool, teacher: bool) -> list[Tensor]:
            return logits.backward(upstream, heads, settings, saved, Wanted(student, teacher, True))

        first, second = gradients(True, True)
        assert torch.equal(gradients(True, False)[0], first) and torch.equal(gradients(False, True)[0], second)
        assert gradients(False, False) == []


class TestFusion:
    __test__ = RUNS_HERE

    @pytest.fixture(autouse=True)
    def quick_interpreter(self, monkeypatch: pytest.MonkeyPatch) -> None:
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

    def compare(
        self,
        inputs: list[Tensor],
        resamples: Sequence[str],
        size: tuple[int, int],
        generator: torch.Generator,
        pre: str = "relu",
        act: str = "none",
        weighting: str = "relu",
        weight: Sequence[float] | None = None,
        normalised: Sequence[int] = (),  # positions of the inputs with a BatchNorm
        training: bool = True,
        grad: Tensor | None = None,
    ) -> None:
        """Output and all gradients by the three-way rule, against the reference and its autograd."""
        from frskd_fast.kernels import fusion

        from frskd_fast.reference import fusion as reference

        count, channels = len(inputs), inputs[0].shape[1]
        dtype, precise = inputs[0].dtype, accumulate(inputs[0].dtype)
        inputs = [x.to(DEVICE) for x in inputs]
        empty = torch.zeros(0, dtype=precise, device=DEVICE)
        weights = torch.tensor(weight, dtype=precise) if weight is not None else torch.rand(count, dtype=precise) + 0.1
        weights = weights.to(DEVICE)
        gammas, betas, fixed = [empty] * count, [empty] * count, [empty] * count
        for place in normalised:
            gammas[place] = random(generator, channels, dtype=precise).to(DEVICE)
            betas[place] = random(generator, channels, dtype=precise).to(DEVICE)
            fixed[place] = random(generator, 3, channels, dtype=precise).abs().to(DEVICE) + 0.5
        statistics = fixed
        if training and normalised:
            fresh = fusion.batch_statistics(inputs, [1e-3] * count)
            statistics = [fresh[place] if place in normalised else empty for place in range(count)]
            for x, found in zip(inputs, fresh, strict=True):
                plain, truth = (reference.batch_statistics(x.to(kind), 1e-3) for kind in (dtype, torch.float64))
                assert_close(found, plain, truth, "statistics")
        settings = (
            [reference.RESAMPLES.index(resample) for resample in resamples],
            reference.ACTIVATIONS.index(pre),
            reference.ACTIVATIONS.index(act),
            reference.WEIGHTINGS.index(weighting),
            1e-4,
        )
        out = fusion.forward(inputs, statistics, gammas, betas, weights, *settings, size)
        assert out.dtype == dtype
        grad = random(generator, *out.shape, dtype=dtype).to(DEVICE) if grad is None else grad.to(DEVICE)
        node = (grad, inputs, statistics, gammas, betas, weights)
        if normalised:
            sums, weight_gradient = fusion.backward_sums(*node, *settings)
            used = sums if training else [empty] * count
            gradients, nothing = fusion.backward(*node, used, *settings, [True] * count, False)
            assert nothing.numel() == 0
        else:
            sums = [empty] * count
            gradients, weight_gradient = fusion.backward(*node, sums, *settings, [True] * count, True)

        def by_reference(kind: torch.dtype) -> list[Tensor]:
            """Output, then gradients of inputs, weight, gammas and betas."""
            precise_kind = accumulate(kind)
            leaves = [x.detach().to(kind).requires_grad_() for x in inputs]
            parameters = [
                value.detach().to(precise_kind).requires_grad_()
                for value in (
                    weights,
                    *(gammas[place] for place in normalised),
                    *(betas[place] for place in normalised),
                )
            ]
            affine: list[list[Tensor | None]] = [[None] * count for _ in range(3)]
            for slot, place in enumerate(normalised):
                of_batch = reference.batch_statistics(leaves[place], 1e-3)
                affine[0][place] = of_batch if training else fixed[place].to(precise_kind)
                affine[1][place] = parameters[1 + slot]
                affine[2][place] = parameters[1 + len(normalised) + slot]
            result = reference.fuse(
                leaves, affine[0], affine[1], affine[2], parameters[0], resamples, pre, act, weighting, 1e-4, size
            )
            found = torch.autograd.grad(result, leaves + parameters, grad.to(kind), allow_unused=True)
            return [
                result.detach(),
                *(
                    torch.zeros_like(leaf) if gradient is None else gradient
                    for leaf, gradient in zip(leaves + parameters, found, strict=True)
                ),
            ]

        ours = [out, *gradients, weight_gradient]
        ours += [sums[place][1] for place in normalised] + [sums[place][0] for place in normalised]
        names = ["out", *(f"gradient {place}" for place in range(count)), "weight"]
        names += [f"{name} {place}" for name in ("gamma", "beta") for place in normalised]
        truths = by_reference(torch.float64)
        # The weights' gradient is (D_i - sum_j D_j w^_j) / divisor; the sum is about <grad, out>.
        divisor = weights.relu().sum().item() + 1e-4 if "relu" in weighting else 1.0
        scale = (grad.double() * truths[0]).sum().abs().item() / divisor
        for name, value, plain, truth in zip(names, ours, by_reference(dtype), truths, strict=True):
            assert_close(value, plain, truth, name, scale if name == "weight" else 0.0)
        for gradient, x in zip(gradients, inputs, strict=True):
            assert gradient.dtype == dtype and gradient.stride() == torch.empty_like(x).stride()
        assert out.is_contiguous(memory_format=torch.channels_last) or inputs[0].is_contiguous() or out.is_contiguous()

    @pytest.mark.parametrize(
        ("dtype", "layout", "sizes", "resamples", "size", "pre", "act", "weighting"),
        [
            (torch.float32, "contiguous", ((4, 5), (4, 5)), ("none", "none"), (4, 5), "relu", "none", "relu"),
            (torch.bfloat16, "channels_last", ((9, 9), (5, 5)), ("none", "up"), (9, 9), "relu", "none", "relu"),
            (torch.float16, "contiguous", ((4, 4), (7, 7)), ("none", "pool"), (4, 4), "relu", "none", "softmax"),
            (torch.float64, "channels_last", ((8, 11),), ("pool",), (4, 6), "none", "silu", "relu_or_uniform"),
            (torch.float32, "sliced", ((2, 3), (4, 6)), ("up", "none"), (4, 6), "none", "silu", "softmax"),
            (
                torch.float32,
                "batch_last",
                ((2, 3), (1, 3), (4, 6), (2, 3)),
                ("none", "up", "pool", "none"),
                (2, 3),
                "silu",
                "relu",
                "relu_or_uniform",
            ),
            (
                torch.float32,
                "contiguous",
                ((1, 1), (1, 1), (1, 1)),
                ("up", "pool", "none"),
                (1, 1),
                "relu",
                "none",
                "sum",
            ),
        ],
    )
    def test_nodes(
        self,
        dtype: torch.dtype,
        layout: str,
        sizes: tuple[tuple[int, int], ...],
        resamples: tuple[str, ...],
        size: tuple[int, int],
        pre: str,
        act: str,
        weighting: str,
        generator: torch.Generator,
    ) -> None:
        channels = 1 if size == (1, 1) else 3
        batch = 2 if len(sizes) == 2 else 1
        inputs = [arrange(random(generator, batch, channels, *one, dtype=dtype), layout) for one in sizes]
        self.compare(inputs, resamples, size, generator, pre, act, weighting)

    @pytest.mark.parametrize(
        ("dtype", "layout", "sizes", "resamples", "normalised", "act", "training"),
        [
            (torch.float32, "channels_last", ((4, 5), (2, 3)), ("none", "up"), (0, 1), "none", True),
            (torch.float64, "contiguous", ((3, 2), (6, 3), (2, 2)), ("none", "pool", "up"), (1, 2), "silu", True),
            (torch.bfloat16, "sliced", ((5, 4),), ("pool",), (0,), "relu", True),
            (torch.float32, "contiguous", ((3, 2), (5, 4), (2, 1)), ("none", "pool", "up"), (0, 1, 2), "none", False),
        ],
    )
    def test_normalised_nodes(
        self,
        dtype: torch.dtype,
        layout: str,
        sizes: tuple[tuple[int, int], ...],
        resamples: tuple[str, ...],
        normalised: tuple[int, ...],
        act: str,
        training: bool,
        generator: torch.Generator,
    ) -> None:
        batch = 2 if len(sizes) == 2 else 1
        inputs = [arrange(3 * random(generator, batch, 3, *one) + 1, layout) for one in sizes]
        inputs = [x.to(dtype) for x in inputs]
        size = (3, 2) if sizes[0] == (5, 4) else sizes[0]
        self.compare(inputs, resamples, size, generator, act=act, normalised=normalised, training=training)

    @pytest.mark.parametrize("weighting", ["sum", "relu", "softmax", "relu_or_uniform"])
    @pytest.mark.parametrize("weight", [(0.7, 0.2), (-0.5, 0.9), (-0.5, -1.0), (0.0, 0.0)], ids=str)
    def test_weightings(self, weighting: str, weight: tuple[float, float], generator: torch.Generator) -> None:
        inputs = [random(generator, 1, 2, 2, 2, dtype=torch.float32) for _ in range(2)]
        self.compare(inputs, ("none", "none"), (2, 2), generator, weighting=weighting, weight=weight)

    @pytest.mark.parametrize(("shape", "layout"), [((1, 18, 12, 12), "contiguous"), ((1, 260, 3, 3), "channels_last")])
    def test_several_tiles_and_steps(
        self, shape: tuple[int, ...], layout: str, monkeypatch: pytest.MonkeyPatch, generator: torch.Generator
    ) -> None:
        from frskd_fast.kernels import fusion

        # Every program of the sums adds up two tiles, and the last one tile.
        monkeypatch.setattr(fusion, "_ENOUGH_PROGRAMS", 3)
        monkeypatch.setattr(fusion, "_MOST_STEPS", 2)
        monkeypatch.setattr(fusion, "_FINISH_ROWS", 2)
        monkeypatch.setattr(fusion, "_FINISH_STEP", 2)
        monkeypatch.setattr(fusion, "_FINISH_CHANNELS", 256)
        fusion._sums_plan.cache_clear()
        fusion._moments_plan.cache_clear()
        inputs = [arrange(random(generator, *shape, dtype=torch.float32), layout) for _ in range(2)]
        self.compare(inputs, ("none", "none"), (shape[2], shape[3]), generator)
        self.compare(inputs, ("none", "none"), (shape[2], shape[3]), generator, normalised=(0,))
        fusion._sums_plan.cache_clear()
        fusion._moments_plan.cache_clear()

    def test_rounding_of_the_nearest_neighbour(self, generator: torch.Generator) -> None:
        # Sizes where float32 moves the first output of a source by one from the exact quotient.
        self.compare([random(generator, 1, 1, 6, 26, dtype=torch.float32)], ("up",), (74, 44), generator)

    def test_mixed_layouts_and_expanded_gradients(self, generator: torch.Generator) -> None:
        inputs = [
            arrange(random(generator, 2, 3, 3, 4, dtype=torch.float32), "channels_last"),
            random(generator, 2, 1, 3, 4, dtype=torch.float32).expand(-1, 3, -1, -1),
            random(generator, 2, 3, 4, 3, dtype=torch.float32).transpose(2, 3),
        ]
        grad = torch.tensor(0.7).expand(2, 3, 3, 4)
        self.compare(inputs, ("none",) * 3, (3, 4), generator, grad=grad)

    def test_64_bit_offsets(self, wide_layouts: None, generator: torch.Generator) -> None:
        inputs = [random(generator, 2, 2, *one, dtype=torch.float32) for one in ((2, 3), (1, 2), (3, 5))]
        self.compare(inputs, ("none", "up", "pool"), (2, 3), generator, normalised=(1, 2))

    @pytest.mark.parametrize("pre", ["none", "relu"])
    def test_ties_padding_and_nan_in_windows(self, pre: str, generator: torch.Generator) -> None:
        from frskd_fast.kernels import fusion

        from frskd_fast.reference import fusion as reference

        # Few values, so that many windows have several largest; sizes of which one is padded on both sides.
        x = torch.randint(-2, 2, (1, 12, 6, 5), generator=generator).to(DEVICE, torch.float32)
        x[:, 1] = -1.0  # the padding is the largest where there is any
        x[:, 2, 2, 2] = float("nan")
        x.requires_grad_()
        weight = torch.ones(1, device=DEVICE)
        wanted = reference.fuse([x], [None], [None], [None], weight, ["pool"], pre, "none", "sum", 0.0, (3, 3))
        grad = random(generator, 1, 12, 3, 3, dtype=torch.float32).to(DEVICE)
        (wanted_gradient,) = torch.autograd.grad(wanted, x, grad)
        empty = [torch.zeros(0, device=DEVICE)]
        settings = ([2], reference.ACTIVATIONS.index(pre), 0, 0, 0.0)
        image = [x.detach()]
        out = fusion.forward(image, empty, empty, empty, weight, *settings, (3, 3))
        (gradient,), of_weight = fusion.backward(
            grad, image, empty, empty, empty, weight, empty, *settings, [True], True
        )
        torch.testing.assert_close(out, wanted.detach(), rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(gradient, wanted_gradient, rtol=1e-6, atol=1e-6, equal_nan=True)
        assert of_weight.tolist() == [0.0]

    @pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
    def test_statistics(self, layout: str, monkeypatch: pytest.MonkeyPatch, generator: torch.Generator) -> None:
        from frskd_fast.kernels import fusion

        from frskd_fast.reference import fusion as reference

        monkeypatch.setattr(fusion, "_ENOUGH_PROGRAMS", 1)
        fusion._moments_plan.cache_clear()
        # Channels far from 0, constant, with an outlier in front, with a NaN; and a second, smaller image.
        x = random(generator, 3, 5, 9, 15)
        x[:, 0] += 3e3
        x[:, 1] = 7.0
        x[0, 2, 0, 0] = 1e4
        x[1, 3, 4, 4] = float("nan")
        images = [arrange(one.float(), layout).to(DEVICE) for one in (x, random(generator, 3, 2, 1, 2))]
        for image, found in zip(images, fusion.batch_statistics(images, [1e-5, 1e-3]), strict=True):
            epsilon = 1e-5 if image is images[0] else 1e-3
            plain, truth = (
                reference.batch_statistics(image.to(kind), epsilon) for kind in (torch.float32, torch.float64)
            )
            assert torch.equal(found.isnan(), truth.isnan())
            for row, name in enumerate(("mean", "inverse deviation", "variance")):
                for channel in range(image.shape[1]):
                    if not truth[row, channel].isnan():
                        assert_close(found[row, channel], plain[row, channel], truth[row, channel], f"{name} {channel}")
        fusion._moments_plan.cache_clear()

    def test_only_what_is_needed(self, generator: torch.Generator) -> None:
        from frskd_fast.kernels import fusion

        inputs = [random(generator, 1, 2, *one, dtype=torch.float32).to(DEVICE) for one in ((2, 2), (1, 1), (3, 3))]
        empty = [torch.zeros(0, device=DEVICE)] * 3
        weight = torch.rand(3, device=DEVICE)
        grad = random(generator, 1, 2, 2, 2, dtype=torch.float32).to(DEVICE)
        node = (grad, inputs, empty, empty, empty, weight, empty, [0, 1, 2], 1, 0, 1, 1e-4)
        everything, of_weight = fusion.backward(*node, [True] * 3, True)
        before = [x.clone() for x in inputs]
        for needed in ([False, True, True], [True, False, False]):
            gradients, again = fusion.backward(*node, needed, True)
            wanted = [gradient for gradient, need in zip(everything, needed, strict=True) if need]
            assert len(gradients) == len(wanted) and torch.equal(again, of_weight)
            assert all(torch.equal(left, right) for left, right in zip(gradients, wanted, strict=True))
        assert fusion.backward(*node, [True] * 3, False)[1].numel() == 0
        assert all(torch.equal(x, copy) for x, copy in zip(inputs, before, strict=True))

    def test_empty_batch(self) -> None:
        from frskd_fast.kernels import fusion

        inputs = [torch.zeros(0, 3, 4, 4, device=DEVICE), torch.zeros(0, 3, 2, 2, device=DEVICE)]
        empty = [torch.zeros(0, device=DEVICE)] * 2
        weight = torch.ones(2, device=DEVICE)
        settings = ([0, 1], 1, 0, 1, 1e-4)
        out = fusion.forward(inputs, empty, empty, empty, weight, *settings, (4, 4))
        assert out.shape == (0, 3, 4, 4)
        gradients, of_weight = fusion.backward(
            out, inputs, empty, empty, empty, weight, empty, *settings, [True] * 2, True
        )
        assert [gradient.shape for gradient in gradients] == [x.shape for x in inputs] and of_weight.tolist() == [0, 0]
        statistics = fusion.batch_statistics(inputs, [1e-5] * 2)
        assert all(row.isnan().all() for row in statistics)
        affine = [torch.ones(3, device=DEVICE)] * 2
        sums, of_weight = fusion.backward_sums(out, inputs, statistics, affine, affine, weight, *settings)
        assert all(row.eq(0).all() for row in sums) and of_weight.tolist() == [0, 0]


class TestCombine:
    __test__ = RUNS_HERE

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
