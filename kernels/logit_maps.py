"""Losses of low-resolution class maps under full-resolution labels in Triton, and their low-resolution gradients.

Nothing of K channels is ever written at full resolution: fine pixels are interpolated, scored and differentiated in
registers. The maps are first copied with the classes of a pixel beside each other, so that one form of the kernels serves
every layout and dtype. Up to 64 classes fit one tile: a single pass gives losses and gradients and takes every exponential
once. With more, one pass finds each pixel's maxima and sums (seven numbers) and a second computes the gradients by blocks of
classes, which takes every exponential twice.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from frskd_fast.reference.dtypes import accumulate_dtype
from frskd_fast.reference.logit_maps import Maps, MapSettings, WantedGradients, gradient_terms

from ._common import Geometry, Layout, geometries, launch, layout_of, power_of_two, triton_accumulate_dtype
from .logit_maps_cells import pack_kernel, total_kernel
from .logit_maps_gradients import gradient_kernel
from .logit_maps_statistics import statistics_kernel
from .logits import plain_power

# More classes than fit one tile are taken in blocks.
_MOST_CLASSES = 64
_CLASS_BLOCK = 32
# Per fine pixel, where classes are taken in blocks: three of each network, and the mean log ratio.
_STATISTICS = 7
# Every band walks one row of cells that its neighbour walks, too; this many programs are worth that.
_ENOUGH_PROGRAMS = 1024
_LEAST_BAND, _MOST_BAND = 4, 16
_STEP = 1024
# Nothing is spilled for the sake of more programs at once.
_MOST_REGISTERS = 255


class _Blocks(NamedTuple):
    """How the classes of a pixel are cut."""

    single: bool  # one tile takes all classes
    block: int  # classes in a tile
    stride: int  # classes in the packed maps, a multiple of the block


def _blocks(classes: int) -> _Blocks:
    if classes <= _MOST_CLASSES:
        block = power_of_two(classes, 4, _MOST_CLASSES)
        return _Blocks(True, block, block)
    return _Blocks(False, _CLASS_BLOCK, triton.cdiv(classes, _CLASS_BLOCK) * _CLASS_BLOCK)


def _gradient_cells(width: int, block: int) -> int:
    """Cells of a tile: a strip of CELLS walks CELLS - 1 columns of its own, and the last one may be part empty."""
    fewest = max(8, 128 // block)
    return min((fewest, 2 * fewest), key=lambda cells: (triton.cdiv(width, cells - 1) * cells, -cells))


@functools.lru_cache(maxsize=256)
def _layout(maps: tuple[Geometry, ...]) -> Layout:
    return layout_of(maps, [True] * len(maps), merge_samples=False)


class _Call:
    """The arguments that all launches of one call share."""

    def __init__(self, maps: Maps, settings: MapSettings) -> None:
        student = maps.student
        self.size = settings.height, settings.width
        self.samples, self.classes, self.height, self.width = student.shape
        self.maps, self.settings, self.device = maps, settings, student.device
        self.dtype = accumulate_dtype(student.dtype)
        self.accumulate = triton_accumulate_dtype(student.dtype)
        for low, full in zip((self.height, self.width), self.size, strict=True):
            if low * full >= 2**30:
                raise RuntimeError(
                    f"student_maps with {low} pixels along an axis are brought to {full}, but the Triton kernels take products "
                    f"of the two below {2**30}; use impl='reference'."
                )
        self.blocks = _blocks(self.classes)
        self.most = triton.cdiv(settings.width, self.width)
        self.packed = self._packed()
        # What is absent is replaced by what may stand in its place unread.
        self.targets = self.packed if maps.targets is None else maps.targets.contiguous()
        self.class_weights = self.packed if maps.class_weights is None else maps.class_weights
        self.dense = self.packed if settings.label_smoothing == 0.0 else self._dense()
        self.constants = {
            "SINGLE": self.blocks.single,
            "HAS_TEACHER": maps.teacher is not None,
            "HAS_TARGETS": maps.targets is not None,
            "HAS_WEIGHTS": maps.class_weights is not None,
            "SMOOTH": settings.label_smoothing != 0.0,
            "POWER": plain_power(settings.temperature),
            "ACCUMULATE": self.accumulate,
        }

    def empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self.dtype, device=self.device)

    def _dense(self) -> Tensor:
        """s / K * w_k of every class, 0 beyond."""
        share = self.settings.label_smoothing / self.classes
        dense = torch.zeros(self.blocks.stride, dtype=self.dtype, device=self.device)
        dense[: self.classes] = share if self.maps.class_weights is None else self.maps.class_weights * share
        return dense

    def _packed(self) -> Tensor:
        """Both maps as (N, h, w + 2, networks, stride) in the accumulate dtype.

        The columns at both ends stand there twice, so that all cells have two; what is beyond the classes stays unwritten.
        """
        networks = tuple(one for one in (self.maps.student, self.maps.teacher) if one is not None)
        packed = self.empty(self.samples, self.height, self.width + 2, len(networks), self.blocks.stride)
        layout = _layout(geometries(networks))
        tiles = triton.cdiv(self.height * self.width, 64) * triton.cdiv(self.classes, 32)
        launch(
            pack_kernel, self.samples * tiles, self.device,
            networks, packed, layout.strides, self.classes, layout.pixels, self.width, self.blocks.stride,
            NETWORKS=len(networks), FLAT=layout.flat, PIXELS=64, BLOCK=32, num_warps=4,
        )  # fmt: skip
        return packed

    def statistics(self, losses: Sequence[Tensor], sums: bool, statistics: bool) -> tuple[Tensor, Tensor]:
        """Runs the pass over blocks of classes: the statistics (7, N, H, W) and the programs' sums (4, programs)."""
        block = min(self.blocks.block, _CLASS_BLOCK)
        single = self.blocks.single and block == self.blocks.block
        pixels = power_of_two(self.most, 1, 4)
        # Sixteen elements of each of a tile's tensors in a lane, four in double precision.
        elements = 2048 if self.dtype == torch.float32 else 512
        cells = min(power_of_two(self.width + 1, 1, 64), max(elements // (pixels * block), 1))
        programs = self.samples * (self.height + 1) * triton.cdiv(self.width + 1, cells)
        found = self.empty(_STATISTICS, self.samples, *self.size) if statistics else self.packed
        partials = self.empty(4, programs) if sums else self.packed
        constants = {**self.constants, "SINGLE": single}
        launch(
            statistics_kernel, programs, self.device,
            self.packed, self.targets, self.class_weights, self.dense, tuple(losses) or (self.packed,) * 3, found, partials,
            self.samples, self.classes, self.blocks.stride, self.height, self.width, *self.size, self.most,
            *self.settings[2:], CELLS=cells, PIXELS=pixels, BLOCK=block, SUMS=sums, LOSSES=bool(losses),
            STATISTICS=statistics, num_warps=4, maxnreg=_MOST_REGISTERS, **constants,
        )  # fmt: skip
        return found, partials

    def gradients(
        self,
        outputs: Sequence[Tensor | None],  # four, as the kernel takes them
        terms: Sequence[bool],  # four: ce_student, kd (student), ce_teacher, kd (teacher)
        upstream: Sequence[Tensor],
        statistics: Tensor,
        sums: bool,
    ) -> Tensor:
        """Runs the pass that computes gradients; the programs' sums (4, programs)."""
        block = self.blocks.block
        cells = _gradient_cells(self.width, block)
        others = self.samples * triton.cdiv(self.width, cells - 1) * triton.cdiv(self.classes, block)
        band = min(max(self.height * others // _ENOUGH_PROGRAMS, _LEAST_BAND), _MOST_BAND)
        programs = others * triton.cdiv(self.height, band)
        partials = self.empty(4, programs) if sums else self.packed
        written = next(one for one in outputs if one is not None)
        # All are written by the strides of one of them.
        alike = [
            one if one is None or one.stride() == written.stride() else torch.empty_like(written) for one in outputs
        ]
        wide = _layout(geometries([written])).wide
        # Four elements of each of a tile's tensors in a lane, two in double precision.
        warps = cells * block // (128 if self.dtype == torch.float32 else 64)
        # Three programs of four warps then fit a multiprocessor instead of two. Other forms would spill.
        lean = sums and block == 32 and self.constants["POWER"] == 1 and not (self.constants["SMOOTH"] or terms[3])
        names = ("CE_STUDENT", "KD_STUDENT", "CE_TEACHER", "KD_TEACHER")
        launch(
            gradient_kernel, programs, self.device,
            self.packed, self.targets, self.class_weights, self.dense, tuple(upstream) or (self.packed,) * 3, statistics,
            tuple([written if one is None else one for one in alike]), written.stride(), partials,
            self.samples, self.classes, self.blocks.stride, self.height, self.width, *self.size, band, self.most,
            *self.settings[2:], CELLS=cells, BLOCK=block, WIDE=wide, HAS_UPSTREAM=bool(upstream), LOSSES=sums,
            num_warps=power_of_two(warps, 1, 8), maxnreg=168 if lean else _MOST_REGISTERS,
            **dict(zip(names, terms, strict=True)), **self.constants,
        )  # fmt: skip
        for one, found in zip(outputs, alike, strict=True):
            if one is not None and found is not None and found is not one:
                one.copy_(found)
        return partials


def _wanted_terms(maps: Maps, wanted: WantedGradients) -> list[bool]:
    """Which of ce_student, kd (student), ce_teacher, kd (teacher) are differentiated."""
    terms = set(gradient_terms(maps, wanted))
    return [place in terms for place in ((0, False), (2, False), (1, True), (2, True))]


def sums(maps: Maps, settings: MapSettings, wanted: WantedGradients) -> tuple[Tensor, list[Tensor]]:
    """The sums over all pixels (4,) and the gradients of `gradient_terms`.

    Three launches, for more than 64 classes four: packing, (statistics,) gradients, totals.
    """
    call = _Call(maps, settings)
    terms = _wanted_terms(maps, wanted)
    gradients = [
        torch.empty_like(
            maps.teacher if term.of_teacher and maps.teacher is not None else maps.student, dtype=call.dtype
        )
        for term in gradient_terms(maps, wanted)
    ]
    statistics = partials = call.packed
    # In double precision the losses' logarithms would crowd the gradients out of AMD's scalar registers.
    fused = call.blocks.single and any(terms) and call.dtype == torch.float32
    if not fused:
        statistics, partials = call.statistics((), True, any(terms) and not call.blocks.single)
    if any(terms):
        rest = iter(gradients)
        found = call.gradients([next(rest) if term else None for term in terms], terms, (), statistics, fused)
        partials = found if fused else partials
    totals = call.empty(4)
    launch(
        total_kernel, 4, call.device, partials, totals, partials.shape[1],
        BLOCK=_STEP, ACCUMULATE=call.accumulate, num_warps=4,
    )  # fmt: skip
    return totals, gradients


def pixels(maps: Maps, settings: MapSettings) -> tuple[Tensor, Tensor, Tensor]:
    """ce_student, ce_teacher and kd of each pixel, (N, H, W), in two launches."""
    call = _Call(maps, settings)
    losses = call.empty(3, call.samples, *call.size).unbind()
    call.statistics(losses, False, False)
    return losses


def pixels_backward(
    grads: Sequence[Tensor], maps: Maps, settings: MapSettings, wanted: WantedGradients
) -> list[Tensor]:
    """Gradients of the student's and of the teacher's maps, as wanted, in their dtype and memory format.

    Two launches, for more than 64 classes three: packing, (statistics,) gradients.
    """
    terms = _wanted_terms(maps, wanted)
    outputs: list[Any] = [None] * 4
    if wanted.student_gradient:
        outputs[0] = torch.empty_like(maps.student)
    if wanted.teacher_gradient and maps.teacher is not None:
        outputs[2] = torch.empty_like(maps.teacher)
    gradients = [one for one in outputs if one is not None]
    if not any(terms):
        return [gradient.zero_() for gradient in gradients]
    call = _Call(maps, settings)
    statistics = call.packed
    if not call.blocks.single:
        statistics, _ = call.statistics((), False, True)
    call.gradients(outputs, terms, [grad.contiguous() for grad in grads], statistics, False)
    return gradients
