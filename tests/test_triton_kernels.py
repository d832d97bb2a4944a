"""The raw Triton functions against plain formulas in float64.

With a GPU the kernels run on it. Without one they run in Triton's interpreter, which must be switched on before Triton
is first imported: conftest.py does so.
"""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import os
import pkgutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import problems
import pytest
import torch
from layouts import LAYOUTS
from numerics import assert_close
from problems import _raw_fusion
from problems.attention import Transfer
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


@pytest.mark.parametrize(
    "problem",
    [
        pytest.param(problem, id=f"{operation}: {problem.name}")
        for operation, problem in problems.of_implementation("triton", 24 if INTERPRETED else None)
    ],
)
def test_problems(problem: problems.Problem) -> None:
    torch.manual_seed(0)
    problem.run("triton", DEVICE)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_attention_with_64_bit_offsets(wide_layouts: None, layout: str) -> None:
    Transfer(layout=layout, levels=((3, 5, 5, 4),)).run("triton", DEVICE)


def test_attention_refuses_integers() -> None:
    from frskd_fast.kernels import attention

    feature = torch.zeros(1, 1, 2, 2, dtype=torch.int32, device=DEVICE)
    with pytest.raises(TypeError, match="int32"):
        attention.forward([feature], [feature], 2.0, False, False)


class TestLogits:
    """What the problems of `logits` do not reach: launches of few rows and wide layouts."""

    def run(self, name: str) -> None:
        (problem,) = (problem for problem in problems.problems("logits") if problem.name == name)
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


class TestLogitMaps:
    """What the problems of `logit_maps` do not reach: wide layouts, and maps of two layouts."""

    @pytest.mark.usefixtures("wide_layouts")
    def test_64_bit_offsets(self) -> None:
        self.solve("channels_last", "channels_last")

    def test_maps_of_two_layouts(self) -> None:
        self.solve("contiguous", "channels_last")

    def solve(self, *layouts: str) -> None:
        from frskd_fast import functional

        given = [LAYOUTS[layout](torch.randn(2, 3, 2, 9, dtype=torch.float64)).to(DEVICE) for layout in layouts]
        targets = torch.randint(3, (2, 4, 20), device=DEVICE)

        def run(impl: str) -> list[Tensor]:
            maps = [one.detach().requires_grad_() for one in given]
            parts = functional.upsampled_kd_loss(*maps, targets, impl=impl)
            return [*parts, *torch.autograd.grad(parts.ce_student + 2 * parts.ce_teacher + 3 * parts.kd, maps)]

        for ours, theirs in zip(run("triton"), run("reference"), strict=True):
            torch.testing.assert_close(ours, theirs)


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

    @pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
    def test_statistics(self, layout: str, monkeypatch: pytest.MonkeyPatch, generator: torch.Generator) -> None:
        from frskd_fast.kernels import _fusion, fusion

        from frskd_fast.reference import fusion as reference

        monkeypatch.setattr(_fusion, "_ENOUGH_PROGRAMS", 1)
        forget_plans()
        # Channels far from 0, constant, with an outlier in front, with a NaN; and a second, smaller image.
        x = random(generator, 3, 5, 9, 15)
        x[:, 0] += 3e3
        x[:, 1] = 7.0
        x[0, 2, 0, 0] = 1e4
        x[1, 3, 4, 4] = float("nan")
        images = [LAYOUTS[layout](one.float()).to(DEVICE) for one in (x, random(generator, 3, 2, 1, 2))]
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
        forget_plans()

    @pytest.mark.usefixtures("wide_layouts")
    def test_64_bit_offsets(self) -> None:
        inputs = (("none", 2, 3), ("up", 1, 2), ("pool", 3, 5))
        self.solve(_raw_fusion.Case(2, (2, 3), inputs, normalised=(1, 2)), "contiguous")

    def solve(self, case: _raw_fusion.Case, layout: str) -> None:
        tensors = _raw_fusion.make(case, [layout] * 4, torch.float32, DEVICE)
        _raw_fusion.three_way(layout, _dispatch.raw("fusion", "triton"), case, tensors)
