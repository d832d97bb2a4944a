"""The CUDA kernels, run thread by thread on the CPU (emulation.py).

What this proves without a GPU: values and gradients, every layout and launch plan, bounds of the outputs, barriers and shuffles
that every thread reaches, and results that do not depend on the order in which the threads run between two barriers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import emulation
import problems
import pytest
import torch
from layouts import channels_last
from numerics import assert_close
from problems import Problem, _raw_fusion
from torch import Tensor

from frskd_fast import functional
from frskd_fast.losses import FRSKDLoss

# channels of the student, of the teacher, height, width: one pixel; one channel; packs of 4 and 8; half packs; no packs; more
# packs than threads; channels in packs, and with a rest.
LEVELS = [(5, 3, 1, 1), (1, 2, 3, 5), (33, 66, 4, 4), (9, 6, 6, 6), (7, 9, 5, 9), (16, 8, 48, 52), (64, 12, 8, 8)]
EVERY_SM_IDLE = "100000000"  # so many multiprocessors that one block per sample never pays: the tiled plan
MARGIN = 64  # elements around every output
UNTOUCHED = 7  # what they hold


class Guards:
    """Stands in for `torch.empty` and `torch.empty_like`: memory between margins, NaN at first."""

    def __init__(self) -> None:
        self.storages: list[Tensor] = []
        self.empty, self.empty_like = torch.empty, torch.empty_like

    def guard(self, tensor: Tensor) -> Tensor:
        size = 1 + sum((extent - 1) * step for extent, step in zip(tensor.shape, tensor.stride(), strict=True))
        storage = torch.full((2 * MARGIN + max(size, 0),), UNTOUCHED, dtype=tensor.dtype, device=tensor.device)
        self.storages.append(storage)
        view = storage.as_strided(tensor.shape, tensor.stride(), MARGIN)
        return view.fill_(float("nan")) if tensor.dtype.is_floating_point else view

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: self.guard(self.empty(*args, **kwargs)))
        monkeypatch.setattr(torch, "empty_like", lambda *args, **kwargs: self.guard(self.empty_like(*args, **kwargs)))

    def check(self) -> None:
        for storage in self.storages:
            assert bool((storage[:MARGIN] == UNTOUCHED).all()), "a kernel writes in front of its output"
            assert bool((storage[-MARGIN:] == UNTOUCHED).all()), "a kernel writes behind its output"


@pytest.fixture(scope="module")
def operations() -> Any:
    """``torch.ops`` namespace of the emulated kernels."""
    reason = emulation.problem()
    if reason is not None:
        pytest.skip(reason)
    return emulation.operators()


@pytest.fixture
def emulated(operations: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """``impl="emulation"`` runs the emulated kernels. Outputs start as NaN, and nothing may be written beside them."""
    guards = Guards()
    guards.install(monkeypatch)
    with emulation.provided():
        yield
    guards.check()


PROBLEMS = [pytest.param(*pair, id=f"{pair[0]}: {pair[1].name}") for pair in problems.of_implementation("cuda")]


def plans(operation: str) -> tuple[str, ...]:
    """Numbers of multiprocessors that lead to all plans: some depend on how many blocks the device runs at once."""
    return ("1", EVERY_SM_IDLE) if emulation.asks_for_multiprocessors(operation) else ("132",)


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize(("operation", "problem"), PROBLEMS)
def test_problems(operation: str, problem: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    """By all plans."""
    for multiprocessors in plans(operation):
        monkeypatch.setenv("EMULATION_MULTIPROCESSORS", multiprocessors)
        torch.manual_seed(0)
        problem.run(emulation.NAME, "cpu")


@pytest.mark.usefixtures("emulated")
def test_statistics_of_hard_channels_keep_their_digits() -> None:
    """All of them: one block measures all pixels, and its sums are merged in float64."""
    for found, truth in _raw_fusion.statistics_of_hard_channels(emulation.raw("fusion"), "cpu"):
        tolerance = 1e-12 if found.dtype == torch.float64 else 3e-6
        for row, allowed in ((0, tolerance), (1, 10 * tolerance), (2, 10 * tolerance)):
            torch.testing.assert_close(
                found[row].double(), truth[row], rtol=allowed, atol=0 if row else allowed, equal_nan=True
            )


@contextmanager
def _recorded(operation: str) -> Iterator[list[Tensor]]:
    """What the raw functions of an operation return."""
    raw = emulation.raw(operation)
    originals = {name: value for name, value in vars(raw).items() if getattr(value, "__module__", "") == raw.__name__}
    results: list[Tensor] = []

    def flat(value: Any) -> Iterator[Tensor]:
        if isinstance(value, Tensor):
            yield value.clone()
        elif isinstance(value, tuple | list):
            for part in value:
                yield from flat(part)

    def record(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            value = function(*arguments)
            results.extend(flat(value))
            return value

        return call

    vars(raw).update({name: record(value) for name, value in originals.items() if not name.startswith("_")})
    try:
        yield results
    finally:
        vars(raw).update(originals)


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize(
    ("operation", "problem"), PROBLEMS[::7]
)  # 7: every layout, dtype and shape of the grids is met
def test_bits_do_not_depend_on_the_order_of_the_threads(
    operation: str, problem: Problem, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A missing barrier shows as another result when the threads between two barriers run in another order."""
    for multiprocessors in plans(operation):
        monkeypatch.setenv("EMULATION_MULTIPROCESSORS", multiprocessors)
        runs = []
        for order in ("ascending", "descending", "shuffled"):
            monkeypatch.setenv("EMULATION_ORDER", order)
            torch.manual_seed(0)
            with _recorded(operation) as results:
                problem.run(emulation.NAME, "cpu")
            runs.append(results)
        assert runs[0]
        for first, second, third in zip(*runs, strict=True):
            assert torch.equal(first.nan_to_num(), second.nan_to_num())
            assert torch.equal(first.nan_to_num(), third.nan_to_num())


def _labels(kind: str, student: Tensor) -> Any:
    classes = student.shape[1]
    shape = (student.shape[0], *student.shape[2:])
    first = torch.randint(classes, shape)
    first[torch.rand(shape) < 0.2] = -100
    if kind == "labels":
        return first
    if kind == "none":
        return None
    second = torch.randint(classes, shape)
    second[torch.rand(shape) < 0.2] = -100
    return first, second, 0.3


@pytest.mark.usefixtures("emulated")
def test_more_heads_than_one_launch_holds() -> None:
    students = [torch.randn(3 + head, 2 + 40 * head) for head in range(19)]
    teachers = [torch.randn_like(student) for student in students]
    targets = [_labels("labels", student) for student in students]
    leaves = [logits.clone().requires_grad_() for logits in students + teachers]
    parts = functional.cross_entropy_kd(leaves[:19], leaves[19:], targets, detach_teacher=False, impl="emulation")
    weights = torch.randn(3, 19)
    sum((part * weight).sum() for part, weight in zip(parts, weights, strict=True)).backward()
    for head in range(19):
        pair = [students[head].clone().requires_grad_(), teachers[head].clone().requires_grad_()]
        # A list of one head is reduced by another kernel than a list of several: an empty second head keeps them alike.
        empty = torch.empty(0, 1)
        logits, nothing = ([pair[k], empty] for k in range(2)), torch.empty(0, dtype=torch.int64)
        single = functional.cross_entropy_kd(*logits, [targets[head], nothing], detach_teacher=False, impl="emulation")
        sum(part[0] * weight[head] for part, weight in zip(single, weights, strict=True)).backward()
        for part, value in zip(parts, single, strict=True):
            torch.testing.assert_close(part[head], value[0], rtol=0, atol=0)
        assert torch.equal(leaves[head].grad, pair[0].grad)
        assert torch.equal(leaves[19 + head].grad, pair[1].grad)


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("targets", ["labels", "mix", "none"])
def test_whole_objective(targets: str) -> None:
    students, teachers = (
        [channels_last(torch.randn(2, level[side], *level[2:])) for level in LEVELS] for side in range(2)
    )
    logits = [torch.randn(2, 10), torch.randn(2, 10)]
    labels = _labels(targets, logits[0])

    def run(impl: str, dtype: torch.dtype) -> list[Tensor]:
        leaves = [tensor.detach().to(dtype).requires_grad_() for tensor in [*logits, *students]]
        loss = FRSKDLoss(2.0, 100.0, 4.0, impl=impl)
        parts = loss(leaves[0], leaves[1], leaves[2:], [t.to(dtype) for t in teachers], labels, return_parts=True)
        parts.loss.backward()
        return [*parts, *(leaf.grad for leaf in leaves if leaf.grad is not None)]

    results = run("emulation", torch.float32)
    for ours, plain, truth in zip(
        results, run("reference", torch.float32), run("reference", torch.float64), strict=True
    ):
        assert_close(ours.detach(), plain.detach(), truth.detach(), str(tuple(truth.shape)))
