"""Problems of the operation `logits`: layouts, labels, dtypes, reductions, heads, and rows at the edge of arithmetic."""

from __future__ import annotations

import itertools
import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from layouts import LAYOUTS
from numerics import assert_close
from torch import Tensor

import frskd_fast
from frskd_fast import _dispatch, functional
from problems._logits_entry_points import ENTRY_POINTS as ENTRY_POINTS
from problems._memory import poisoned_memory

IGNORED = -100
MIX = 0.3
SECOND_LABELS = "two labels"

Shape = tuple[int, ...]


class Operands(NamedTuple):
    """The tensors of a call, a list with one entry for each head."""

    students: list[Tensor]
    teachers: list[Tensor]  # or empty
    targets: list[Any]  # or empty; pairs where there are two labels

    def logits(self) -> list[Tensor]:
        return [*self.students, *self.teachers]


def _cross_entropy(logits: Tensor, target: Any, smoothing: float) -> tuple[Tensor, Tensor]:
    """Rows of -sum_k t_k log softmax(z)_k and of their weights in a mean; t is smoothed, NaN for a label that is no class."""
    classes = logits.shape[1]
    log_probability = torch.log_softmax(logits, 1)

    def rows(distribution: Tensor) -> Tensor:
        smoothed = (1.0 - smoothing) * distribution + smoothing / classes
        return -(smoothed * log_probability.masked_fill(smoothed == 0, 0.0)).sum(1)

    if isinstance(target, Tensor) and target.is_floating_point():
        loss = rows(target.to(logits.dtype))
        return loss, torch.ones_like(loss)
    loss, weight = torch.zeros_like(logits[:, 0]), torch.zeros_like(logits[:, 0])
    pairs = [(target, 1.0)] if isinstance(target, Tensor) else [(target[0], MIX), (target[1], 1.0 - MIX)]
    for labels, share in pairs:
        known = (labels >= 0) & (labels < classes)
        one_hot = torch.nn.functional.one_hot(labels.where(known, 0), classes).movedim(-1, 1).to(logits.dtype)
        part = torch.full_like(loss, share).masked_fill(~known, math.nan).masked_fill(labels == IGNORED, 0.0)
        loss = loss + torch.where(labels == IGNORED, 0.0, part * rows(one_hot))
        weight = weight + part
    return loss, weight


def _divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Rows of T^2 * sum_k p_t (log p_t - log p_s), where a class that the teacher excludes counts 0."""
    log_student, log_teacher = (torch.log_softmax(logits / temperature, 1) for logits in (student, teacher))
    probability = log_teacher.exp()
    ratio = (log_teacher - log_student).masked_fill(probability == 0, 0.0)
    return temperature**2 * (probability * ratio).sum(1)


@dataclass(frozen=True)
class LogitsProblem:
    """Losses and gradients of one call against plain formulas in float64."""

    name: str
    shapes: tuple[Shape, ...]  # of each head's logits
    kind: str = "labels"  # "none", "probabilities" or `SECOND_LABELS`
    dtype: torch.dtype = torch.float32
    student_layout: str = "contiguous"
    teacher_layout: str = "contiguous"
    target_layout: str = "contiguous"
    temperature: float = 4.0
    smoothing: float = 0.0
    reduction: str = "none"
    with_teacher: bool = True
    detach_teacher: bool = False
    differentiated: tuple[bool, bool] = (True, True)  # the student's logits, the teacher's
    change: Callable[[Operands], None] | None = None  # in place, before the layout
    may_refuse: bool = False  # on the CPU, in a sentence about a label
    arranged: Callable[[Operands], Operands] | None = (
        None  # heads that are views of these tensors, in the place of theirs
    )
    gradient_scale: float = 0.0  # of the terms that cancel where the gradient is 0

    def operands(self, device: str) -> Operands:
        """The tensors; the same ones on every device."""
        generator = torch.Generator().manual_seed(zlib.crc32(self.name.encode()))

        def normal(shape: Shape) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        def labels(shape: Shape) -> Tensor:
            drawn = torch.randint(shape[1], (shape[0], *shape[2:]), generator=generator)
            return torch.where(torch.rand(drawn.shape, generator=generator) < 0.25, IGNORED, drawn)

        students = [(3 * normal(shape)).to(self.dtype) for shape in self.shapes]
        teachers = [(3 * normal(shape)).to(self.dtype) for shape in self.shapes] if self.with_teacher else []
        targets: list[Any] = []
        if self.kind == "probabilities":
            targets = [normal(shape).softmax(1).to(_accumulate(self.dtype)) for shape in self.shapes]
        elif self.kind != "none":
            targets = [labels(shape) for shape in self.shapes]
        if self.kind == SECOND_LABELS:
            targets = [(first, labels(shape)) for first, shape in zip(targets, self.shapes, strict=True)]
        operands = Operands(students, teachers, targets)
        if self.change is not None:
            self.change(operands)

        def moved(target: Any) -> Any:
            if isinstance(target, tuple):
                return tuple(map(moved, target))
            return LAYOUTS[self.target_layout](target.to(device))

        students = [LAYOUTS[self.student_layout](student.to(device)) for student in students]
        teachers = [LAYOUTS[self.teacher_layout](teacher.to(device)) for teacher in teachers]
        targets = [moved(target) for target in targets]
        operands = Operands(students, teachers, targets)
        return operands if self.arranged is None else self.arranged(operands)

    def _ours(self, operands: Operands, implementation: str) -> list[Tensor]:
        several = len(operands.students) > 1
        targets: Any = None
        if self.kind == SECOND_LABELS:
            targets = (*operands.targets[0], MIX)  # the same for every head
        elif operands.targets:
            targets = operands.targets if several else operands.targets[0]
        students: Any = operands.students if several else operands.students[0]
        teachers: Any = operands.teachers if several else (operands.teachers or [None])[0]
        parts = functional.cross_entropy_kd(
            students, teachers, targets, temperature=self.temperature, label_smoothing=self.smoothing,
            ignore_index=IGNORED, reduction=self.reduction, detach_teacher=self.detach_teacher, impl=implementation,
        )  # fmt: skip
        return [torch.cat([row.flatten() for row in part]) if isinstance(part, list) else part for part in parts]

    def _plain(self, operands: Operands) -> list[Tensor]:
        columns: list[list[Tensor]] = [[], [], []]
        for head, student in enumerate(operands.students):
            teacher = operands.teachers[head] if operands.teachers else None
            target = operands.targets[head] if operands.targets else None
            nothing = torch.zeros_like(student[:, 0])
            rows, weight = [nothing, nothing, nothing], torch.ones_like(nothing)
            if target is not None:
                rows[0], weight = _cross_entropy(student, target, self.smoothing)
            if target is not None and teacher is not None:
                rows[1], _ = _cross_entropy(teacher, target, self.smoothing)
            if teacher is not None:
                fixed = teacher.detach() if self.detach_teacher else teacher
                rows[2] = _divergence(student, fixed, self.temperature)
            valid = weight.sum()
            divisors = (valid.where(valid != 0, 1.0), valid.where(valid != 0, 1.0), max(nothing.numel(), 1))
            for column, row, divisor in zip(columns, rows, divisors, strict=True):
                reduced = row.sum() if self.reduction != "none" else row
                column.append(reduced / divisor if self.reduction == "batchmean" else reduced)
        if len(operands.students) == 1:
            return [column[0] for column in columns]
        return [torch.cat([piece.flatten() for piece in column]) for column in columns]

    def _differentiate(
        self, function: Callable[[Operands], list[Tensor]], operands: Operands, dtype: torch.dtype, grads: list[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Results, and the gradients of the differentiated logits, with those of the results drawn once into ``grads``."""
        wanted = [self.differentiated[0]] * len(operands.students)
        wanted += [self.differentiated[1]] * len(operands.teachers)
        leaves = [
            (logits if logits.dtype == dtype else logits.to(dtype)).detach().requires_grad_(want)
            for logits, want in zip(operands.logits(), wanted, strict=True)
        ]
        heads = len(operands.students)
        results = function(Operands(leaves[:heads], leaves[heads:], operands.targets))
        if not grads:
            generator = torch.Generator().manual_seed(1)
            grads += [torch.randn(result.shape, generator=generator).to(result.device) for result in results]
        pairs = [
            (result, grad.to(result.dtype)) for result, grad in zip(results, grads, strict=True) if result.requires_grad
        ]
        differentiated = [leaf for leaf in leaves if leaf.requires_grad]
        gradients = torch.autograd.grad(
            [result for result, _ in pairs], differentiated, [grad for _, grad in pairs], allow_unused=True
        )
        pieces = zip(gradients, differentiated, strict=True)
        found = [torch.zeros_like(leaf) if gradient is None else gradient for gradient, leaf in pieces]
        return [result.detach() for result in results], found

    def run(self, implementation: str, device: str) -> None:
        """Raise an AssertionError where ``implementation`` gets it wrong on ``device``."""
        operands = self.operands(device)
        before = [logits.clone() for logits in operands.logits()]
        grads: list[Tensor] = []
        try:
            with poisoned_memory():
                results, gradients = self._differentiate(
                    lambda given: self._ours(given, implementation), operands, self.dtype, grads
                )
        except ValueError as error:
            # The CPU names a wrong label; on a device, where that would synchronise, its row is NaN.
            if not (self.may_refuse and device == "cpu"):
                raise
            assert "holds the label" in str(error) and str(error).endswith(" was wanted.")
            return
        assert frskd_fast.last_impl()["logits"] == implementation
        accumulate = _accumulate(self.dtype)
        plain, plain_gradients = self._differentiate(self._plain, operands, accumulate, grads)
        truth, true_gradients = self._differentiate(self._plain, operands, torch.float64, grads)
        for index, result in enumerate(results):
            assert result.dtype == accumulate
            _compare(result, plain[index], truth[index], f"{self.name}: loss {index}")
        for index, gradient in enumerate(gradients):
            assert gradient.dtype == self.dtype
            rounded = plain_gradients[index].to(self.dtype)
            label = f"{self.name}: gradient {index}"
            _compare(gradient, rounded, true_gradients[index], label, self.gradient_scale)
        differentiated = [
            *(operands.students if self.differentiated[0] else ()),
            *(operands.teachers if self.differentiated[1] else ()),
        ]
        for gradient, logits in zip(gradients, differentiated, strict=True):
            if _dispatch.is_plain(implementation):
                break  # PyTorch's own gradients
            assert gradient.stride() == torch.empty_like(logits).stride(), f"{self.name}: the gradient's memory format"
        for logits, copy in zip(operands.logits(), before, strict=True):
            assert torch.equal(logits.nan_to_num(), copy.nan_to_num()), f"{self.name}: an input was written to"


def _accumulate(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _compare(ours: Tensor, plain: Tensor, truth: Tensor, label: str, scale: float = 0.0) -> None:
    nan = truth.isnan()
    assert torch.equal(ours.isnan(), nan), f"{label}: NaN in other places than in float64"
    assert_close(*(values.masked_fill(nan, 0.0) for values in (ours, plain, truth)), label, scale)


KINDS = ("labels", SECOND_LABELS, "probabilities", "none")
DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.float16)
# Temperature and smoothing: every way to take the exponentials, with and without smoothing.
SETTINGS = ((4.0, 0.0), (1.0, 0.1), (2.0, 0.0), (0.7, 0.1), (10.0, 0.0), (1.0, 0.0))
# Shape, layouts of student, teacher and targets.
GEOMETRIES: dict[str, tuple[Shape, str, str, str]] = {
    "one class": ((3, 1), "contiguous", "contiguous", "contiguous"),
    "three classes": ((5, 3), "contiguous", "contiguous", "contiguous"),
    "eight classes": ((4, 8), "contiguous", "contiguous", "contiguous"),
    "few classes": ((37, 10), "contiguous", "contiguous", "contiguous"),
    "a warp": ((11, 100), "contiguous", "contiguous", "contiguous"),
    "odd classes": ((3, 1003), "contiguous", "contiguous", "contiguous"),
    "a tile and a bit": ((2, 1100), "contiguous", "contiguous", "contiguous"),
    "packs": ((3, 2064), "contiguous", "contiguous", "contiguous"),
    "a vocabulary": ((2, 50257), "contiguous", "contiguous", "contiguous"),
    "strided rows": ((6, 21), "strided", "strided", "strided"),
    "transposed rows": ((70, 19), "batch_last", "contiguous", "contiguous"),
    "an expanded teacher": ((6, 9), "contiguous", "expanded", "expanded"),
    "a sequence": ((3, 6, 40), "contiguous", "contiguous", "contiguous"),
    "a channels_last sequence": ((2, 7, 5), "channels_last", "contiguous", "contiguous"),
    "a small map": ((2, 5, 3, 7), "contiguous", "contiguous", "contiguous"),
    "a map": ((2, 21, 9, 17), "contiguous", "contiguous", "contiguous"),
    "a channels_last map": ((2, 24, 5, 7), "channels_last", "channels_last", "contiguous"),
    "a strided map": ((2, 6, 5, 8), "strided", "strided", "strided"),
    "a map with the batch last": ((5, 6, 2, 3), "batch_last", "batch_last", "contiguous"),
    "mixed layouts": ((2, 5, 3, 4), "contiguous", "channels_last", "batch_last"),
}


def _grid() -> Iterator[LogitsProblem]:
    """Every geometry with every kind of labels; dtypes and settings take turns, so that all pairs of them occur."""
    turn = itertools.count()
    for place, (geometry, (shape, student, teacher, target)) in enumerate(GEOMETRIES.items()):
        for offset, kind in enumerate(KINDS):
            for dtype in (DTYPES[(place + offset) % 4], DTYPES[(place + offset + 2) % 4]):
                temperature, smoothing = SETTINGS[next(turn) * 5 % len(SETTINGS)]
                name = f"{geometry}, {kind}, {dtype}, T={temperature}, smoothing={smoothing}"
                yield LogitsProblem(
                    name, (shape,), kind, dtype, student, teacher, target, temperature, smoothing,
                    reduction=("none", "none", "batchmean", "sum")[(place + offset) % 4],
                    detach_teacher=offset == place % 4, gradient_scale=float(shape[1] == 1),
                )  # fmt: skip


def _mask(operands: Operands, classes: slice, student: float, teacher: float) -> None:
    operands.students[0][:, classes] = student
    operands.teachers[0][:, classes] = teacher


def _label_everywhere(operands: Operands, label: int) -> None:
    for target in operands.targets:
        target.fill_(label)


def _masked(classes: slice, label: int, student: float = -math.inf, teacher: float = -math.inf) -> Callable[..., None]:
    def change(operands: Operands) -> None:
        _mask(operands, classes, student, teacher)
        if operands.targets:
            _label_everywhere(operands, label)

    return change


def _offsets(operands: Operands) -> None:
    """An offset common to a row changes nothing, but in a log-sum-exp it leaves no digits for the differences."""
    student, teacher = operands.students[0], operands.teachers[0]
    shape = (4, *([1] * (student.dim() - 1)))
    student += torch.tensor([3e4, -3e4, 0.0, 3e4], dtype=student.dtype).view(shape)
    teacher += torch.tensor([-3e4, 3e4, 2e4, 3e4], dtype=teacher.dtype).view(shape)
    # A few classes decide, however many there are.
    student[:, -3:] += 10
    teacher[:, -3:] += 10


def _ties(operands: Operands) -> None:
    for logits in operands.logits():
        logits.mul_(0.003)


def _wrong_labels(operands: Operands) -> None:
    labels = operands.targets[0].view(-1)
    labels[:3] = torch.tensor([operands.students[0].shape[1], -5, 2**62])
    labels[3:] = 0


def _nan(operands: Operands) -> None:
    operands.students[0][1, -1] = math.nan


def _one_hot_probabilities(operands: Operands) -> None:
    operands.targets[0][2] = 0.0
    operands.targets[0][2, 3] = 1.0


def _maxima_apart(operands: Operands) -> None:
    operands.students[0][0, -1], operands.teachers[0][0, 3] = 22.0, 24.0


def _exchanged(operands: Operands) -> Operands:
    """As many heads again, on the same tensors with student and teacher exchanged."""
    students, teachers, targets = operands
    return Operands(students + teachers, teachers + students, targets * 2)


def _exchanged_parts(cut: tuple[slice, ...], part_first: bool) -> Callable[[Operands], Operands]:
    """A second head on a part of the same tensors, student and teacher exchanged: same address, same strides, fewer numbers."""

    def arrange(operands: Operands) -> Operands:
        (student,), (teacher,), targets = operands
        heads = [(student, teacher, targets), (teacher[cut], student[cut], [target[cut[:1]] for target in targets])]
        students, teachers, labels = zip(*(heads[::-1] if part_first else heads), strict=True)
        return Operands(list(students), list(teachers), [label for of_head in labels for label in of_head])

    return arrange


_HEADS: tuple[Shape, ...] = ((4, 5), (2, 3, 2, 2), (16, 20), (1, 1), (3, 2))
_MANY_HEADS = tuple((2 + head % 2, 2 + 40 * head) for head in range(19))  # more than one launch holds
# Heads of so many rows count their labels in launches of their own; a small one beside them does not.
_MANY_ROWS: tuple[Shape, ...] = ((3, 3, 40, 41), (5, 3))


def _special() -> Iterator[LogitsProblem]:
    make = LogitsProblem
    for shape in ((11, 100), (5, 1003)):
        yield make(f"wrong labels, {shape}", (shape,), with_teacher=False, change=_wrong_labels, may_refuse=True)
    for shape in ((7, 11), (2, 6, 3, 5)):
        where = "rows" if len(shape) == 2 else "a map"
        yield make(f"the student alone, {where}", (shape,), with_teacher=False, smoothing=0.1)
        yield make(f"the student's gradient alone, {where}", (shape,), differentiated=(True, False))
        yield make(f"the teacher's gradient alone, {where}", (shape,), differentiated=(False, True))
        yield make(f"all labels ignored, {where}", (shape,), smoothing=0.1, reduction="batchmean",
                   change=lambda given: _label_everywhere(given, IGNORED))  # fmt: skip
        yield make(f"wrong labels, {where}", (shape,), with_teacher=False, change=_wrong_labels, may_refuse=True)
        yield make(f"NaN, {where}", (shape,), change=_nan)
        for reduction in ("none", "batchmean"):
            yield make(f"masked classes, {where}, {reduction}", (shape,), temperature=3.0, reduction=reduction,
                       change=_masked(slice(2, 4), 1))  # fmt: skip
        yield make(f"a class that the teacher excludes, {where}", (shape,), kind="none", detach_teacher=True,
                   change=lambda given: given.teachers[0][:, 4].fill_(-math.inf))  # fmt: skip
    yield make("NaN, several tiles", ((3, 2000),), change=_nan)
    yield make("probabilities of 0 and 1", ((7, 11),), "probabilities", change=_one_hot_probabilities)
    for count in (1000, 1024, 4096):
        yield make(f"{count} masked classes first", ((2, 5000),), temperature=3.0,
                   change=_masked(slice(0, count), 4500))  # fmt: skip
        yield make(f"{count} classes masked by the student, of no weight to the teacher", ((2, 5000),), kind="none",
                   detach_teacher=True, differentiated=(True, False),
                   change=_masked(slice(0, count), 4500, teacher=-1e9))  # fmt: skip
    yield make("maxima in different tiles", ((2, 5000),), smoothing=0.1, temperature=3.0, change=_maxima_apart)
    for dtype, shape, temperature in (
        (torch.float16, (4, 9), 4.0),
        (torch.float32, (4, 9), 10.0),
        (torch.float32, (4, 9), 0.5),
        (torch.float32, (4, 4500), 4.0),
        (torch.float16, (4, 21, 4, 5), 4.0),
    ):
        yield make(f"large offsets, {shape}, {dtype}, T={temperature}", (shape,), dtype=dtype,
                   temperature=temperature, change=_offsets)  # fmt: skip
    yield make("tied classes at a low temperature", ((3, 13),), temperature=0.02, change=_ties)
    for shape in ((0, 4), (0, 4, 3, 3), (2, 4, 0, 3)):
        yield make(f"no rows, {shape}", (shape,), reduction="batchmean")
    for reduction in ("none", "batchmean", "sum"):
        yield make(f"heads of different sizes, {reduction}", _HEADS, reduction=reduction, detach_teacher=True)
    for reduction in ("none", "batchmean"):
        yield make(f"19 heads, {reduction}", _MANY_HEADS, reduction=reduction)
    for kind, dtype, smoothing, differentiated in (
        ("labels", torch.float32, 0.0, (True, False)),
        ("labels", torch.float32, 0.0, (True, True)),
        ("labels", torch.bfloat16, 0.1, (True, False)),
        (SECOND_LABELS, torch.float64, 0.0, (True, False)),
        ("none", torch.float16, 0.0, (True, False)),
        ("probabilities", torch.float32, 0.0, (True, False)),
    ):
        # Second labels are the same in all heads, which then have to be of one size.
        shapes = ((6, 43),) if kind == SECOND_LABELS else ((6, 10), (6, 43))
        yield make(f"exchanged heads, {kind}, {dtype}, {smoothing}, {differentiated}", shapes, kind, dtype,
                   smoothing=smoothing, temperature=3.0, reduction="none" if len(shapes) == 1 else "batchmean",
                   detach_teacher=True, differentiated=differentiated, arranged=_exchanged)  # fmt: skip
    everything = slice(None)
    for part, shape, kind, cut in (
        ("rows", (8, 10), "labels", (slice(4),)),
        ("classes", (8, 10), "none", (everything, slice(5))),
        ("pixels", (8, 10, 1, 2), "none", (everything, everything, everything, slice(1))),
    ):
        for part_first in (False, True):
            order = "first" if part_first else "last"
            yield make(f"exchanged heads, some {part} alone {order}", (shape,), kind, reduction="none",
                       temperature=3.0, detach_teacher=True, differentiated=(True, False),
                       arranged=_exchanged_parts(cut, part_first))  # fmt: skip
    for where, change in (
        ("maxima apart", _maxima_apart),
        ("the first masked", _masked(slice(0, 1024), 4500)),
        ("some masked", _masked(slice(3000, 3100), 4500)),
    ):
        yield make(f"exchanged heads in tiles, {where}", ((2, 5000), (2, 5000)), temperature=3.0,
                   detach_teacher=True, differentiated=(True, False), arranged=_exchanged, change=change)  # fmt: skip
    for kind in ("labels", "probabilities", "none"):
        yield make(f"means of many rows, {kind}", _MANY_ROWS, kind, reduction="batchmean", detach_teacher=True)
    for kind in ("labels", SECOND_LABELS):
        yield make(f"means of 9001 rows, {kind}", ((9001, 3),), kind, reduction="batchmean")


GRID: Sequence[LogitsProblem] = tuple(_grid())
PROBLEMS: Sequence[LogitsProblem] = (*GRID, *_special())


def _launch(
    shape: Shape,
    dtype: torch.dtype,
    kind: str,
    temperature: float = 4.0,
    smoothing: float = 0.0,
    channels_last: bool = False,
    kd_to_teacher: bool = False,
    device: str = "cpu",
) -> None:
    """Both raw Triton functions on tensors without values."""
    from frskd_fast.kernels import logits

    from frskd_fast.reference.logits import Heads, Settings, Upstream, Wanted

    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    student = torch.empty(shape, dtype=dtype, device=device, memory_format=memory_format)
    targets = [torch.empty((shape[0], *shape[2:]), dtype=torch.int64, device=device)]
    if kind == "probabilities":
        targets = [torch.empty(shape, dtype=_accumulate(dtype), device=device)]
    has_targets = kind != "none"
    heads = Heads([student], [student], targets if has_targets else [], targets if kind == SECOND_LABELS else [])
    settings = Settings(MIX, smoothing, IGNORED, temperature)
    saved = logits.forward(heads, settings)
    grads = [torch.empty((), dtype=_accumulate(dtype), device=device).expand(saved.losses.shape[1])] * 3
    upstream = Upstream(grads, 0, 1, [float(has_targets), float(has_targets), 2.0], True)
    logits.backward(upstream, heads, settings, saved, Wanted(True, True, kd_to_teacher))


COMPILED: dict[str, Callable[[], None]] = {
    "128x100 float32": lambda: _launch((128, 100), torch.float32, "labels"),
    "128x100 bfloat16, two labels": lambda: _launch((128, 100), torch.bfloat16, SECOND_LABELS, smoothing=0.1),
    "128x100 T=10, probabilities": lambda: _launch((128, 100), torch.float32, "probabilities", 10.0, 0.1),
    "64x1000 to both sides": lambda: _launch((64, 1000), torch.float32, "labels", 10.0, kd_to_teacher=True),
    "16x4096, the largest single tile": lambda: _launch((16, 4096), torch.bfloat16, "none", 3.0),
    "16x50257, tiles": lambda: _launch((16, 50257), torch.bfloat16, "labels", 3.0, kd_to_teacher=True),
    "maps float32": lambda: _launch((2, 21, 65, 65), torch.float32, "labels", 1.0),
    "maps bfloat16": lambda: _launch((2, 150, 64, 64), torch.bfloat16, "labels", 3.0),
    "maps channels_last": lambda: _launch((2, 21, 65, 65), torch.float32, "labels", 4.0, channels_last=True),
    "maps float64": lambda: _launch((2, 21, 64, 64), torch.float64, "labels", 4.0),
    "maps, 64-bit offsets": lambda: _launch((16, 150, 1024, 1024), torch.bfloat16, "labels", device="meta"),
}
