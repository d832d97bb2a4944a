"""Problems of one node of a feature pyramid, posed to the raw functions of `fusion` as an autograd function calls them.

Problems of the operation as a whole are in fusion.py. What the raw functions add: statistics and sums are looked at, every
layout is taken in every dtype, and nothing but the kernels runs.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple

import torch
from layouts import LAYOUTS
from numerics import assert_close
from torch import Tensor

from frskd_fast import _dispatch
from frskd_fast.reference import fusion as reference
from frskd_fast.reference.dtypes import accumulate_dtype
from frskd_fast.reference.fusion import Node, Settings

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
STEP = 1e-4  # added to the sum of the weights
VARIANCE_STEP = 1e-5


class Case(NamedTuple):
    """One node."""

    channels: int
    size: tuple[int, int]
    inputs: tuple[tuple[str, int, int], ...]  # resample, height, width
    pre: str = "relu"
    weighting: str = "relu"
    weight: tuple[float, ...] = (1.0, 0.7, 0.4, 1.3)
    normalised: tuple[int, ...] = ()  # positions of the inputs with a BatchNorm
    training: bool = True
    batch: int = 2

    def settings(self) -> Settings:
        resamples = [reference.RESAMPLES.index(resample) for resample, _, _ in self.inputs]
        pre, weighting = reference.ACTIVATIONS.index(self.pre), reference.WEIGHTINGS.index(self.weighting)
        return Settings(resamples, pre, weighting, STEP)


# Even sizes, halved and doubled; odd ones; a ratio that is not exact, and one whose rounding moves a pixel by one; channels
# in packs of 8, of 4 and of none, and fewer than a pack.
CASES: dict[str, Case] = {
    "top down": Case(16, (8, 8), (("none", 8, 8), ("up", 4, 4))),
    "bottom up": Case(16, (4, 8), (("none", 4, 8), ("none", 4, 8), ("pool", 8, 16)), "none"),
    "odd": Case(5, (4, 9), (("pool", 7, 17), ("up", 3, 5), ("none", 4, 9)), "silu", "softmax"),
    "half packs": Case(12, (5, 3), (("pool", 10, 6), ("up", 2, 1), ("up", 5, 2), ("pool", 9, 5)), "none"),
    "rows of packs": Case(8, (3, 8), (("none", 3, 8), ("pool", 5, 16), ("up", 3, 4)), "none", "softmax"),
    "nothing of that size": Case(3, (4, 4), (("up", 2, 3), ("pool", 8, 7)), "silu", "sum"),
    "four": Case(3, (2, 3), (("none", 2, 3), ("up", 1, 3), ("pool", 4, 6), ("none", 2, 3)), "silu"),
    "all dead": Case(2, (2, 3), (("none", 2, 3),) * 2, weight=(-0.5, 0.0)),
    "one dead": Case(8, (2, 2), (("none", 2, 2), ("pool", 4, 4), ("none", 2, 2)), weight=(-0.5, 2.0, 0.7)),
    "negative": Case(2, (2, 2), (("none", 2, 2),) * 2, weighting="softmax", weight=(-0.5, -1.0)),
    "one pixel": Case(1, (1, 1), (("none", 1, 1), ("pool", 1, 1), ("pool", 2, 2), ("up", 1, 1)), weighting="softmax"),
    "alone": Case(9, (3, 5), (("none", 3, 5),), "silu", "sum"),
    "rounded": Case(1, (74, 44), (("up", 6, 26),), batch=1),
    "several tiles": Case(260, (3, 3), (("none", 3, 3),) * 2, batch=1),
    "normalised": Case(16, (4, 8), (("none", 4, 8), ("up", 2, 4), ("pool", 8, 16)), normalised=(0, 1, 2)),
    "normalised odd": Case(5, (4, 9), (("pool", 7, 17), ("up", 3, 5), ("none", 4, 9)), "none", normalised=(0, 1)),
    "normalised half packs": Case(
        12, (5, 3), (("pool", 10, 6), ("none", 5, 3), ("up", 5, 2)), "silu", "softmax", normalised=(0, 2)
    ),
    "normalised sum": Case(8, (5, 8), (("none", 5, 8), ("up", 5, 4)), weighting="sum", normalised=(1,)),
    "running statistics": Case(
        8, (4, 4), (("none", 4, 4), ("pool", 8, 8), ("up", 2, 2)), normalised=(0, 1, 2), training=False
    ),
}
LARGE = Case(4, (48, 48), (("none", 48, 48), ("up", 16, 24), ("pool", 95, 96)), normalised=(0, 1, 2), batch=3)


class Tensors(NamedTuple):
    """What goes into one node; running statistics, which a training node replaces by those of the batch."""

    node: Node
    grad: Tensor


def make(case: Case, layouts: Sequence[str], dtype: torch.dtype, device: str) -> Tensors:
    """Random tensors, input i in layout i; the gradient in the last."""
    numbers = accumulate_dtype(dtype)
    shape = (case.batch, case.channels)
    inputs = [(torch.randn(*shape, h, w) + 0.3).to(device, dtype) for _, h, w in case.inputs]
    used = [position in case.normalised for position in range(len(inputs))]

    def channel_numbers(random: Callable[[], Tensor]) -> list[Tensor]:
        return [random().to(device, numbers) if normalised else torch.zeros(0, device=device, dtype=numbers)
                for normalised in used]  # fmt: skip

    node = Node(
        [LAYOUTS[layout](x) for layout, x in zip(layouts, inputs, strict=False)],
        channel_numbers(lambda: torch.stack([torch.randn(shape[1]) / 4, torch.rand(shape[1]) + 0.5])),
        channel_numbers(lambda: torch.randn(shape[1])),
        channel_numbers(lambda: torch.randn(shape[1])),
        torch.tensor(case.weight[: len(inputs)]).to(device, numbers),
    )
    return Tensors(node, LAYOUTS[layouts[-1]](torch.randn(*shape, *case.size).to(device, dtype)))


def by_autograd(case: Case, tensors: Tensors, dtype: torch.dtype) -> dict[str, Tensor]:
    """Values and gradients of the specification in ``dtype``."""
    numbers = accumulate_dtype(dtype)

    def leaves(given: Sequence[Tensor], to: torch.dtype) -> list[Tensor]:
        return [tensor.detach().to(to).clone().requires_grad_() for tensor in given]

    node = tensors.node
    inputs, weight = leaves(node.inputs, dtype), leaves([node.weight], numbers)[0]
    gammas, betas = leaves(node.gammas, numbers), leaves(node.betas, numbers)
    normalised = [position for position, rows in enumerate(node.statistics) if rows.numel()]
    statistics = [rows.to(numbers) for rows in node.statistics]
    if case.training:
        for position in normalised:
            statistics[position] = reference.batch_statistics(inputs[position], VARIANCE_STEP)
    out = reference.fuse(Node(inputs, statistics, gammas, betas, weight), case.settings(), case.size)
    out.backward(tensors.grad.to(dtype))
    results = {"out": out.detach()}
    for position, x in enumerate(inputs):
        assert x.grad is not None
        results[f"inputs[{position}]"] = x.grad
    for position in normalised:
        results[f"statistics[{position}]"] = statistics[position].detach()[:2]
        beta, gamma = betas[position].grad, gammas[position].grad
        assert beta is not None and gamma is not None
        results[f"sums[{position}]"] = torch.stack([beta, gamma])
    results["weight"] = torch.zeros_like(weight) if weight.grad is None else weight.grad
    return results


def by_kernels(raw: ModuleType, case: Case, tensors: Tensors) -> dict[str, Tensor]:
    """The same by raw functions, each called as an autograd function would."""
    node, grad = tensors
    settings, count = case.settings(), len(node.inputs)
    normalised = [position for position, rows in enumerate(node.statistics) if rows.numel()]
    if case.training and normalised:
        statistics = list(node.statistics)
        measured = raw.batch_statistics([node.inputs[i] for i in normalised], [VARIANCE_STEP] * len(normalised))
        for position, rows in zip(normalised, measured, strict=True):
            statistics[position] = rows
        node = node._replace(statistics=statistics)
    results = {"out": raw.forward(node, settings, case.size)}
    sums = missing = [node.weight.new_zeros(0)] * count
    if normalised:
        sums, results["weight"] = raw.backward_sums(grad, node, settings)
        for position in normalised:
            results[f"statistics[{position}]"] = node.statistics[position][:2]
            results[f"sums[{position}]"] = sums[position]
    used = sums if case.training else missing
    need_weight = not (normalised and case.training)
    gradients, weight_gradient = raw.backward(grad, node, used, settings, [True] * count, need_weight)
    for position, (gradient, x) in enumerate(zip(gradients, node.inputs, strict=True)):
        assert gradient.dtype == x.dtype and gradient.stride() == torch.empty_like(x).stride(), position
        results[f"inputs[{position}]"] = gradient
    assert (weight_gradient.numel() > 0) == need_weight
    if need_weight:
        results["weight"] = weight_gradient
    return results


def three_way(label: str, raw: ModuleType, case: Case, tensors: Tensors) -> dict[str, Tensor]:
    """Compare by the three-way rule; no input may be written to."""
    before = [x.clone() for x in tensors.node.inputs]
    ours = by_kernels(raw, case, tensors)
    plain = by_autograd(case, tensors, tensors.grad.dtype)
    truth = by_autograd(case, tensors, torch.float64)
    assert ours.keys() == truth.keys()
    # The weights' gradient is (D_i - sum_j D_j w^_j) / divisor; the sum is about <grad, out>.
    divisor = float(tensors.node.weight.relu().sum()) + STEP if case.weighting == "relu" else 1.0
    scale = float((tensors.grad.double() * truth["out"]).sum().abs()) / divisor
    for key, value in ours.items():
        assert_close(value, plain[key], truth[key], f"{label}: {key}", scale if key == "weight" else 0.0)
    for x, copy in zip(tensors.node.inputs, before, strict=True):
        assert torch.equal(x, copy), f"{label}: an input was written to"
    return ours


def is_interpreted(raw: ModuleType, device: str) -> bool:
    """Whether kernels run in Triton's interpreter, which takes a second or two for each node."""
    return raw.__name__.startswith("frskd_fast.kernels") and device == "cpu"


@dataclass(frozen=True)
class NodeProblem:
    """One node in every layout and dtype; interpreted, in one layout of its own for each of two dtypes."""

    name: str
    case: Case

    def run(self, implementation: str, device: str) -> None:
        raw = _dispatch.raw("fusion", implementation)
        pairs = [(layout, dtype) for layout in LAYOUTS for dtype in DTYPES]
        if is_interpreted(raw, device):
            number = list(CASES).index(self.name)
            pairs = [pairs[(5 * number) % len(pairs)], pairs[(5 * number + 14) % len(pairs)]]
        for layout, dtype in pairs:
            torch.manual_seed(zlib.crc32(self.name.encode()))
            tensors = make(self.case, [layout] * 5, dtype, device)
            ours = three_way(f"{layout}, {dtype}", raw, self.case, tensors)
            first = tensors.node.inputs[0]
            if not first.is_contiguous() and first.is_contiguous(memory_format=torch.channels_last):
                assert ours["out"].is_contiguous(memory_format=torch.channels_last)


@dataclass(frozen=True)
class RawProblem:
    """A function of the raw functions and the device."""

    function: Callable[[ModuleType, str], None]

    @property
    def name(self) -> str:
        return self.function.__name__.strip("_").replace("_", " ")

    def run(self, implementation: str, device: str) -> None:
        self.function(_dispatch.raw("fusion", implementation), device)


def _maps_that_several_blocks_share(raw: ModuleType, device: str) -> None:
    plain = LARGE._replace(normalised=(), batch=1)
    for layout in ("contiguous", "channels_last"):
        # Interpreted, LARGE takes minutes; Triton's sums over several blocks are looked at with small blocks instead.
        for case in (plain,) if is_interpreted(raw, device) else (plain, LARGE):
            three_way(layout, raw, case, make(case, [layout] * 4, torch.float32, device))


def _inputs_of_different_layouts(raw: ModuleType, device: str) -> None:
    case = Case(3, (3, 4), (("none", 3, 4),) * 3)
    tensors = make(case, ["channels_last", "expanded", "transposed", "contiguous"], torch.float32, device)
    upstream = torch.tensor(0.7, device=device).expand(tensors.grad.shape)
    three_way("mixed", raw, case, tensors._replace(grad=upstream))


def _parameters_cut_from_a_larger_buffer(raw: ModuleType, device: str) -> None:
    """They do not begin at a multiple of 16 bytes, so channels may not be read in packs."""
    for dtype in (torch.float64, torch.float16):
        for training in (True, False):
            case = CASES["normalised"]._replace(training=training)
            node, grad = make(case, ["channels_last"] * 4, dtype, device)
            numbers = {"dtype": node.weight.dtype, "device": device}
            gammas = [torch.randn(case.channels + 1, **numbers)[1:] for _ in node.inputs]
            statistics = [(torch.rand(2 * case.channels + 1, **numbers) + 0.5)[1:].view(2, -1) for _ in node.inputs]
            cut = node._replace(gammas=gammas, statistics=statistics)
            three_way(f"{dtype}, training {training}", raw, case, Tensors(cut, grad))


def _an_empty_batch(raw: ModuleType, device: str) -> None:
    for name in ("bottom up", "normalised", "rows of packs"):
        case = CASES[name]._replace(batch=0, training=False)
        for key, value in by_kernels(raw, case, make(case, ["contiguous"] * 4, torch.float32, device)).items():
            assert value.numel() == 0 or key.startswith("statistics") or bool((value == 0).all()), key
    try:
        statistics = raw.batch_statistics([torch.zeros(0, 3, 4, 4, device=device)], [VARIANCE_STEP])
    except RuntimeError as error:  # compiled functions name what is missing; Triton's numbers are NaN, as PyTorch's are
        assert "inputs[0] has shape (0, 3, 4, 4), but at least one sample was wanted." in str(error)
    else:
        assert bool(statistics[0].isnan().all())


def _only_the_gradients_asked_for(raw: ModuleType, device: str) -> None:
    case = CASES["bottom up"]
    node, grad = make(case, ["contiguous"] * 4, torch.float32, device)
    missing = [torch.zeros(0, device=device)] * 3

    def run(need: list[bool], need_weight: bool) -> tuple[list[Tensor], Tensor]:
        found: tuple[list[Tensor], Tensor] = raw.backward(grad, node, missing, case.settings(), need, need_weight)
        return found

    gradients, weight_gradient = run([True] * 3, True)
    before = [x.clone() for x in node.inputs]
    for need in ([True, False, True], [False, False, True], [False] * 3):
        for need_weight in (True, False):
            some, weight = run(need, need_weight)
            wanted = [gradient for gradient, needed in zip(gradients, need, strict=True) if needed]
            assert len(some) == len(wanted)
            assert all(map(torch.equal, some, wanted))
            assert torch.equal(weight, weight_gradient) if need_weight else weight.numel() == 0
    assert all(map(torch.equal, node.inputs, before))


def _nan_and_infinity_show(raw: ModuleType, device: str) -> None:
    spoils = [(position, spoil) for position in range(3) for spoil in (float("nan"), float("inf"))]
    runs = [(pre, layout, *spoil) for pre in ("none", "relu", "silu") for layout in ("contiguous", "channels_last")
            for spoil in spoils]  # fmt: skip
    if is_interpreted(raw, device):
        runs = runs[::5]
    for pre, layout, position, spoil in runs:
        case = Case(8, (4, 8), (("none", 4, 8), ("up", 2, 4), ("pool", 7, 15)), pre)
        tensors = make(case, [layout] * 4, torch.float32, device)
        tensors.node.inputs[position][0, 1, 1, 2] = spoil
        ours, plain = by_kernels(raw, case, tensors), by_autograd(case, tensors, torch.float32)
        for key in ("out", "inputs[0]", "inputs[1]", "inputs[2]"):
            torch.testing.assert_close(ours[key], plain[key], rtol=1e-4, atol=1e-5, equal_nan=True)


def _the_first_of_equal_maxima_gets_the_gradient(raw: ModuleType, device: str) -> None:
    """Padding included: zeros at the border win over later zeros, and a NaN over everything."""
    for size, layout, pre in (((7, 8), "contiguous", "none"), ((6, 5), "channels_last", "relu")):
        case = Case(8, ((size[0] + 1) // 2, (size[1] + 1) // 2), (("pool", *size),), pre, "sum")
        tensors = make(case, [layout] * 2, torch.float32, device)
        x = tensors.node.inputs[0]
        x.copy_(torch.randint(-2, 2, x.shape))
        x[:, 1] = -1.0  # the padding is the largest where there is any
        x[:, 2, 2, 2] = float("nan")
        ours, plain = by_kernels(raw, case, tensors), by_autograd(case, tensors, torch.float32)
        torch.testing.assert_close(ours["out"], plain["out"], rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(ours["inputs[0]"], plain["inputs[0]"], rtol=1e-6, atol=1e-6, equal_nan=True)
        assert ours["weight"].tolist() == [0.0]


FAR = 5


def statistics_of_hard_channels(raw: ModuleType, device: str) -> Iterator[tuple[Tensor, Tensor]]:
    """Ours and the truth, each (3, C), in several layouts and dtypes; of two images.

    The channels are far from zero, start with an outlier, are constant, have a first column of their own, are small, have
    a NaN, or (`FAR`) lie so far from zero that float32 means of several chunks lose some of the variance's digits.
    """
    x = torch.randn(3, 8, 13, 16)
    x[:, 0] += 1000
    x[0, 1, 0, 0] = 1e4
    x[:, 2] = 3.0
    x[:, 3, :, 0] = 500.0
    x[:, 4] *= 1e-3
    x[:, FAR] = x[:, FAR] * 1e-2 + 100
    x[1, 6, 4, 4] = float("nan")
    epsilons = (1e-5, 1e-3)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        for layout in ("contiguous", "channels_last", "transposed"):
            images = [LAYOUTS[layout](one.to(device, dtype)) for one in (x, torch.randn(3, 8, 1, 2))]
            for image, epsilon, found in zip(images, epsilons, raw.batch_statistics(images, epsilons), strict=True):
                truth = reference.batch_statistics(image.double(), epsilon)
                assert found.dtype == accumulate_dtype(dtype)
                assert torch.equal(found.isnan(), truth.isnan())
                yield found, truth


def _statistics(raw: ModuleType, device: str) -> None:
    for found, truth in statistics_of_hard_channels(raw, device):
        kept = [channel for channel in range(truth.shape[1]) if channel != FAR]
        tolerance = 1e-12 if found.dtype == torch.float64 else 3e-6
        for row, allowed in ((0, tolerance), (1, 10 * tolerance), (2, 10 * tolerance)):
            torch.testing.assert_close(
                found[row, kept].double(), truth[row, kept], rtol=allowed, atol=0 if row else allowed, equal_nan=True
            )


RAW_PROBLEMS: list[NodeProblem | RawProblem] = [
    *(NodeProblem(name, case) for name, case in CASES.items()),
    RawProblem(_maps_that_several_blocks_share),
    RawProblem(_inputs_of_different_layouts),
    RawProblem(_parameters_cut_from_a_larger_buffer),
    RawProblem(_an_empty_batch),
    RawProblem(_only_the_gradients_asked_for),
    RawProblem(_nan_and_infinity_show),
    RawProblem(_the_first_of_equal_maxima_gets_the_gradient),
    RawProblem(_statistics),
]


def _launch(
    sizes: tuple[int, ...],  # of square maps, the first of which has the output's size
    dtype: torch.dtype,
    channels_last: bool = False,
    normalised: bool = False,
    pre: str = "relu",
    batch: int = 2,
    device: str = "cpu",
) -> None:
    """Forward and backward of one node by the raw Triton functions."""
    raw = _dispatch.raw("fusion", "triton")
    count, numbers = len(sizes), accumulate_dtype(dtype)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    inputs = [torch.empty(batch, 64, size, size, dtype=dtype, device=device, memory_format=memory_format)
              for size in sizes]  # fmt: skip
    resamples = tuple(0 if size == sizes[0] else 1 if size < sizes[0] else 2 for size in sizes)
    settings = Settings(resamples, reference.ACTIVATIONS.index(pre), 1, STEP)
    missing = [torch.empty(0, dtype=numbers, device=device)] * count
    node = Node(inputs, missing, missing, missing, torch.empty(count, dtype=numbers, device=device))
    sums = missing
    if normalised:
        affine = [torch.empty(64, dtype=numbers, device=device)] * count
        node = Node(inputs, raw.batch_statistics(inputs, [VARIANCE_STEP] * count), affine, affine, node.weight)
    out = raw.forward(node, settings, (sizes[0], sizes[0]))
    if normalised:
        sums, _ = raw.backward_sums(out, node, settings)
    raw.backward(out, node, sums, settings, [True] * count, not normalised)


COMPILED: dict[str, Callable[[], None]] = {
    "normalised, bfloat16": lambda: _launch((14, 7), torch.bfloat16, channels_last=True, normalised=True),
    "normalised, pooled, float32": lambda: _launch((16, 16, 32), torch.float32, normalised=True),
    "pooled, SiLU, float32": lambda: _launch((16, 16, 32), torch.float32, pre="silu"),
    "float64, 64-bit offsets": lambda: _launch((32, 16), torch.float64, batch=40_000, device="meta"),
}
