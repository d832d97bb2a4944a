"""Nodes of ``fusion``: outputs, all gradients and running statistics against float64, in every layout and dtype."""

from __future__ import annotations

import copy
import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import formulas
import torch
from layouts import channel_slice, channels_last, contiguous, expanded_channels, strided, transposed
from numerics import assert_close
from torch import Tensor, nn

from frskd_fast import functional
from frskd_fast.reference.dtypes import accumulate_dtype
from problems._raw_fusion import COMPILED as COMPILED
from problems._raw_fusion import RAW_PROBLEMS as RAW_PROBLEMS

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
ACTIVATIONS = ["none", "relu", "silu"]
# (weighting, raw weights of up to four inputs): all positive, some dead, all dead.
WEIGHTINGS: list[tuple[str, tuple[float, ...]]] = [
    ("relu", (0.7, 1.3, 0.4, 0.9)),
    ("softmax", (0.3, -1.2, 0.5, 0.1)),
    ("sum", (0.7, 1.3, -0.4, 0.9)),
    ("relu", (-0.5, 0.8, 0.0, 0.6)),
    ("relu", (-0.5, 0.0, -0.2, -1.0)),
]
EPSILON = 1e-3  # large enough to be seen beside the weights


class Shapes(NamedTuple):
    """The maps of one node."""

    channels: int
    sizes: tuple[tuple[int, int], ...]
    resample: tuple[str, ...]
    size: tuple[int, int]


# One to four inputs; channel counts around the vector length 8; one pixel; twofold, threefold and uneven up-sampling (5 to
# 9, 2 to 9), pooling of odd, even and mixed sizes; rows longer than two vectors, in planes and pooled.
MANY_RESAMPLES = Shapes(5, ((6, 9), (2, 3), (12, 17), (1, 2)), ("none", "up", "pool", "up"), (6, 9))
NODES = [
    Shapes(3, ((3, 5),), ("none",), (3, 5)),
    Shapes(8, ((9, 6), (5, 3)), ("none", "up"), (9, 6)),
    Shapes(19, ((4, 4), (4, 4), (7, 8)), ("none", "none", "pool"), (4, 4)),
    MANY_RESAMPLES,
    Shapes(9, ((7, 5),), ("pool",), (4, 3)),
    Shapes(7, ((3, 3), (5, 2)), ("up", "up"), (9, 9)),
    Shapes(4, ((1, 1), (1, 1), (2, 1)), ("none", "pool", "pool"), (1, 1)),
    Shapes(1, ((5, 4), (3, 4)), ("none", "up"), (5, 4)),
    Shapes(2, ((3, 19), (5, 37), (2, 10)), ("none", "pool", "up"), (3, 19)),
]


# How the inputs of a node lie in memory, in turns.
LAYOUTS: dict[str, Sequence[Callable[[Tensor], Tensor]]] = {
    "contiguous": [contiguous],
    "channels_last": [channels_last],
    "channel_slice": [channel_slice],
    "strided": [strided],
    "transposed": [transposed],
    "expanded": [expanded_channels],
    "mixed": [channels_last, contiguous, strided, channel_slice],
    "mixed_last": [channels_last, channel_slice, channels_last, channel_slice],
}


def maps(shapes: Shapes, batch: int, dtype: torch.dtype, layout: str, device: str = "cpu") -> list[Tensor]:
    """Random inputs of a node."""
    changes = itertools.cycle(LAYOUTS[layout])
    return [
        change((2 * torch.randn(batch, shapes.channels, *size) + 0.3).to(device, dtype))
        for change, size in zip(changes, shapes.sizes, strict=False)
    ]


def random_batch_norm(channels: int, training: bool = True, **options: Any) -> nn.BatchNorm2d:
    """Gamma of both signs; running statistics that are not those of any batch."""
    batch_norm = nn.BatchNorm2d(channels, **{"eps": 1e-3, "momentum": 0.3, **options})
    with torch.no_grad():
        if batch_norm.affine:
            batch_norm.weight.copy_(torch.randn(channels))
            batch_norm.bias.copy_(torch.randn(channels))
        if batch_norm.running_mean is not None and batch_norm.running_var is not None:
            batch_norm.running_mean.copy_(torch.randn(channels))
            batch_norm.running_var.copy_(torch.rand(channels) + 0.5)
    return batch_norm.train(training)


Results = dict[str, Tensor]


def collect(
    function: Callable[[list[Tensor], Tensor, list[Any]], Tensor],
    inputs: Sequence[Tensor],
    weight: Tensor,
    batch_norms: Sequence[nn.Module | None],
    grad: Tensor,
    dtype: torch.dtype,
) -> Results:
    """Output, gradients of everything and buffers of ``function(maps, weight, batch_norms)`` in ``dtype``."""
    leaves = [x.detach().to(dtype).requires_grad_() for x in inputs]
    raw = weight.detach().to(accumulate_dtype(dtype)).requires_grad_()
    modules = [
        None if module is None else copy.deepcopy(module).to(grad.device, accumulate_dtype(dtype))
        for module in batch_norms
    ]
    out = function(leaves, raw, modules)
    out.backward(grad.to(dtype))
    results = {"out": out.detach()}
    for k, leaf in enumerate(leaves):
        assert leaf.grad is not None
        results[f"gradient of input {k}"] = leaf.grad
    results["gradient of the weight"] = torch.zeros_like(raw) if raw.grad is None else raw.grad
    for k, module in enumerate(modules):
        for name, parameter in module.named_parameters() if module is not None else []:
            assert parameter.grad is not None
            results[f"gradient of {name} {k}"] = parameter.grad
        for name, buffer in module.named_buffers() if module is not None else []:
            results[f"{name} {k}"] = buffer
    return results


def compare(
    impl: str,
    shapes: Shapes,
    inputs: Sequence[Tensor],
    pre: str = "relu",
    weighting: str = "relu",
    weight: Sequence[float] = WEIGHTINGS[0][1],
    batch_norms: Sequence[nn.Module | None] | None = None,
    grad: Tensor | None = None,
) -> Results:
    """Everything ``impl`` computes, by the three-way rule.

    The plain form computes in the accumulate dtype, so half precision is allowed no error but that of its last rounding.
    """
    dtype, device = inputs[0].dtype, inputs[0].device
    weights = torch.tensor(weight[: len(inputs)], dtype=accumulate_dtype(dtype), device=device)
    modules = [None] * len(inputs) if batch_norms is None else batch_norms
    if grad is None:
        grad = torch.randn(inputs[0].shape[0], shapes.channels, *shapes.size).to(device, dtype)
    derivatives: list[Tensor] = []

    def ours(given: list[Tensor], raw: Tensor, norms: list[Any]) -> Tensor:
        return functional.weighted_fusion(
            given,
            raw,
            resample=shapes.resample,
            pre=pre,
            weighting=weighting,
            epsilon=EPSILON,
            size=shapes.size,
            batch_norms=norms,
            impl=impl,
        )

    def plain(given: list[Tensor], raw: Tensor, norms: list[Any]) -> Tensor:
        normalised = formulas.fusion_weights(raw, weighting, EPSILON)
        normalised.register_hook(derivatives.append) if normalised.requires_grad else None
        values = [x if norm is None else norm(x) for x, norm in zip(given, norms, strict=True)]
        return formulas.weighted_fusion(values, normalised, shapes.resample, pre, shapes.size)

    before = [x.clone() for x in (*inputs, grad)]
    got = collect(ours, inputs, weights, modules, grad, dtype)
    for x, copied in zip((*inputs, grad), before, strict=True):
        assert torch.equal(x, copied), "an input was written"
    # From contiguous copies: PyTorch's own BatchNorm backward errs for some strides of maps of one sample and one row.
    copies, grad = [x.contiguous() for x in inputs], grad.contiguous()
    other = collect(plain, copies, weights, modules, grad, accumulate_dtype(dtype))
    derivatives.clear()
    truth = collect(plain, copies, weights, modules, grad, torch.float64)
    # The weight's gradient is a difference of derivatives with respect to w^, divided by the sum of the weights.
    divisor = float(weights.clamp(min=0).sum()) + EPSILON if weighting == "relu" else 1.0
    scale = max((float(d.abs().max()) for d in derivatives), default=0.0) / divisor
    assert got.keys() == truth.keys()
    for name, value in got.items():
        if not value.dtype.is_floating_point:
            assert torch.equal(value, truth[name]), name
            continue
        label = f"{name} of {shapes} pre={pre} {weighting}"
        wide = "input" in name or name == "out"
        assert value.dtype == (dtype if wide else accumulate_dtype(dtype)), label
        assert_close(value, other[name], truth[name], label, scale if name == "gradient of the weight" else 0.0)
    return got


@dataclass(frozen=True)
class FusionProblem:
    """One node; ``norms`` says of which inputs a BatchNorm is folded in and whether it trains: "", "train" or "eval"."""

    shapes: Shapes
    layout: str
    dtype: torch.dtype
    pre: str = "relu"
    weighting: tuple[str, tuple[float, ...]] = WEIGHTINGS[0]
    norms: str = ""
    without_norm: tuple[int, ...] = ()  # inputs that are not normalised all the same
    upstream: str = "contiguous"
    batch: int = 3

    @property
    def name(self) -> str:
        resample = "+".join(self.shapes.resample)
        kind = str(self.dtype).removeprefix("torch.")
        weighting, weights = self.weighting
        return ", ".join(
            [
                f"{resample} {self.shapes.channels}x{self.shapes.size}",
                f"{self.layout} and {self.upstream}",
                kind,
                self.pre,
                weighting + " of the dead" * (max(weights) <= 0),
                *([f"{self.norms} without {self.without_norm}"] if self.norms else []),
            ]
        )

    def run(self, implementation: str, device: str) -> None:
        inputs = maps(self.shapes, self.batch, self.dtype, self.layout, device)
        batch_norms: list[nn.Module | None] = [None] * len(inputs)
        if self.norms:
            batch_norms = [random_batch_norm(self.shapes.channels, self.norms == "train") for _ in inputs]
            batch_norms = [None if k in self.without_norm else norm for k, norm in enumerate(batch_norms)]
        grad = torch.randn(self.batch, self.shapes.channels, *self.shapes.size).to(device, self.dtype)
        grad = LAYOUTS[self.upstream][0](grad)
        weighting, weight = self.weighting
        compare(implementation, self.shapes, inputs, self.pre, weighting, weight, batch_norms, grad)


def _problems() -> list[FusionProblem]:
    """Every layout, dtype and kind of BatchNorm with two nodes each; all else is drawn, the same at each run.

    Nodes take turns, so that each meets every layout, every dtype and every kind of BatchNorm.
    """
    choose = random.Random(0).choice
    calls = itertools.product(LAYOUTS, DTYPES, ("", "train", "eval"), range(2))
    return [
        FusionProblem(
            NODES[(turn + turn // 18) % len(NODES)],
            layout,
            dtype,
            choose(ACTIVATIONS),
            choose(WEIGHTINGS),
            norms,
            choose([(), (0, 2), (1, 3)]),
            choose(list(LAYOUTS)),
        )
        for turn, (layout, dtype, norms, _) in enumerate(calls)
    ]


GRID = PROBLEMS = _problems()
