"""Problems of the operation ``attention``: the transfer loss over pyramids, and the map."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import formulas
import torch
from layouts import LAYOUTS
from numerics import assert_close
from torch import Tensor

from frskd_fast import functional, last_impl
from problems._attention_entry_points import ENTRY_POINTS as ENTRY_POINTS
from problems._memory import poisoned_memory

# Channels of the student, channels of the teacher, height, width.
Level = tuple[int, int, int, int]

# One pixel, one channel, widths around the vector length 8, channel counts around the blocks of 4 and 32, whole and half
# packs of a GPU.
LEVELS: tuple[Level, ...] = ((5, 3, 1, 1), (1, 2, 3, 5), (33, 66, 4, 4), (9, 6, 6, 6), (7, 9, 5, 9))
# Many channels, planes longer than 512 bytes, more pixels than a tile of 1024.
LARGE_LEVELS: tuple[Level, ...] = ((64, 128, 8, 8), (35, 40, 17, 16), (3, 4, 33, 32))
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

_VALUES: dict[str, Callable[[Tensor], Tensor]] = {
    "normal": lambda feature: feature,
    "rectified": lambda feature: feature.relu(),  # many are 0
    "zero": lambda feature: feature * 0.0,
    "of 3e4": lambda feature: 3e4 * feature.clamp(-1, 1),  # near the largest float16
    "of 1e15": lambda feature: 1e15 * feature.clamp(-1, 1),  # the squares of the map pass float32
    "of 1e-7": lambda feature: 1e-7 * feature,  # those of this one are 0 in float32
}


def _features(
    shape: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype, layout: str, values: str
) -> Tensor:
    feature = torch.randn(shape, generator=generator, dtype=torch.float64)
    return LAYOUTS[layout](_VALUES[values](feature).to(dtype))


def _terms(feature: Tensor, exponent: float) -> float:
    """The largest d q / d f in which the norm stays fixed. The norm's own part may cancel it, for one pixel entirely."""
    magnitude = feature.double().abs()
    norms = torch.linalg.vector_norm(magnitude.pow(exponent).mean(1).flatten(1), dim=1).clamp_min(1e-12)
    slopes = exponent / feature.shape[1] * magnitude.pow(exponent - 1) * (magnitude != 0)
    return float((slopes.flatten(1) / norms[:, None]).nan_to_num().max()) if feature.numel() else 0.0


def _solve(
    function: Callable[..., Tensor], features: list[Tensor], needed: list[bool], upstream: Tensor, dtype: torch.dtype
) -> tuple[Tensor, list[Tensor]]:
    """Result and gradients of the needed features."""
    leaves = [x.detach().to(dtype).requires_grad_(need) for x, need in zip(features, needed, strict=True)]
    result = function(leaves)
    wanted = [leaf for leaf, need in zip(leaves, needed, strict=True) if need]
    return result.detach(), list(torch.autograd.grad(result, wanted, upstream.to(result.dtype)))


@dataclass(frozen=True)
class _Problem:
    """A call on features, three ways: ours, plain PyTorch in the same dtype, plain PyTorch in float64."""

    dtype: torch.dtype = torch.float32
    layout: str = "contiguous"
    values: str = "normal"
    exponent: float = 2.0
    batch: int = 2
    plain: bool = True  # whether plain PyTorch in this dtype stays in range; else our error has only the floor
    levels: tuple[Level, ...] = LEVELS

    @property
    def name(self) -> str:
        shape = "" if self.levels is LEVELS else f", {len(self.levels)} levels from {self.levels[0]}"
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.what}, {dtype}, {self.layout}, {self.values}, p={self.exponent}, N={self.batch}{shape}"

    @property
    def what(self) -> str:
        raise NotImplementedError

    def _check(
        self,
        ours: Callable[[list[Tensor]], Tensor],
        plain: Callable[[list[Tensor]], Tensor],
        features: list[Tensor],
        needed: list[bool],
        terms: list[float],  # the largest of a gradient before they cancel, for an upstream gradient of 1
        implementation: str,
        generator: torch.Generator,
    ) -> None:
        before = [feature.clone() for feature in features]
        upstream = torch.randn(plain(features).shape, generator=generator, dtype=torch.float64).to(features[0].device)
        truth, true_gradients = _solve(plain, features, needed, upstream, torch.float64)
        other, other_gradients = _solve(plain, features, needed, upstream, self.dtype)
        with poisoned_memory():
            result, gradients = _solve(ours, features, needed, upstream, self.dtype)
        used = last_impl()["attention"]
        assert implementation in (used, "auto")
        beyond = torch.tensor(float("nan"))
        assert result.dtype == (torch.float64 if self.dtype == torch.float64 else torch.float32)
        for row, (mine, theirs, true) in enumerate(zip(result, other, truth, strict=True)):
            assert_close(mine, theirs if self.plain else beyond.expand_as(true), true, f"{self.name}: result {row}")
        wanted = [pair for pair, need in zip(zip(features, terms, strict=True), needed, strict=True) if need]
        largest = float(upstream.abs().max()) if upstream.numel() else 0.0
        for index, (feature, term) in enumerate(wanted):
            mine, theirs = gradients[index], other_gradients[index]
            assert mine.dtype == feature.dtype
            # Plain PyTorch's gradients are as autograd lays them out.
            assert used == "reference" or mine.stride() == torch.empty_like(feature).stride()
            theirs = theirs if self.plain else beyond.expand_as(mine)
            label = f"{self.name}: gradient {index}"
            assert_close(mine, theirs, true_gradients[index], label, scale=largest * term)
        for feature, copy in zip(features, before, strict=True):
            assert torch.equal(feature, copy), f"{self.name}: an input was written to"


@dataclass(frozen=True)
class Transfer(_Problem):
    """The loss and the gradients of one side or both."""

    teacher_layout: str = ""  # "": as the student's
    teacher_values: str = ""
    reduction: str = "none"
    need_student: bool = True
    need_teacher: bool = True

    @property
    def what(self) -> str:
        sides = ["student"] * self.need_student + ["teacher"] * self.need_teacher
        teacher = " ".join(filter(None, (self.teacher_layout, self.teacher_values)))
        return f"{self.reduction} for {' and '.join(sides)}" + f" beside {teacher}" * bool(teacher)

    def run(self, implementation: str, device: str) -> None:
        generator = torch.Generator().manual_seed(1)
        features = [
            _features(
                (self.batch, channels, height, width),
                generator,
                self.dtype,
                layout or self.layout,
                values or self.values,
            )
            for side, (layout, values) in enumerate((("", ""), (self.teacher_layout, self.teacher_values)))
            for *both, height, width in self.levels
            for channels in (both[side],)
        ]
        features = [_moved(feature, device) for feature in features]
        count = len(self.levels)

        def ours(given: list[Tensor]) -> Tensor:
            return functional.attention_transfer(
                given[:count], given[count:], self.exponent, self.reduction,
                detach_teacher=not self.need_teacher, impl=implementation,
            ).reshape(-1)  # fmt: skip

        def plain(given: list[Tensor]) -> Tensor:
            rows = formulas.attention_rows(given[:count], given[count:], self.exponent)
            batch = max(self.batch, 1)
            reduced = {"none": rows, "levels": rows.sum(1) / batch, "sum": rows.sum(), "mean": rows.sum() / batch}
            return reduced[self.reduction].reshape(-1)

        needed = [self.need_student] * count + [self.need_teacher] * count
        maps = [formulas.attention_map(feature.double(), self.exponent) for feature in features]
        terms = [
            _terms(feature, self.exponent) * 2 * max(float(one.max()), float(other.max())) / one.shape[1]
            for feature, one, other in zip(features, maps, maps[count:] + maps[:count], strict=True)
            if self.batch
        ] or [0.0] * len(features)
        self._check(ours, plain, features, needed, terms, implementation, generator)


@dataclass(frozen=True)
class Map(_Problem):
    """The attention map of one feature and its gradient."""

    @property
    def what(self) -> str:
        return "map"

    def run(self, implementation: str, device: str) -> None:
        generator = torch.Generator().manual_seed(1)
        for channels, _, height, width in self.levels:
            shape = (self.batch, channels, height, width)
            feature = _moved(_features(shape, generator, self.dtype, self.layout, self.values), device)
            self._check(
                lambda given: functional.attention_map(given[0], self.exponent, impl=implementation),
                lambda given: formulas.attention_map(given[0], self.exponent),
                [feature], [True], [_terms(feature, self.exponent)], implementation, generator,
            )  # fmt: skip


@dataclass(frozen=True)
class NanStaysInItsSample:
    """One NaN among the features makes the losses and gradients of its sample NaN and leaves the others alone."""

    exponent: float

    @property
    def name(self) -> str:
        return f"a NaN stays in its sample, p={self.exponent}"

    def run(self, implementation: str, device: str) -> None:
        generator = torch.Generator().manual_seed(1)
        feature, teacher = torch.randn(2, 3, 4, 3, 3, generator=generator)
        feature[1, 2, 0, 1] = float("nan")
        leaf = feature.to(device).requires_grad_()
        with poisoned_memory():
            rows = functional.attention_transfer(
                [leaf], [teacher.to(device)], self.exponent, "none", impl=implementation
            )
            (gradient,) = torch.autograd.grad(rows, leaf, torch.ones_like(rows))
        assert rows[0].isnan().tolist() == [False, True, False]
        assert gradient[1].isnan().all() and not gradient[::2].isnan().any()


@dataclass(frozen=True)
class ExpandedUpstream:
    """An upstream gradient of strides 0, as a sum has it, counts like a dense one."""

    name: str = "an expanded upstream gradient"

    def run(self, implementation: str, device: str) -> None:
        generator = torch.Generator().manual_seed(1)
        features = [torch.randn(2, 3, 4, 4, generator=generator).to(device).requires_grad_() for _ in range(2)]
        teachers = [torch.randn(2, 5, 4, 4, generator=generator).to(device) for _ in range(2)]
        rows = functional.attention_transfer(features, teachers, 2.0, "none", impl=implementation)
        upstream = torch.tensor(0.5, device=device)
        with poisoned_memory():
            expanded = torch.autograd.grad(rows, features, upstream.expand(2, 2), retain_graph=True)
            dense = torch.autograd.grad(rows, features, torch.full((2, 2), 0.5, device=device))
        for one, other in zip(expanded, dense, strict=True):
            assert torch.equal(one, other)


def _moved(feature: Tensor, device: str) -> Tensor:
    """On `device`, with the strides it has: `Tensor.to` would make a slice contiguous."""
    if feature.device.type == device:
        return feature
    extent = 1 + sum((size - 1) * stride for size, stride in zip(feature.shape, feature.stride(), strict=True))
    storage = feature.as_strided((extent if feature.numel() else 0,), (1,), feature.storage_offset()).to(device)
    return storage.as_strided(feature.shape, feature.stride())


GRID = [
    *(Transfer(dtype, layout) for dtype in DTYPES for layout in LAYOUTS),
    *(
        Transfer(dtype, layout, levels=LARGE_LEVELS)
        for dtype in DTYPES
        for layout in ("contiguous", "channels_last", "strided")
    ),
    *(Transfer(layout=layout, exponent=1.5, levels=LARGE_LEVELS) for layout in ("contiguous", "channels_last")),
    *(Map(dtype, levels=LARGE_LEVELS) for dtype in DTYPES),
    # dtypes and layouts move against each other, so that every exponent meets them all.
    *(
        Transfer(DTYPES[(index + shift) % len(DTYPES)], layout, "rectified", exponent)
        for shift, exponent in enumerate((1.0, 1.5, 2.3, 3.0, 4.0))
        for index, layout in enumerate(LAYOUTS)
    ),
    *(
        Map(DTYPES[(index + shift) % len(DTYPES)], layout, exponent=exponent)
        for shift, exponent in enumerate((1.0, 2.0, 3.0))
        for index, layout in enumerate(LAYOUTS)
    ),
]

PROBLEMS = [
    *GRID,
    *(Transfer(reduction=reduction, levels=LEVELS[:3]) for reduction in ("mean", "sum", "levels")),
    Transfer(need_teacher=False, levels=LEVELS[:3]),
    Transfer(need_student=False, levels=LEVELS[:3]),
    Transfer(layout="transposed", teacher_layout="expanded"),
    Transfer(layout="channels_last", teacher_layout="contiguous"),
    # A single sample has its pixels split among the threads or blocks, many have the samples.
    Transfer(batch=1, levels=LARGE_LEVELS),
    Transfer(torch.float16, "channels_last", batch=40, levels=((64, 32, 4, 4),)),
    Transfer(batch=0, levels=LEVELS[:2]),
    Map(batch=0, levels=LEVELS[:2]),
    # More packs of pixels than a block has threads.
    Transfer(batch=1, levels=((16, 8, 48, 52), (2, 3, 56, 56))),
    Transfer(torch.float16, "channels_last", batch=1, levels=((16, 8, 48, 52),)),
    # More levels than one launch takes, once and twice.
    Transfer(levels=tuple((2, 1, 1 + size % 2, 2) for size in range(9))),
    Transfer(batch=1, levels=tuple((3, 2, size, size) for size in range(1, 18))),
    # Several tiles of pixels, of channels; maps too large for a block's 48 KB, and for fusing at all.
    Transfer(batch=1, levels=((40, 40, 12, 12), (2, 2, 33, 32))),
    Transfer(layout="channels_last", batch=1, levels=((300, 300, 4, 5), (1100, 3, 2, 2))),
    *(Transfer(torch.float16, batch=1, levels=((2, 3, size, size),)) for size in (60, 80)),
    *(
        Transfer(values="zero", teacher_values=teacher, exponent=exponent, levels=LEVELS[:3])
        for teacher in ("zero", "normal")
        for exponent in (1.0, 1.5, 2.0)
    ),
    Transfer(torch.float16, values="of 3e4", teacher_values="of 3e4", plain=False, levels=LEVELS[1:4]),
    *(
        problem(dtype, values=values, plain=False, levels=LEVELS[1:4])
        for problem in (Transfer, Map)
        for dtype, values in ((torch.float32, "of 1e15"), (torch.bfloat16, "of 1e15"), (torch.float32, "of 1e-7"))
    ),
    *(NanStaysInItsSample(exponent) for exponent in (1.0, 2.0, 3.0)),
    ExpandedUpstream(),
]


def _launch(layout: str, dtype: torch.dtype, exponent: float, batch: int = 2, device: str = "cpu") -> None:
    """The raw Triton functions on a wide level, a deep one, and one of ImageNet's whose 196 pixels are no multiple of 16."""
    from frskd_fast.kernels import attention

    sizes = ((64, 32, 32), (512, 4, 4), (256, 14, 14)) if exponent == 2.0 and device == "cpu" else ((64, 32, 32),)
    features = [LAYOUTS[layout](torch.empty((batch, *size), dtype=dtype, device=device)) for size in sizes]
    losses, coefficients, _ = attention.forward(features, features, exponent, True, True)
    assert coefficients is not None
    attention.backward(losses, 1.0, False, features, coefficients, exponent)


def _launch_map() -> None:
    from frskd_fast.kernels import attention

    attention.attention_map(torch.zeros(2, 64, 32, 32), 2.0)


COMPILED: dict[str, Callable[[], None]] = {
    "nchw float32": functools.partial(_launch, "contiguous", torch.float32, 2.0),
    "nchw bfloat16": functools.partial(_launch, "contiguous", torch.bfloat16, 2.0),
    "channels_last float32": functools.partial(_launch, "channels_last", torch.float32, 2.0),
    "channels_last bfloat16": functools.partial(_launch, "channels_last", torch.bfloat16, 2.0),
    "p=2.3": functools.partial(_launch, "contiguous", torch.float32, 2.3),
    "float64": functools.partial(_launch, "contiguous", torch.float64, 2.0),
    "64-bit offsets": functools.partial(_launch, "contiguous", torch.float32, 2.0, batch=40_000, device="meta"),
    "map": _launch_map,
}
