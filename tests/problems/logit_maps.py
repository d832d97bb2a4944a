"""Problems of the operation ``logit_maps``: losses of interpolated class maps, by every implementation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from layouts import LAYOUTS
from numerics import assert_close
from torch import Tensor

from frskd_fast import functional
from problems._logit_maps_compiled import COMPILED as COMPILED
from problems._logit_maps_entry_points import ENTRY_POINTS as ENTRY_POINTS
from problems._memory import poisoned_memory

IGNORED = 255
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def plain_losses(
    student: Tensor, teacher: Tensor | None, labels: Tensor | None, size: tuple[int, int], options: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor]:
    """The three terms as a training script writes them, on maps of full size."""
    z_s = F.interpolate(student, size, mode="bilinear", align_corners=False)
    z_t = None if teacher is None else F.interpolate(teacher, size, mode="bilinear", align_corners=False)
    reduction, temperature, weights = options["reduction"], options["temperature"], options["class_weights"]
    none = z_s.new_zeros(z_s.shape[0], *size) if reduction == "none" else z_s.new_zeros(())

    def cross_entropy(z: Tensor) -> Tensor:
        rule = {"ignore_index": IGNORED, "label_smoothing": options["label_smoothing"], "weight": weights}
        assert labels is not None
        if reduction != "mean":
            return F.cross_entropy(z, labels, reduction=reduction, **rule)
        valid = labels[labels != IGNORED]
        count = valid.numel() if weights is None else weights[valid].sum()
        return F.cross_entropy(z, labels, reduction="sum", **rule) / max(count, 1e-30)

    ce_student = none if labels is None else cross_entropy(z_s)
    ce_teacher = none if labels is None or z_t is None else cross_entropy(z_t)
    kd = none
    if z_t is not None:
        target = F.log_softmax((z_t.detach() if options["detach_teacher"] else z_t) / temperature, 1)
        kd = temperature**2 * F.kl_div(
            F.log_softmax(z_s / temperature, 1), target, reduction="none", log_target=True
        ).sum(1)
        kd = kd if reduction == "none" else kd.sum() if reduction == "sum" else kd.mean()
    return ce_student, ce_teacher, kd


@dataclass(frozen=True)
class Segmentation:
    """The three losses and the gradients of both networks' maps."""

    maps: tuple[int, int, int, int]  # (N, K, h, w)
    size: tuple[int, int]
    dtype: str = "float32"
    layout: str = "contiguous"
    reduction: str = "mean"
    temperature: float = 1.0
    label_smoothing: float = 0.0
    weighted: bool = False
    detach_teacher: bool = True
    teacher: bool = True
    labels: str = "some ignored"  # or "all ignored", "none"
    wanted: str = "both"  # gradients: or "student", "teacher"

    @property
    def name(self) -> str:
        shape = "x".join(map(str, self.maps))
        parts = [f"{shape} to {self.size[0]}x{self.size[1]}, {self.dtype}, {self.layout}, {self.reduction}"]
        parts += [f"T={self.temperature:g}"] if self.temperature != 1.0 else []
        parts += [f"smoothing {self.label_smoothing}"] if self.label_smoothing else []
        parts += ["class weights"] if self.weighted else []
        parts += ["teacher learns"] if not self.detach_teacher else []
        parts += ["no teacher"] if not self.teacher else []
        parts += [f"labels {self.labels}"] if self.labels != "some ignored" else []
        parts += [f"gradient of the {self.wanted}"] if self.wanted != "both" else []
        return ", ".join(parts)

    def _labels(self, generator: torch.Generator) -> Tensor | None:
        if self.labels == "none":
            return None
        shape = (self.maps[0], *self.size)
        labels = torch.randint(self.maps[1], shape, generator=generator)
        ignored = torch.rand(shape, generator=generator) < (0.2 if self.labels == "some ignored" else 2.0)
        return labels.masked_fill_(ignored, IGNORED)

    def run(self, implementation: str, device: str) -> None:
        generator = torch.Generator().manual_seed(1)
        dtype = DTYPES[self.dtype]
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        networks = 2 if self.teacher else 1
        given = [
            LAYOUTS[self.layout]((3 * torch.randn(self.maps, generator=generator)).to(dtype).to(device))
            for _ in range(networks)
        ]
        if self.layout in ("strided", "transposed") and self.labels != "none":
            # Labels have strides, too.
            labels = self._labels(generator).to(device).transpose(1, 2).contiguous().transpose(1, 2)
        else:
            labels = self._labels(generator)
            labels = None if labels is None else labels.to(device)
        shape = (3, self.maps[0], *self.size) if self.reduction == "none" else (3,)
        upstream = (0.5 + torch.rand(shape, generator=generator)).to(device)
        weights = 0.1 + torch.rand(self.maps[1], generator=generator) if self.weighted else None
        options = {
            "temperature": self.temperature,
            "label_smoothing": self.label_smoothing,
            "reduction": self.reduction,
            "detach_teacher": self.detach_teacher,
        }
        learning = [self.wanted in ("both", side) for side in ("student", "teacher")[:networks]]
        before = [one.clone() for one in given]

        def run(kind: torch.dtype, ours: bool) -> list[Tensor]:
            # Ours differentiates the strided tensors themselves.
            leaves = [one.detach() if ours else one.to(kind, copy=True) for one in given]
            for leaf, wanted in zip(leaves, learning, strict=True):
                leaf.requires_grad_(wanted)
            teacher = leaves[1] if self.teacher else None
            scaled = None if weights is None else weights.to(device, wide if ours else kind)
            if ours:
                with poisoned_memory():
                    parts = functional.upsampled_kd_loss(
                        leaves[0], teacher, labels, size=self.size, class_weights=scaled, ignore_index=IGNORED,
                        impl=implementation, **options,
                    )  # fmt: skip
                    total = sum((part * grad.to(part)).sum() for part, grad in zip(parts, upstream, strict=True))
                    total.backward()
            else:
                parts = plain_losses(leaves[0], teacher, labels, self.size, {**options, "class_weights": scaled})
                total = sum((part * grad.to(part)).sum() for part, grad in zip(parts, upstream, strict=True))
                total.backward()
            zero = torch.zeros(self.maps, dtype=kind, device=device)
            found = [zero if leaf.grad is None else leaf.grad for leaf in leaves]
            return [part.detach() for part in parts] + found

        ours, plain, truth = run(dtype, True), run(wide, False), run(torch.float64, False)
        names = ["ce_student", "ce_teacher", "kd", "gradient of student", "gradient of teacher"]
        pixels = self.size[0] * self.size[1]
        for name, mine, theirs, true in zip(names, ours, plain, truth, strict=False):
            if name in ("ce_student", "ce_teacher", "kd"):
                # Logarithms of sums and logits cancel.
                scale = 16.0 * (self.maps[0] * pixels if self.reduction == "sum" else 1)
                assert mine.dtype == wide
            else:
                # Probabilities cancel, in every pixel that is interpolated from a logit.
                reach = 4 * pixels / (self.maps[2] * self.maps[3])
                counted = 1.0 if labels is None else float((labels != IGNORED).sum().clamp(min=1))
                scale = 2.0 * self.temperature * reach
                scale /= counted if self.reduction == "mean" else 1.0
                theirs = theirs.to(dtype)
                assert mine.dtype == dtype
            assert_close(mine, theirs, true, f"{self.name}: {name}", scale=scale)
        for one, copy in zip(given, before, strict=True):
            assert torch.equal(one, copy), "an input was written"
        if self.layout == "channels_last" and self.wanted == "both":
            assert ours[3].is_contiguous(memory_format=torch.channels_last)


GRID = [
    *(
        Segmentation((2, 5, 3, 4), (7, 9), dtype, layout, reduction)
        for dtype in DTYPES
        for layout in LAYOUTS
        for reduction in ("mean", "none")
        if reduction == "mean" or dtype == "float32"
    ),
    *(
        Segmentation(maps, size, dtype)
        for maps, size in (
            ((1, 1, 1, 1), (1, 1)),
            ((2, 9, 6, 5), (6, 5)),
            ((1, 3, 2, 17), (3, 18)),
            ((1, 19, 4, 6), (16, 24)),
        )
        for dtype in ("float64", "bfloat16")
    ),
]
PROBLEMS = [
    *GRID,
    *(
        Segmentation(
            (2, 6, 3, 5), (5, 13), "float64", "channels_last", reduction, temperature, smoothing, weighted, detach
        )
        for reduction in ("mean", "sum", "none")
        for temperature, smoothing, weighted, detach in (
            (1.0, 0.2, False, False),
            (4.0, 0.0, True, True),
            (2.0, 0.3, True, False),
        )
    ),
    *(
        Segmentation((2, 4, 3, 3), (8, 10), "float32", reduction=reduction, **choice)
        for reduction in ("mean", "none")
        for choice in (
            {"teacher": False},
            {"labels": "none"},
            {"labels": "none", "detach_teacher": False, "temperature": 3.0},
            {"labels": "all ignored"},
            {"wanted": "student"},
            {"wanted": "teacher"},
        )
    ),
    # Several bands of rows and tiles of columns on the CPU.
    Segmentation((2, 3, 40, 5), (45, 5), "float64"),
    Segmentation((1, 150, 3, 30), (5, 100)),
    Segmentation((1, 300, 2, 9), (4, 11), layout="channels_last", temperature=4.0),
]
