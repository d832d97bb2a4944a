"""Cross-entropies and divergence of low-resolution class maps under full-resolution masks, forward and backward.

The original upsamples both networks' maps and takes the losses of the full-size maps. A kernel that takes every exponential
once is bound by them: two for each class, pixel and network, 2 K H W N, or half of that at temperatures of 1, 2 and 4, where
exp(z) is a power of exp(z / T). At (4, 21, 128, 128) to 512 x 512 and T = 1 these are 22 million for each network, at
(4, 150, 64, 64) 157 million.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import prod

import torch.nn.functional as F
from torch import Tensor

from bench import inputs, originals
from bench.case import FLOAT_BYTES, Case, Operands, Selection

# Pascal VOC at a quarter and ADE20K at an eighth of the resolution
SHAPES = (((4, 21, 128, 128), (512, 512)), ((4, 150, 64, 64), (512, 512)))
TINY = ((2, 5, 3, 4), (6, 8))
EVERY = 8  # so many rows of pixels hold one that is ignored, as borders between objects are


def original(student_maps: Tensor, teacher_maps: Tensor, targets: Tensor) -> Tensor:
    """CE + CE + KL of the maps at the masks' size."""
    return originals.segmentation(student_maps, teacher_maps, targets)


def ours(implementation: str) -> Callable[..., Tensor]:
    """The public function, forced to one implementation."""
    from frskd_fast import functional

    def upsampled_kd_loss(student_maps: Tensor, teacher_maps: Tensor, targets: Tensor) -> Tensor:
        parts = functional.upsampled_kd_loss(
            student_maps, teacher_maps, targets, ignore_index=originals.IGNORED, impl=implementation
        )
        total: Tensor = parts.ce_student + parts.ce_teacher + parts.kd
        return total

    return upsampled_kd_loss


def operands(shape: tuple[int, ...], size: tuple[int, int]) -> Operands:
    """Random maps, float32, and masks that agree with them but for the rows that are ignored."""
    student, teacher, labels = inputs.random_logits(shape)
    targets = F.interpolate(labels[:, None].float(), size, mode="nearest")[:, 0].long()
    targets[:, ::EVERY] = originals.IGNORED
    return {"student_maps": student, "teacher_maps": teacher, "targets": targets}


def bytes_moved(shape: tuple[int, ...], size: tuple[int, int], dtype: str) -> int:
    """Both maps and the masks are read, both gradients written."""
    return 4 * prod(shape) * FLOAT_BYTES[dtype] + 8 * shape[0] * prod(size)


def cases(selection: Selection) -> list[Case]:
    """Shape x dtype x layout."""
    return [
        Case(
            suite="logit_maps",
            shape=f"{'x'.join(map(str, (selection.batch or shape[0], *shape[1:])))} to {size[0]}x{size[1]}",
            dtype=dtype,
            layout=layout,
            backward=True,
            bytes_moved=bytes_moved((selection.batch or shape[0], *shape[1:]), size, dtype),
            operands=partial(operands, (selection.batch or shape[0], *shape[1:]), size),
            tiny=partial(operands, *TINY),
            differentiated=("student_maps", "teacher_maps"),
            original=original,
            ours=ours,
        )
        for shape, size in (SHAPES[:1] if selection.quick else SHAPES)
        for dtype in selection.dtypes
        for layout in selection.layouts
    ]
