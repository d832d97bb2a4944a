"""Cross-entropy and T^2-scaled Kullback-Leibler divergence on rows of class logits in Triton, one launch each way.

Rows are taken as tiles of (rows, classes) whatever the memory format: a tile is long along the contiguous axis, so
lanes run along the classes of (N, K) and channels_last logits and along the pixels of NCHW maps. A row wider than its
tile is gathered by an online softmax. Everything is kept relative to the row's maximum, so an offset common to a row's
logits costs no accuracy. Notation: z logits, T temperature, p = softmax(z / T).
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from frskd_fast.reference.dtypes import accumulate_dtype
from frskd_fast.reference.logits import Heads, Saved, Settings, Upstream, Wanted, head_scales, row_count

from ._common import (
    Geometry,
    chunks,
    geometries,
    high_and_low,
    launch,
    layout_of,
    tail,
    tile_of,
    triton_accumulate_dtype,
)
from .logits_backward import gradient_kernel
from .logits_forward import count_kernel, forward_kernel

# Of each row: the log-sum-exps of student and teacher, then the same of the tempered logits.
STATISTICS = 4

# Kinds of labels.
_NONE, _INDICES, _TWO_INDICES, _PROBABILITIES = 0, 1, 2, 3

# Heads with more rows than this have their valid rows counted by a second launch, the others by their first program.
_COUNT_LIMIT = 8192
_COUNT_STEP = 1024


def _logits_tile(classes: int, pixels: int, classes_contiguous: bool, element_size: int) -> tuple[int, int]:
    """(rows, classes) of a tile. Two tiles, student and teacher, must stay in registers with their exponentials."""
    # Four warps with four pixels a lane: every sum over classes then stays inside a lane.
    most_rows = 512 if element_size <= 4 else 256
    return tile_of(classes, pixels, classes_contiguous, 1024 if classes_contiguous else 2048, 4096, most_rows)


def _num_warps(rows: int, classes: int, single: bool) -> int:
    """Warps for a tile: at most 16 elements of each of its tensors in a lane, 8 where a row takes several tiles."""
    if rows * classes <= 2048:
        return 4
    return 8 if single else 16


def plain_power(temperature: float) -> int:
    """exp(z) = exp(z / T)^T takes no exponential of its own for these temperatures; 0 for the others."""
    return int(temperature) if temperature in (1.0, 2.0, 4.0) else 0


@functools.lru_cache(maxsize=256)
def _plan(
    heads: tuple[tuple[Geometry, ...], ...],  # per head: the tensors of the launch
    channelled: tuple[bool, ...],  # which of them have a class axis
    element_size: int,  # bytes
) -> tuple[tuple[int, ...], tuple[Any, ...], dict[str, Any]]:
    """Programs of each head, arguments (strides, samples, classes, pixels, widths) and constants of a launch."""
    layouts = [layout_of(tensors, channelled, merge_samples=True) for tensors in heads]
    classes = tuple(tensors[0][0][1] for tensors in heads)
    blocks = [
        _logits_tile(width, layout.pixels, layout.channels_contiguous[0], element_size)
        for width, layout in zip(classes, layouts, strict=True)
    ]
    programs = tuple(
        layout.samples * triton.cdiv(layout.pixels, block[0]) for layout, block in zip(layouts, blocks, strict=True)
    )
    arguments = (
        tuple(layout.strides for layout in layouts),
        tuple(layout.samples for layout in layouts),
        classes,
        tuple(layout.pixels for layout in layouts),
        tuple(layout.width for layout in layouts),
    )
    single = [width <= block[1] for width, block in zip(classes, blocks, strict=True)]
    constants = {
        "HEADS": len(heads),
        "BLOCK_ROWS": tuple(block[0] for block in blocks),
        "BLOCK_CLASSES": tuple(block[1] for block in blocks),
        "SINGLE": tuple(single),
        "CLASSES_CONTIGUOUS": tuple(layout.contiguity for layout in layouts),
        "FLAT": tuple(layout.flat for layout in layouts),
        "ALIGN": tuple(layout.alignment for layout in layouts),
        "WIDE": any(layout.wide for layout in layouts),
        "num_warps": max(_num_warps(*block, whole) for block, whole in zip(blocks, single, strict=True)),
    }
    return programs, arguments, constants


def _label_kind(targets: Sequence[Tensor], targets_b: Sequence[Tensor]) -> int:
    if not targets:
        return _NONE
    if targets[0].dtype.is_floating_point:
        return _PROBABILITIES
    return _TWO_INDICES if targets_b else _INDICES


class _Launch:
    """The tensors of one launch, with absent ones replaced by what may stand in their place unread."""

    def __init__(self, heads: Heads, part: slice) -> None:
        self.students = tuple(heads.students[part])
        self.teachers = tuple(heads.teachers[part]) if heads.teachers else self.students
        self.labels = _label_kind(heads.targets, heads.targets_b)
        self.targets = tuple(heads.targets[part]) if heads.targets else self.students
        self.targets_b = tuple(heads.targets_b[part]) if heads.targets_b else self.targets
        self.channelled = (True, True, self.labels in (_NONE, _PROBABILITIES), self.labels in (_NONE, _PROBABILITIES))

    def plan(self, *gradients: Sequence[Tensor]) -> tuple[tuple[int, ...], tuple[Any, ...], dict[str, Any]]:
        """``_plan`` of the inputs and further tensors of the logits' shape."""
        columns = (self.students, self.teachers, self.targets, self.targets_b, *gradients)
        heads = tuple(zip(*[geometries(column) for column in columns], strict=True))
        return _plan(heads, self.channelled + (True,) * len(gradients), self.students[0].element_size())


def forward(heads: Heads, settings: Settings) -> Saved:
    """Losses (4, R), statistics (4, R) and 1 / valid rows of each head.

    One launch for 8 heads; labels of heads with more than 8192 rows are counted by a second, small one.
    """
    first = heads.students[0]
    device = first.device
    dtype = accumulate_dtype(first.dtype)
    accumulate = triton_accumulate_dtype(first.dtype)
    counts = [row_count(student) for student in heads.students]
    rows = sum(counts)
    losses = torch.empty((4, rows), dtype=dtype, device=device)
    statistics = torch.empty((STATISTICS, rows), dtype=dtype, device=device)
    # A head without rows has no program that could write its 0.
    allocate = torch.empty if all(counts) else torch.zeros
    inverse_valid = allocate(len(heads.students), dtype=dtype, device=device)
    begin = 0
    for part in chunks(len(heads.students)):
        here = _Launch(heads, part)
        programs, arguments, constants = here.plan()
        by_label = here.labels in (_INDICES, _TWO_INDICES)
        count_here = not by_label or max(counts[part]) <= _COUNT_LIMIT
        partials = losses if count_here else torch.empty(sum(programs), dtype=dtype, device=device)
        launch(
            forward_kernel, sum(programs), device,
            here.students, here.teachers, here.targets, here.targets_b, *arguments,
            losses[:, begin:] if begin else losses, statistics[:, begin:] if begin else statistics,
            tail(inverse_valid, part.start), partials, rows, *settings,
            HAS_TEACHER=bool(heads.teachers), LABELS=here.labels, SMOOTH=settings.label_smoothing != 0.0,
            POWER=plain_power(settings.temperature), COUNT_HERE=count_here, COUNT_BLOCK=_COUNT_STEP, ACCUMULATE=accumulate,
            **constants,
        )  # fmt: skip
        if not count_here:
            ends = tuple(itertools.accumulate(programs))
            launch(
                count_kernel, len(programs), device, partials, ends, tail(inverse_valid, part.start),
                HEADS=len(programs), BLOCK=_COUNT_STEP, ACCUMULATE=accumulate, num_warps=4,
            )  # fmt: skip
        begin += sum(counts[part])
    return Saved(losses, statistics, inverse_valid)


def backward(upstream: Upstream, heads: Heads, settings: Settings, saved: Saved, wanted: Wanted) -> list[Tensor]:
    """Gradients of the students' and of the teachers' logits, as wanted, in their dtype and memory format.

    One launch for 8 heads.
    """
    student_gradients = [torch.empty_like(student) for student in heads.students] if wanted.student else []
    teacher_gradients = [torch.empty_like(teacher) for teacher in heads.teachers] if wanted.teacher else []
    if not (wanted.student or wanted.teacher):
        return []
    first = heads.students[0]
    grads = [grad.reshape(-1) for grad in upstream.grads]
    head_stride, row_stride = upstream.head_stride, upstream.row_stride
    scales = head_scales(upstream, heads.students)
    has_ce_student, has_ce_teacher, has_kd = (any(scales[term::3]) for term in range(3))
    steps = [grad.stride(0) for grad in grads]
    statistics, losses = saved.statistics, saved.losses
    begin = 0
    for part in chunks(len(heads.students)):
        here = _Launch(heads, part)
        # Where one side needs no gradient, the other's stands in its place unwritten.
        student_part = tuple((student_gradients or teacher_gradients)[part])
        teacher_part = tuple((teacher_gradients or student_gradients)[part])
        programs, arguments, constants = here.plan(student_part, teacher_part)
        launch(
            gradient_kernel, sum(programs), first.device,
            here.students, here.teachers, here.targets, here.targets_b, student_part, teacher_part, *arguments,
            statistics[:, begin:] if begin else statistics, losses[:, begin:] if begin else losses,
            tuple([tail(grad, part.start * head_stride + begin * row_stride) for grad in grads]),
            tuple([head_stride * step for step in steps]), tuple([row_stride * step for step in steps]),
            tuple(
                [
                    tuple([high_and_low(scale) for scale in scales[3 * head : 3 * head + 3]])
                    for head in range(part.start, part.stop)
                ]
            ),
            tail(saved.inverse_valid, part.start), statistics.shape[1], *settings,
            LABELS=here.labels, SMOOTH=settings.label_smoothing != 0.0,
            POWER=plain_power(settings.temperature), HAS_INVERSE_VALID=upstream.mean,
            NEED_STUDENT=wanted.student, NEED_TEACHER=wanted.teacher,
            CE_STUDENT=wanted.student and has_ce_student, CE_TEACHER=wanted.teacher and has_ce_teacher,
            KD_STUDENT=wanted.student and has_kd,
            KD_TEACHER=wanted.teacher and has_kd and wanted.kd_to_teacher,
            ACCUMULATE=triton_accumulate_dtype(first.dtype), **constants,
        )  # fmt: skip
        begin += sum(map(row_count, here.students))
    return student_gradients + teacher_gradients
