"""The C++ entry points with hostile arguments: a sentence or a result, never a crash. Also run under AddressSanitizer."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from frskd_fast import _extension

if _extension.cpu_library_problem() is not None:
    pytest.skip(f"no C++ kernels: {_extension.cpu_library_problem()}", allow_module_level=True)

OPERATORS = torch.ops.frskd_fast_native
ROUNDS = 1500
FLOATING = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


class Hostile:
    """Draws arguments that are right most of the time and wrong in one or two ways otherwise."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.right = 0.93  # how often one argument is right

    def often(self, value: Any, *others: Any) -> Any:
        return value if self.random.random() < self.right else self.random.choice(others)

    def size(self) -> int:
        return self.random.choice([0, 1, 1, 2, 3, 5, 8, 9, 17, 33])

    def layout(self, tensor: Tensor) -> Tensor:
        """The same shape by other strides: permuted, sliced out of larger storage, or expanded."""
        choice = self.random.randrange(5)
        if choice == 1 and tensor.dim() > 1:
            order = list(range(tensor.dim()))
            self.random.shuffle(order)
            inverse = [order.index(axis) for axis in range(len(order))]
            return tensor.permute(order).contiguous().permute(inverse)
        if choice == 2 and tensor.numel():
            storage = torch.zeros([2 * size + 1 for size in tensor.shape], dtype=tensor.dtype)
            return storage[tuple(slice(1, None, 2) for _ in tensor.shape)].copy_(tensor)
        if choice == 3 and tensor.dim() and tensor.shape[0]:
            return tensor[:1].expand(tensor.shape)
        if choice == 4 and tensor.dim() == 4 and tensor.numel():
            return tensor.contiguous(memory_format=torch.channels_last)
        return tensor

    def tensor(self, shape: list[int], dtype: torch.dtype) -> Tensor:
        shape = [self.often(size, size + 1, max(size - 1, 0)) for size in shape]
        shape = self.often(shape, shape[:-1], [*shape, 2])
        dtype = self.often(dtype, *FLOATING, torch.int64, torch.bool)
        tensor = torch.randn(shape).mul(self.often(1.0, 1e30)).to(dtype)
        return self.often(self.layout(tensor), tensor.to("meta"))

    def working(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """Numbers to be written, or those of a pass before."""
        sizes = [*shape[:-1], *(self.often(size, size + 1, max(size - 1, 0), 0) for size in shape[-1:])]
        dtype = self.often(dtype, torch.float32, torch.float64, torch.bfloat16)
        tensor = torch.full(self.often(sizes, [*sizes, 1]), float("nan"), dtype=dtype)
        return self.often(tensor, torch.stack([tensor, tensor], -1)[..., 0])

    def number(self, value: float) -> float:
        return self.often(value, float("nan"), float("inf"), -1.0, 0.0)


def _accumulate(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _attention_forward(hostile: Hostile) -> tuple[Any, ...]:
    levels, batch = hostile.often(hostile.random.choice([1, 2, 3]), 0), hostile.size()
    dtype = hostile.random.choice(FLOATING)
    sizes = [(hostile.size(), hostile.size(), hostile.size(), hostile.size()) for _ in range(levels)]
    students = [hostile.tensor([batch, c, h, w], dtype) for c, _, h, w in sizes]
    teachers = [hostile.tensor([batch, d, h, w], dtype) for _, d, h, w in sizes]
    teachers = hostile.often(teachers, teachers[:-1])
    numel = batch * sum(h * w for _, _, h, w in sizes)
    kind = _accumulate(dtype)
    coefficients = [hostile.often(hostile.working(numel, dtype=kind), None) for _ in range(2)]
    exponent = hostile.number(hostile.random.choice([1.0, 1.5, 2.0, 3.0, 4.0]))
    return students, teachers, exponent, hostile.working(levels, batch, dtype=kind), *coefficients, None


def _attention_backward(hostile: Hostile) -> tuple[Any, ...]:
    levels, batch = hostile.often(hostile.random.choice([1, 2]), 0), hostile.size()
    dtype = hostile.random.choice(FLOATING)
    sizes = [(hostile.size(), hostile.size(), hostile.size()) for _ in range(levels)]
    features = [hostile.tensor([batch, c, h, w], dtype) for c, h, w in sizes]
    gradients = [torch.empty_like(feature) if feature.device.type == "cpu" else feature for feature in features]
    gradients = hostile.often(gradients, gradients[:-1], [hostile.tensor([batch, 3, 2, 2], dtype)] * levels)
    kind = _accumulate(dtype)
    grad = hostile.tensor([levels, batch], kind)
    coefficients = hostile.working(batch * sum(h * w for _, h, w in sizes), dtype=kind)
    return grad, hostile.number(0.5), features, coefficients, hostile.number(2.0), gradients


def _attention_map(hostile: Hostile) -> tuple[Any, ...]:
    shape = [hostile.size() for _ in range(4)]
    dtype = hostile.random.choice(FLOATING)
    kind = _accumulate(dtype)
    return (
        hostile.tensor(shape, dtype),
        hostile.number(2.0),
        hostile.working(shape[0], shape[2] * shape[3], dtype=kind),
        hostile.working(shape[0], dtype=kind),
    )


def _heads(hostile: Hostile) -> dict[str, Any]:
    count = hostile.often(hostile.random.choice([1, 2]), 0)
    dtype = hostile.random.choice(FLOATING)
    kind = _accumulate(dtype)
    shapes = [[hostile.size() for _ in range(hostile.random.choice([2, 3, 4]))] for _ in range(count)]
    students = [hostile.tensor(shape, dtype) for shape in shapes]
    teachers = hostile.often([hostile.tensor(shape, dtype) for shape in shapes], [], students[:-1])
    labels = [
        hostile.layout(torch.randint(max(hostile.often(shape[1], shape[1] + 5), 1), (shape[0], *shape[2:])))
        for shape in shapes
    ]
    probabilities = [hostile.tensor(shape, kind) for shape in shapes]
    targets = hostile.random.choice([labels, labels, probabilities, []])
    targets_b = hostile.often([], labels, labels[:-1]) if targets is not labels else hostile.random.choice([[], labels])
    rows = sum(torch.Size([shape[0], *shape[2:]]).numel() for shape in shapes)
    settings = (
        hostile.number(0.3),
        hostile.often(0.1, 2.0, float("nan")),
        hostile.often(-100, 0, 1 << 62, -(1 << 62)),
        hostile.number(hostile.random.choice([1.0, 2.0, 4.0, 0.7])),
    )
    return {
        "inputs": (students, teachers, targets, targets_b, *settings),
        "count": count,
        "rows": rows,
        "kind": kind,
        "students": students,
        "teachers": teachers,
    }


def _logits_forward(hostile: Hostile) -> tuple[Any, ...]:
    heads = _heads(hostile)
    rows, kind = heads["rows"], heads["kind"]
    outputs = (
        hostile.working(4, rows, dtype=kind),
        hostile.working(6, rows, dtype=kind),
        hostile.working(heads["count"], dtype=kind),
    )
    return *heads["inputs"], *outputs


def _logits_backward(hostile: Hostile) -> tuple[Any, ...]:
    heads = _heads(hostile)
    rows, kind, count = heads["rows"], heads["kind"], heads["count"]
    strides = hostile.random.choice([(0, 0), (0, 1), (1, 0)])
    strides = hostile.often(strides, (1 << 40, 0), (-1, 5), (0, 3))
    size = max(1, 1 + (count - 1) * min(strides[0], 9) + (rows - 1) * min(strides[1], 9))
    grads = hostile.often([hostile.working(size, dtype=kind) for _ in range(3)], [])
    scales = hostile.often([1.0, 1.0, 0.5] * count, [1.0], [0.0] * (3 * count))

    def like(tensors: list[Tensor]) -> list[Tensor]:
        made = [torch.empty_like(tensor) if tensor.device.type == "cpu" else tensor for tensor in tensors]
        return hostile.often(made, [], made[:-1])

    return (
        grads,
        *strides,
        scales,
        *heads["inputs"],
        hostile.working(4, rows, dtype=kind),
        hostile.working(6, rows, dtype=kind),
        hostile.often(hostile.working(count, dtype=kind), None),
        hostile.random.random() < 0.5,
        like(heads["students"]),
        like(heads["teachers"]),
    )


def _combine(hostile: Hostile) -> tuple[Any, ...]:
    kind = hostile.random.choice([torch.float32, torch.float64])
    levels, batch, rows = hostile.size(), hostile.size(), hostile.size()
    return (
        hostile.tensor([levels, batch], kind),
        hostile.tensor([4, rows], kind),
        hostile.number(2.0),
        hostile.number(100.0),
        hostile.random.random() < 0.5,
        hostile.working(5, dtype=kind),
        [hostile.working(dtype=kind) for _ in range(hostile.often(hostile.random.choice([1, 3]), 0, 2))],
    )


class _FusionNode:
    """A node of a weighted feature pyramid: what all three of its entry points are given."""

    def __init__(self, hostile: Hostile) -> None:
        hostile.right = 0.98  # of many more arguments than elsewhere

        def side() -> int:
            return hostile.random.choice([1, 1, 2, 3, 4, 5, 9])

        self.count = hostile.often(hostile.random.choice([1, 2, 3, 4]), 0, 5)
        self.channels = hostile.often(hostile.random.choice([1, 2, 3, 8, 9, 17]), 0, 1100)
        batch, height, width = hostile.often(hostile.random.choice([1, 2, 3]), 0), side(), side()
        dtype = hostile.random.choice(FLOATING)
        self.kind = _accumulate(dtype)
        self.resamples = [hostile.random.choice([0, 0, 1, 2]) for _ in range(self.count)]
        self.inputs = []
        for resample in self.resamples:
            size = [height, width]
            if resample == 1:
                size = [hostile.random.randint(1, length) for length in size]
            elif resample == 2:
                size = [2 * length - hostile.random.randrange(2) for length in size]
            # A batch and channels that differ are drawn rarely: four inputs would seldom fit together otherwise.
            shape = hostile.often([batch, self.channels, *size], [batch + 1, self.channels + 1, *size], size)
            self.inputs.append(
                hostile.often(hostile.layout(torch.randn(shape).to(dtype)), hostile.tensor(shape, dtype))
            )
        self.out = hostile.tensor([batch, self.channels, height, width], dtype)
        self.normalised = [hostile.random.random() < 0.5 for _ in range(self.count)]
        rows = hostile.random.choice([2, 3])
        numbers = [self._numbers(hostile, *shape, self.channels) for shape in ([rows], [], [])]
        self.weight = hostile.often(
            torch.randn(self.count, dtype=self.kind), hostile.working(self.count, dtype=self.kind)
        )
        self.tensors = (hostile.often(self.inputs, self.inputs[:-1]), *numbers, self.weight)
        self.settings = (
            hostile.often(self.resamples, self.resamples[:-1], [3] * self.count, [-1] * self.count),
            *(hostile.often(hostile.random.randrange(3), -1, 3, 1 << 40) for _ in range(2)),
            hostile.number(1e-4),
        )

    def _numbers(self, hostile: Hostile, *shape: int) -> list[Tensor]:
        """Of each input so many numbers, or an empty tensor."""
        made = [
            hostile.often(
                torch.randn(shape if normalised else [0], dtype=self.kind),
                hostile.working(*shape, dtype=self.kind),
            )
            for normalised in self.normalised
        ]
        return made if hostile.random.random() < 0.98 else made[:-1]

    def sums(self, hostile: Hostile) -> list[Tensor]:
        """Of each normalised input two numbers a channel, to be written."""
        return [
            hostile.working(*((2, self.channels) if normalised else (0,)), dtype=self.kind)
            for normalised in self.normalised
        ]


def _fusion_statistics(hostile: Hostile) -> tuple[Any, ...]:
    hostile.right = 0.98
    count = hostile.often(hostile.random.choice([1, 2, 3]), 0, 5)
    dtype, batch, channels = hostile.random.choice(FLOATING), hostile.size(), hostile.often(hostile.size(), 1100)
    inputs = [hostile.tensor([batch, channels, hostile.size() % 9, 3], dtype) for _ in range(count)]
    statistics = [hostile.working(3, channels, dtype=_accumulate(dtype)) for _ in range(count)]
    epsilons = [hostile.number(1e-5) for _ in range(count)]
    return inputs, hostile.often(epsilons, epsilons[:-1], []), hostile.often(statistics, statistics[:-1]), None


def _fusion_forward(hostile: Hostile) -> tuple[Any, ...]:
    node = _FusionNode(hostile)
    return *node.tensors, *node.settings, node.out


def _convolved_node(hostile: Hostile) -> _FusionNode:
    """A node that a depthwise convolution may stand behind, more often than not."""
    node = _FusionNode(hostile)
    channels_last = [
        x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 and x.device.type == "cpu" else x
        for x in (*node.inputs, node.out)
    ]
    if hostile.random.random() < 0.9:
        *node.inputs, node.out = channels_last
        node.tensors = (node.inputs, *node.tensors[1:])
    return node


def _fused_convolution_forward(hostile: Hostile) -> tuple[Any, ...]:
    node = _convolved_node(hostile)
    return *node.tensors, *node.settings, hostile.working(node.channels, 1, 3, 3, dtype=node.kind), node.out


def _fused_convolution_backward_sums(hostile: Hostile) -> tuple[Any, ...]:
    node = _convolved_node(hostile)
    kernel, kernel_gradient = (hostile.working(node.channels, 1, 3, 3, dtype=node.kind) for _ in range(2))
    map_gradient = torch.zeros_like(node.out) if node.out.device.type == "cpu" else node.out
    map_gradient = hostile.often(map_gradient, map_gradient[..., :1], map_gradient.double(), map_gradient[:0])
    weight_gradient = hostile.working(node.count, dtype=node.kind)
    sums = hostile.often(node.sums(hostile), node.sums(hostile)[:-1])
    return node.out, *node.tensors, *node.settings, kernel, sums, weight_gradient, kernel_gradient, map_gradient


def _fusion_backward_sums(hostile: Hostile) -> tuple[Any, ...]:
    node = _FusionNode(hostile)
    weight_gradient = hostile.working(node.count, dtype=node.kind)
    sums = hostile.often(node.sums(hostile), node.sums(hostile)[:-1])
    return node.out, *node.tensors, *node.settings, sums, weight_gradient, None


def _fusion_backward(hostile: Hostile) -> tuple[Any, ...]:
    node = _FusionNode(hostile)
    sums = [
        hostile.often(
            torch.randn(2, node.channels, dtype=node.kind), hostile.working(2, node.channels, dtype=node.kind)
        )
        if normalised and hostile.random.random() < 0.7
        else torch.zeros(0, dtype=node.kind)
        for normalised in node.normalised
    ]
    sums = hostile.often(sums, sums[:-1], [torch.zeros(2, node.channels, dtype=node.kind)] * node.count)
    positions = sorted(hostile.random.sample(range(node.count), hostile.random.randint(0, node.count)))
    wanted = [node.inputs[place] for place in positions]
    gradients = [hostile.layout(torch.zeros_like(x)) if x.device.type == "cpu" else x for x in wanted]
    gradients = [hostile.often(gradient, gradient[..., :1], gradient.double()) for gradient in gradients]
    return (
        node.out,
        *node.tensors,
        hostile.often(sums, sums[:-1]),
        *node.settings,
        hostile.often(
            positions, positions[:-1], [0] * len(positions), [-1] * len(positions), [1 << 40] * len(positions)
        ),
        hostile.often(gradients, gradients[:-1]),
        hostile.random.choice([None, hostile.working(node.count, dtype=node.kind)]),
        None,
    )


def _assert_names_an_argument(operator: Any, message: str) -> None:
    """ "function, file:line, argument[position] ..., but ... wanted.": the sentence of an entry point."""
    names = "|".join(argument.name for argument in operator._schema.arguments)
    sentence = rf"\w+, \S+:\d+, ({names})(\[\d+\])?[ ,].*(wanted|must|given|has|names|goes).*\."
    assert re.fullmatch(sentence, message.split("\nException raised from")[0].strip()), message


@pytest.mark.parametrize(
    ("name", "draw"),
    [
        ("attention_forward", _attention_forward),
        ("attention_backward", _attention_backward),
        ("attention_map", _attention_map),
        ("logits_forward", _logits_forward),
        ("logits_backward", _logits_backward),
        ("combine", _combine),
        ("fusion_statistics", _fusion_statistics),
        ("fusion_forward", _fusion_forward),
        ("fusion_backward_sums", _fusion_backward_sums),
        ("fusion_backward", _fusion_backward),
        ("fused_convolution_forward", _fused_convolution_forward),
        ("fused_convolution_backward_sums", _fused_convolution_backward_sums),
    ],
)
def test_hostile_arguments_end_in_a_sentence_or_a_result(name: str, draw: Callable[[Hostile], tuple[Any, ...]]) -> None:
    operator = getattr(OPERATORS, name).default
    outcomes = {"result": 0, "refused": 0}
    for seed in range(ROUNDS):
        arguments = draw(Hostile(seed))
        try:
            operator(*arguments)
            outcomes["result"] += 1
        except (RuntimeError, NotImplementedError) as error:
            # NotImplementedError: PyTorch found a tensor on another device than the CPU.
            if isinstance(error, NotImplementedError):
                assert operator.name() in str(error)
            else:
                _assert_names_an_argument(operator, str(error))
            outcomes["refused"] += 1
    # Both ends of the entry point were reached, else the test would prove nothing.
    assert min(outcomes.values()) > ROUNDS // 20, outcomes
