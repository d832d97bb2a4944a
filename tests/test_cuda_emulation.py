"""The CUDA sources, compiled by a plain C++ compiler and run thread by thread on the CPU (cuda_emulation/).

What this proves without a GPU: values and gradients, every layout and launch plan, bounds of the outputs, barriers and shuffles
that every thread reaches, and results that do not depend on the order in which the threads run between two barriers.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import formulas
import pytest
import torch
from numerics import assert_close
from problems import Problem
from problems import attention as attention_problems
from problems import combine as combine_problems
from torch import Tensor

from frskd_fast import functional
from frskd_fast.losses import FRSKDLoss
from frskd_fast.native import attention as native_attention
from frskd_fast.native import combine as native_combine
from frskd_fast.native import fusion as native_fusion
from frskd_fast.native import logits as native_logits
from frskd_fast.reference import fusion as reference_fusion

ROOT = Path(__file__).resolve().parent.parent
HERE = ROOT / "tests" / "cuda_emulation"
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# channels of the student, of the teacher, height, width: one pixel; one channel; packs of 4 and 8; half packs; no packs; more
# packs than threads; channels in packs, and with a rest.
LEVELS = [(5, 3, 1, 1), (1, 2, 3, 5), (33, 66, 4, 4), (9, 6, 6, 6), (7, 9, 5, 9), (16, 8, 48, 52), (64, 12, 8, 8)]
EVERY_SM_IDLE = "100000000"  # so many multiprocessors that one block per sample never pays: the tiled plan


def _library() -> Path:
    compiler = shutil.which("g++")
    if compiler is None or sys.platform != "linux":
        pytest.skip("needs g++ on Linux to compile the emulated kernels")
    sources = [*sorted((ROOT / "csrc" / "cuda").glob("*.cu*")), *sorted((ROOT / "csrc" / "common").glob("*.h"))]
    sources += [
        ROOT / "csrc" / "bindings.cpp",
        ROOT / "csrc" / "operation.h",
        *sorted((ROOT / "csrc" / "operations").iterdir()),
        *sorted(HERE.iterdir()),
    ]
    digest = hashlib.sha256(torch.__version__.encode())
    for source in sources:
        digest.update(source.read_bytes())
    folder = ROOT / "build" / "cuda_emulation" / digest.hexdigest()[:16]
    library = folder / "libemulated.so"
    if library.exists():
        return library
    folder.mkdir(parents=True, exist_ok=True)
    torch_root = Path(torch.__file__).parent
    # The schemas of csrc/bindings.cpp are registered again under another name.
    flags = [
        "-std=c++17",
        "-O1",
        "-fPIC",
        "-fvisibility=hidden",
        "-fno-strict-aliasing",
        "-Wall",
        "-Werror",
        "-Wno-unknown-pragmas",
    ]
    flags += [
        "-DUSE_CUDA",
        "-DTORCH_TARGET_VERSION=0x020b000000000000",
        "-Dfrskd_fast_native=frskd_fast_emulated",
        "-DFRSKD_EMULATED",
    ]
    flags += [f"-I{HERE}", "-isystem", str(torch_root / "include")]
    objects = []
    for name in ("csrc/cuda/attention.cu", "csrc/cuda/logits.cu", "csrc/cuda/fusion.cu", "csrc/cuda/combine.cu",
                 "csrc/bindings.cpp", "tests/cuda_emulation/emulation.cpp"):  # fmt: skip
        objects.append(folder / f"{name.replace('/', '_')}.o")
        command = [compiler, *flags, "-x", "c++", "-c", str(ROOT / name), "-o", str(objects[-1])]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, f"{name} does not compile:\n{done.stderr}"
    # -Bsymbolic: the emulation's stand-ins for PyTorch's CUDA functions win over PyTorch's own.
    link = [
        compiler,
        "-shared",
        "-Wl,-Bsymbolic",
        *map(str, objects),
        f"-L{torch_root / 'lib'}",
        "-ltorch",
        "-ltorch_cpu",
    ]
    partial = folder / "partial.so"
    done = subprocess.run([*link, "-lc10", "-o", str(partial)], capture_output=True, text=True)
    assert done.returncode == 0, f"the emulated kernels do not link:\n{done.stderr}"
    partial.rename(library)
    return library


@pytest.fixture(scope="module")
def operations() -> Any:
    """``torch.ops`` namespace of the emulated kernels."""
    torch.ops.load_library(str(_library()))
    return torch.ops.frskd_fast_emulated


def _fusion_workspace(inputs: list[Tensor]) -> Tensor:
    dtype = reference_fusion.accumulate_dtype(inputs[0].dtype)
    return torch.empty(native_fusion.workspace_size(inputs), dtype=dtype)


@pytest.fixture
def emulated(operations: Any, monkeypatch: pytest.MonkeyPatch, poisoned_empty: None) -> Iterator[None]:
    """``impl="cpu"`` runs the emulated CUDA kernels; outputs start as NaN; a workspace is given as on a device."""

    def attention_forward(students: list[Tensor], teachers: list[Tensor], exponent: float, *outputs: Any) -> None:
        numel = sum(student.shape[0] * student.shape[2] * student.shape[3] for student in students)
        workspace = torch.empty(2 * numel, dtype=outputs[0].dtype)
        operations.attention_forward.default(students, teachers, exponent, *outputs[:-1], workspace)

    replacement = SimpleNamespace(
        attention_forward=SimpleNamespace(default=attention_forward),
        attention_backward=operations.attention_backward,
        attention_map=operations.attention_map,
    )
    monkeypatch.setattr(native_attention, "_ops", replacement)
    monkeypatch.setattr(native_logits, "_ops", operations)
    monkeypatch.setattr(native_combine, "_ops", operations)
    monkeypatch.setattr(native_fusion, "_ops", operations)
    monkeypatch.setattr(native_fusion, "_workspace", _fusion_workspace)
    # The CPU library need not be built for this.
    monkeypatch.setattr("frskd_fast._extension.cpu_library_problem", lambda: None)
    yield


def _channels_last(feature: Tensor) -> Tensor:
    return feature.contiguous(memory_format=torch.channels_last)


def _sliced(feature: Tensor) -> Tensor:
    n, c, h, w = feature.shape
    storage = torch.full((n + 1, c + 2, h + 1, w + 4), float("nan"), dtype=feature.dtype)
    view = storage[1:, 1:-1, 1:, 4:]
    view.copy_(feature)
    return view


def _sliced_channels_last(feature: Tensor) -> Tensor:
    return _sliced(feature.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def _transposed(feature: Tensor) -> Tensor:
    return feature.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda feature: feature,
    "channels_last": _channels_last,
    "sliced": _sliced,
    "sliced_channels_last": _sliced_channels_last,
    "transposed": _transposed,
    "expanded": lambda feature: feature[:1].expand(feature.shape),
}


def _pyramids(layout: str, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    change = LAYOUTS[layout]
    students = [change(torch.randn(2, c, h, w).to(dtype)) for c, _, h, w in LEVELS]
    teachers = [change(torch.randn(2, d, h, w).to(dtype)) for _, d, h, w in LEVELS]
    return students, teachers


def _with_gradients(
    function: Callable[[list[Tensor]], Tensor], inputs: list[Tensor], grad: Tensor, dtype: torch.dtype
) -> list[Tensor]:
    leaves = [tensor.detach().to(dtype).requires_grad_() for tensor in inputs]
    result = function(leaves)
    result.backward(grad.to(result.dtype))
    gradients = []
    for leaf in leaves:
        assert leaf.grad is not None
        gradients.append(leaf.grad)
    return [result.detach(), *gradients]


def _three_way(
    ours: Callable[[list[Tensor]], Tensor], plain: Callable[[list[Tensor]], Tensor], inputs: list[Tensor], rows: Any
) -> None:
    dtype = inputs[0].dtype
    grad = torch.randn(rows)
    results = _with_gradients(ours, inputs, grad, dtype)
    plains = _with_gradients(plain, inputs, grad, dtype)
    truths = _with_gradients(plain, inputs, grad, torch.float64)
    for index, (result, plain_result, truth) in enumerate(zip(results, plains, truths, strict=True)):
        assert_close(result, plain_result, truth, "losses" if index == 0 else f"gradient {index - 1}")


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("multiprocessors", ["1", EVERY_SM_IDLE], ids=["fused", "tiled"])
@pytest.mark.parametrize("problem", attention_problems.PROBLEMS, ids=lambda problem: problem.name)
def test_attention(problem: Problem, multiprocessors: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With one multiprocessor a single launch reads, compares and differentiates; with idle ones maps are cut into tiles."""
    monkeypatch.setenv("EMULATION_MULTIPROCESSORS", multiprocessors)
    problem.run("cpu", "cpu")


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("problem", combine_problems.PROBLEMS, ids=lambda problem: problem.name)
def test_combine(problem: Problem) -> None:
    problem.run("cpu", "cpu")


# 8 lanes a row; 32; 256, unpacked and packed; a map with classes last; a map with pixels last; a transposed matrix; (N, K, W).
LOGITS: dict[str, Callable[[], Tensor]] = {
    "few classes": lambda: torch.randn(37, 10),
    "one class": lambda: torch.randn(3, 1),
    "a warp": lambda: torch.randn(11, 100),
    "a block": lambda: torch.randn(3, 1003),
    "a block of packs": lambda: torch.randn(3, 2064),
    "channels_last map": lambda: torch.randn(2, 24, 5, 7).contiguous(memory_format=torch.channels_last),
    "map": lambda: torch.randn(2, 21, 9, 17),
    "sliced map": lambda: torch.randn(3, 23, 9, 20)[1:, 2:, :, 3:],
    "transposed": lambda: torch.randn(19, 70).t(),
    "sequence": lambda: torch.randn(2, 6, 40),
    "wide strides": lambda: torch.randn(6, 8, 2)[..., 0],
}
KINDS = ["labels", "mix", "probabilities", "none"]


def _labels(kind: str, student: Tensor) -> Any:
    classes = student.shape[1]
    shape = (student.shape[0], *student.shape[2:])
    first = torch.randint(classes, shape)
    first[torch.rand(shape) < 0.2] = -100
    if kind == "labels":
        return first
    if kind == "mix":
        second = torch.randint(classes, shape)
        second[torch.rand(shape) < 0.2] = -100
        return first, second, 0.3
    return torch.rand(student.shape).softmax(1) if kind == "probabilities" else None


def _distribution(targets: Any, student: Tensor) -> Tensor:
    def one_hot(labels: Tensor) -> Tensor:
        return formulas.label_distribution(labels, student.shape[1], -100, student.dtype)

    if isinstance(targets, tuple):
        return targets[2] * one_hot(targets[0]) + (1 - targets[2]) * one_hot(targets[1])
    return targets.to(student.dtype) if targets.dtype.is_floating_point else one_hot(targets)


def _rows(inputs: list[Tensor], targets: Any, temperature: float, smoothing: float) -> Tensor:
    """CE(student), CE(teacher) and KD of every row by the plain formulas: (3, N, ...)."""
    student, teacher = inputs
    kd = formulas.divergence(student, teacher, temperature)
    if targets is None:
        return torch.stack([kd * 0, kd * 0, kd])
    distribution = _distribution(targets, student)
    probabilities = isinstance(targets, Tensor) and targets.dtype.is_floating_point
    mass = 1.0 if probabilities else distribution.sum(1, keepdim=True)
    ces = [formulas.cross_entropy(logits, distribution, mass, smoothing) for logits in inputs]
    return torch.stack([*ces, kd])


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize(("smoothing", "temperature"), [(0.0, 4.0), (0.1, 1.0)])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize("case", LOGITS)
def test_logits(case: str, dtype: torch.dtype, kind: str, smoothing: float, temperature: float) -> None:
    student = 3 * LOGITS[case]().to(dtype)
    teacher = 3 * LOGITS[case]().to(dtype)
    targets = _labels(kind, student)

    def ours(inputs: list[Tensor]) -> Tensor:
        labels = targets
        if kind == "probabilities":
            labels = targets.double() if inputs[0].dtype == torch.float64 else targets
        return torch.stack(
            functional.cross_entropy_kd(
                inputs[0], inputs[1], labels, temperature=temperature, label_smoothing=smoothing, reduction="none",
                detach_teacher=False, impl="cpu",
            )
        )  # fmt: skip

    def plain(inputs: list[Tensor]) -> Tensor:
        return _rows(inputs, targets, temperature, smoothing)

    _three_way(ours, plain, [student, teacher], (3, student.shape[0], *student.shape[2:]))


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("kind", ["labels", "probabilities", "none"])
def test_mean_over_many_rows(kind: str) -> None:
    """Heads of more than 4096 rows count their labels in launches of their own; a small head beside them does not."""
    students = [torch.randn(3, 3, 40, 41), torch.randn(5, 3), torch.randn(5000, 3)]
    teachers = [torch.randn_like(student) for student in students]
    targets = [_labels(kind, student) for student in students]
    labels = None if kind == "none" else targets
    parts = functional.cross_entropy_kd(students, teachers, labels, impl="cpu")
    for head, (student, teacher) in enumerate(zip(students, teachers, strict=True)):
        rows = _rows([student.double(), teacher.double()], targets[head], 4.0, 0.0)
        kept = (targets[head] != -100).sum() if kind == "labels" else rows[0].numel()
        for part, row, divisor in zip(parts, rows, (kept, kept, rows[0].numel()), strict=True):
            torch.testing.assert_close(part[head].double(), row.sum() / divisor, rtol=1e-5, atol=1e-6)


def test_two_label_counts(operations: Any) -> None:
    logits = torch.randn(9001, 3)
    first, second, mix = _labels("mix", logits)
    losses, statistics, inverse_valid = torch.empty(4, 9001), torch.empty(6, 9001), torch.empty(1)
    operations.logits_forward.default(
        [logits], [], [first], [second], mix, 0.0, -100, 1.0, losses, statistics, inverse_valid
    )
    weight = mix * (first != -100).sum() + (1 - mix) * (second != -100).sum()
    torch.testing.assert_close(inverse_valid[0], (1 / weight).float())
    torch.testing.assert_close(losses[3].double().sum(), weight.double(), rtol=1e-5, atol=0)


@pytest.mark.usefixtures("emulated")
def test_more_heads_than_one_launch_holds() -> None:
    students = [torch.randn(3 + head, 2 + 40 * head) for head in range(19)]
    teachers = [torch.randn_like(student) for student in students]
    targets = [_labels("labels", student) for student in students]
    leaves = [logits.clone().requires_grad_() for logits in students + teachers]
    parts = functional.cross_entropy_kd(leaves[:19], leaves[19:], targets, detach_teacher=False, impl="cpu")
    weights = torch.randn(3, 19)
    sum((part * weight).sum() for part, weight in zip(parts, weights, strict=True)).backward()
    for head in range(19):
        pair = [students[head].clone().requires_grad_(), teachers[head].clone().requires_grad_()]
        # A list of one head is reduced by another kernel than a list of several: an empty second head keeps them alike.
        empty = torch.empty(0, 1)
        logits, nothing = ([pair[k], empty] for k in range(2)), torch.empty(0, dtype=torch.int64)
        single = functional.cross_entropy_kd(*logits, [targets[head], nothing], detach_teacher=False, impl="cpu")
        sum(part[0] * weight[head] for part, weight in zip(single, weights, strict=True)).backward()
        for part, value in zip(parts, single, strict=True):
            torch.testing.assert_close(part[head], value[0], rtol=0, atol=0)
        assert torch.equal(leaves[head].grad, pair[0].grad)
        assert torch.equal(leaves[19 + head].grad, pair[1].grad)


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("case", ["few classes", "a warp", "a block", "map"])
def test_a_label_that_is_no_class_spoils_its_row_alone(case: str) -> None:
    student = LOGITS[case]().requires_grad_()
    targets = torch.zeros((student.shape[0], *student.shape[2:]), dtype=torch.int64)
    targets.view(-1)[0] = student.shape[1]
    targets.view(-1)[1] = -5
    targets.view(-1)[2] = 2**62
    ce = functional.cross_entropy_kd(student, None, targets, reduction="none", impl="cpu").ce_student
    ce.backward(torch.ones_like(ce))
    spoiled = torch.zeros_like(targets, dtype=torch.bool)
    spoiled.view(-1)[:3] = True
    assert student.grad is not None
    assert torch.equal(ce.isnan(), spoiled)
    assert torch.equal(student.grad.isnan().all(1), spoiled)
    assert torch.equal(student.grad.isnan().any(1), spoiled)


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("targets", ["labels", "mix", "none"])
def test_whole_objective(targets: str) -> None:
    students, teachers = _pyramids("channels_last", torch.float32)
    logits = [torch.randn(2, 10), torch.randn(2, 10)]
    labels = _labels(targets, logits[0])

    def run(impl: str, dtype: torch.dtype) -> list[Tensor]:
        leaves = [tensor.detach().to(dtype).requires_grad_() for tensor in [*logits, *students]]
        loss = FRSKDLoss(2.0, 100.0, 4.0, impl=impl)
        parts = loss(leaves[0], leaves[1], leaves[2:], [t.to(dtype) for t in teachers], labels, return_parts=True)
        parts.loss.backward()
        return [*parts, *(leaf.grad for leaf in leaves if leaf.grad is not None)]

    results = run("cpu", torch.float32)
    for ours, plain, truth in zip(
        results, run("reference", torch.float32), run("reference", torch.float64), strict=True
    ):
        assert_close(ours.detach(), plain.detach(), truth.detach(), str(tuple(truth.shape)))


class Fusion(NamedTuple):
    """One node of the pyramid."""

    channels: int
    size: tuple[int, int]
    inputs: tuple[tuple[str, int, int], ...]  # resample, height, width
    pre: str = "relu"
    act: str = "none"
    weighting: str = "relu"
    weight: tuple[float, ...] = (1.0, 0.7, 0.4, 1.3)
    normalised: tuple[int, ...] = ()  # positions of the inputs with a BatchNorm
    training: bool = True
    batch: int = 2


ALL = (0, 1, 2, 3)
# Even sizes, halved and doubled; odd ones; a ratio that is not exact; channels in packs of 8, of 4 and of none.
FUSIONS: dict[str, Fusion] = {
    "top down": Fusion(16, (8, 8), (("none", 8, 8), ("up", 4, 4))),
    "bottom up": Fusion(16, (4, 8), (("none", 4, 8), ("none", 4, 8), ("pool", 8, 16)), "none", weighting="relu_or_uniform"),
    "odd": Fusion(5, (4, 9), (("pool", 7, 17), ("up", 3, 5), ("none", 4, 9)), "silu", weighting="softmax"),
    "half packs": Fusion(12, (5, 3), (("pool", 10, 6), ("up", 2, 1), ("up", 5, 2), ("pool", 9, 5)), "none", "relu"),
    "after": Fusion(8, (3, 8), (("none", 3, 8), ("pool", 5, 16), ("up", 3, 4)), "none", "silu", "softmax"),
    "both": Fusion(3, (4, 4), (("up", 2, 3), ("pool", 8, 7)), "silu", "silu", "sum"),
    "dead": Fusion(2, (4, 6), (("none", 4, 6),) * 2, weighting="relu_or_uniform", weight=(-0.5, 0.0)),
    "all dead": Fusion(2, (2, 3), (("none", 2, 3),) * 2, weighting="relu", weight=(-0.5, 0.0), act="relu"),
    "one dead": Fusion(8, (2, 2), (("none", 2, 2), ("pool", 4, 4), ("none", 2, 2)), weight=(-0.5, 2.0, 0.7)),
    "one pixel": Fusion(1, (1, 1), (("none", 1, 1), ("pool", 1, 1), ("pool", 2, 2)), weighting="softmax"),
    "alone": Fusion(9, (3, 5), (("none", 3, 5),), "silu", weighting="sum"),
    "normalised": Fusion(
        16, (4, 8), (("none", 4, 8), ("up", 2, 4), ("pool", 8, 16)), normalised=ALL, weighting="relu_or_uniform"
    ),
    "normalised odd": Fusion(5, (4, 9), (("pool", 7, 17), ("up", 3, 5), ("none", 4, 9)), "none", "relu", normalised=(0, 1)),
    "normalised half packs": Fusion(
        12, (5, 3), (("pool", 10, 6), ("none", 5, 3), ("up", 5, 2)), "silu", "silu", "softmax", normalised=(0, 2)
    ),
    "normalised sum": Fusion(8, (5, 8), (("none", 5, 8), ("up", 5, 4)), weighting="sum", normalised=(1,)),
    "running statistics": Fusion(
        8, (4, 4), (("none", 4, 4), ("pool", 8, 8), ("up", 2, 2)), normalised=(0, 1, 2), training=False
    ),
}  # fmt: skip
STEP = 1e-4  # added to the sum of the weights
VARIANCE_STEP = 1e-5


class FusionTensors(NamedTuple):
    """What goes into one node."""

    inputs: list[Tensor]
    statistics: list[Tensor | None]  # running ones
    gammas: list[Tensor | None]
    betas: list[Tensor | None]
    weight: Tensor
    grad: Tensor


def _fusion_tensors(node: Fusion, layout: str, dtype: torch.dtype) -> FusionTensors:
    change, numbers = LAYOUTS[layout], reference_fusion.accumulate_dtype(dtype)
    shape = (node.batch, node.channels)
    inputs = [change((torch.randn(*shape, h, w) + 0.3).to(dtype)) for _, h, w in node.inputs]
    used = [position in node.normalised for position in range(len(inputs))]

    def channel_numbers(make: Callable[[], Tensor]) -> list[Tensor | None]:
        return [make().to(numbers) if normalised else None for normalised in used]

    statistics = channel_numbers(lambda: torch.stack([torch.randn(shape[1]) / 4, torch.rand(shape[1]) + 0.5]))
    gammas = channel_numbers(lambda: torch.randn(shape[1]))
    betas = channel_numbers(lambda: torch.randn(shape[1]))
    grad = change(torch.randn(*shape, *node.size).to(dtype))
    return FusionTensors(inputs, statistics, gammas, betas, torch.tensor(node.weight[: len(inputs)]).to(numbers), grad)


def _fusion_by_autograd(node: Fusion, tensors: FusionTensors, dtype: torch.dtype) -> dict[str, Tensor]:
    """Values and gradients of the specification in ``dtype``."""
    numbers = reference_fusion.accumulate_dtype(dtype)

    def leaves(given: list[Tensor | None] | list[Tensor], to: torch.dtype) -> list[Any]:
        return [None if tensor is None else tensor.detach().to(to).clone().requires_grad_() for tensor in given]

    inputs, weight = leaves(tensors.inputs, dtype), leaves([tensors.weight], numbers)[0]
    gammas, betas = leaves(tensors.gammas, numbers), leaves(tensors.betas, numbers)
    statistics: list[Any] = [None if rows is None else rows.to(numbers) for rows in tensors.statistics]
    if node.training:
        for position in node.normalised:
            if position < len(inputs):
                statistics[position] = reference_fusion.batch_statistics(inputs[position], VARIANCE_STEP)
    resamples = [resample for resample, _, _ in node.inputs]
    out = reference_fusion.fuse(
        inputs, statistics, gammas, betas, weight, resamples, node.pre, node.act, node.weighting, STEP, node.size
    )
    out.backward(tensors.grad.to(dtype))
    results = {"out": out.detach()}
    for position, (x, rows, gamma, beta) in enumerate(zip(inputs, statistics, gammas, betas, strict=True)):
        results[f"inputs[{position}]"] = x.grad
        if gamma is not None:
            results[f"statistics[{position}]"] = rows.detach()[:2]
            results[f"sums[{position}]"] = torch.stack([beta.grad, gamma.grad])
    results["weight"] = torch.zeros_like(weight) if weight.grad is None else weight.grad
    return results


def _fusion_by_kernels(node: Fusion, tensors: FusionTensors) -> dict[str, Tensor]:
    """The same by the raw functions, each called as an autograd function would."""
    inputs, weight, grad = tensors.inputs, tensors.weight, tensors.grad
    empty = weight.new_empty(0)
    statistics = [empty if rows is None else rows for rows in tensors.statistics]
    gammas = [empty if gamma is None else gamma for gamma in tensors.gammas]
    betas = [empty if beta is None else beta for beta in tensors.betas]
    normalised = [position for position, rows in enumerate(statistics) if rows.numel()]
    if node.training and normalised:
        measured = native_fusion.batch_statistics([inputs[i] for i in normalised], [VARIANCE_STEP] * len(normalised))
        for position, rows in zip(normalised, measured, strict=True):
            statistics[position] = rows
    resamples = [reference_fusion.RESAMPLES.index(resample) for resample, _, _ in node.inputs]
    pre, act = (reference_fusion.ACTIVATIONS.index(name) for name in (node.pre, node.act))
    options = (resamples, pre, act, reference_fusion.WEIGHTINGS.index(node.weighting), STEP)
    affine = (statistics, gammas, betas, weight)
    out = native_fusion.forward(inputs, *affine, *options, node.size)
    sums = [empty] * len(inputs)
    results = {"out": out}
    if normalised:
        sums, results["weight"] = native_fusion.backward_sums(grad, inputs, *affine, *options)
        for position in normalised:
            results[f"statistics[{position}]"] = statistics[position][:2]
            results[f"sums[{position}]"] = sums[position]
    used = sums if node.training else [empty] * len(inputs)
    need = [True] * len(inputs)
    gradients, weight_gradient = native_fusion.backward(
        grad, inputs, *affine, used, *options, need, not (normalised and node.training)
    )
    results |= {f"inputs[{position}]": gradient for position, gradient in enumerate(gradients)}
    if weight_gradient.numel():
        results["weight"] = weight_gradient
    return results


def _fusion_three_way(label: str, node: Fusion, tensors: FusionTensors) -> dict[str, Tensor]:
    ours = _fusion_by_kernels(node, tensors)
    plain = _fusion_by_autograd(node, tensors, tensors.grad.dtype)
    truth = _fusion_by_autograd(node, tensors, torch.float64)
    assert ours.keys() == truth.keys()
    for key, value in ours.items():
        assert_close(value, plain[key], truth[key], f"{label}: {key}")
    return ours


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_fusion(layout: str, dtype: torch.dtype) -> None:
    for name, node in FUSIONS.items():
        torch.manual_seed(zlib.crc32(name.encode()))
        tensors = _fusion_tensors(node, layout, dtype)
        ours = _fusion_three_way(name, node, tensors)
        first = tensors.inputs[0]
        if not first.is_contiguous() and first.is_contiguous(memory_format=torch.channels_last):
            assert ours["out"].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_fusion_of_maps_that_several_blocks_share(layout: str) -> None:
    inputs = (("none", 48, 48), ("up", 16, 24), ("pool", 95, 96))
    node = Fusion(4, (48, 48), inputs, weighting="relu_or_uniform", normalised=ALL, batch=3)
    _fusion_three_way(layout, node, _fusion_tensors(node, layout, torch.float32))
    plain = node._replace(normalised=(), batch=1)
    _fusion_three_way(layout, plain, _fusion_tensors(plain, layout, torch.float32))


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
def test_fusion_with_parameters_cut_from_a_larger_buffer(dtype: torch.dtype) -> None:
    """They do not begin at a multiple of 16 bytes, so channels may not be read in packs."""
    for training in (True, False):
        node = FUSIONS["normalised"]._replace(training=training)
        tensors = _fusion_tensors(node, "channels_last", dtype)
        numbers = tensors.weight.dtype
        gammas = [torch.randn(node.channels + 1, dtype=numbers)[1:] for _ in tensors.inputs]
        statistics = [(torch.rand(2 * node.channels + 1, dtype=numbers) + 0.5)[1:].view(2, -1) for _ in tensors.inputs]
        _fusion_three_way(str(training), node, tensors._replace(gammas=gammas, statistics=statistics))


@pytest.mark.usefixtures("emulated")
def test_fusion_of_an_empty_batch() -> None:
    for name in ("bottom up", "normalised", "after"):
        node = FUSIONS[name]._replace(batch=0, training=False)
        ours = _fusion_by_kernels(node, _fusion_tensors(node, "contiguous", torch.float32))
        for key, value in ours.items():
            assert value.numel() == 0 or key.startswith("statistics") or bool((value == 0).all()), key


@pytest.mark.usefixtures("emulated")
def test_fusion_gives_the_gradients_asked_for() -> None:
    node = FUSIONS["bottom up"]
    tensors = _fusion_tensors(node, "contiguous", torch.float32)
    affine = ([torch.empty(0)] * 3, [torch.empty(0)] * 3, [torch.empty(0)] * 3, tensors.weight)
    options = ([0, 0, 2], 0, 0, 3, STEP)

    def run(need: list[bool], need_weight: bool) -> tuple[list[Tensor], Tensor]:
        sums = [torch.empty(0)] * 3
        return native_fusion.backward(tensors.grad, tensors.inputs, *affine, sums, *options, need, need_weight)

    gradients, weight_gradient = run([True] * 3, True)
    for need in ([True, False, True], [False, False, True], [False] * 3):
        for need_weight in (True, False):
            some, weight = run(need, need_weight)
            wanted = [gradient for gradient, needed in zip(gradients, need, strict=True) if needed]
            assert all(map(torch.equal, some, wanted))
            assert len(some) == len(wanted)
            assert torch.equal(weight, weight_gradient) if need_weight else weight.numel() == 0


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("pre", ["none", "relu", "silu"])
def test_fusion_shows_nan_and_infinity(pre: str, layout: str) -> None:
    node = Fusion(8, (4, 8), (("none", 4, 8), ("up", 2, 4), ("pool", 7, 15)), pre, "relu")
    for position in range(3):
        for spoil in (float("nan"), float("inf")):
            tensors = _fusion_tensors(node, layout, torch.float32)
            tensors.inputs[position][0, 1, 1, 2] = spoil
            ours = _fusion_by_kernels(node, tensors)
            plain = _fusion_by_autograd(node, tensors, torch.float32)
            for key in ("out", "inputs[0]", "inputs[1]", "inputs[2]"):
                torch.testing.assert_close(ours[key], plain[key], rtol=1e-4, atol=1e-5, equal_nan=True)


@pytest.mark.usefixtures("emulated")
def test_the_first_of_equal_maxima_gets_the_gradient() -> None:
    """Padding included: zeros at the border win over later zeros."""
    node = Fusion(8, (4, 4), (("pool", 7, 8),), "none", weighting="sum")
    for layout in ("contiguous", "channels_last"):
        tensors = _fusion_tensors(node, layout, torch.float16)
        tensors.inputs[0].copy_(torch.randint(-1, 2, tensors.inputs[0].shape))
        _fusion_three_way(layout, node, tensors)


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed"])
def test_fusion_statistics_of_hard_channels(layout: str, dtype: torch.dtype) -> None:
    """Far from zero, starting with an outlier, constant, and with a first column of its own."""
    x = torch.randn(3, 8, 13, 16)
    x[:, 0] += 1000
    x[0, 1, 0, 0] = 1e4
    x[:, 2] = 3.0
    x[:, 3, :, 0] = 500.0
    x[:, 4] *= 1e-3
    x[:, 5] = x[:, 5] * 1e-2 + 100
    x = LAYOUTS[layout](x.to(dtype))
    mean, inverse_deviation, variance = native_fusion.batch_statistics([x], [VARIANCE_STEP])[0]
    true_mean, true_deviation, true_variance = reference_fusion.batch_statistics(x.double(), VARIANCE_STEP)
    tolerance = 1e-12 if dtype == torch.float64 else 3e-6
    torch.testing.assert_close(mean.double(), true_mean, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(variance.double(), true_variance, rtol=10 * tolerance, atol=0)
    torch.testing.assert_close(inverse_deviation.double(), true_deviation, rtol=10 * tolerance, atol=0)


@pytest.mark.usefixtures("emulated")
def test_fusion_bits_do_not_depend_on_the_order_of_the_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for order in ("ascending", "descending", "shuffled"):
        monkeypatch.setenv("EMULATION_ORDER", order)
        torch.manual_seed(3)
        results.append({})
        for name in ("bottom up", "odd", "normalised", "normalised half packs"):
            for layout, dtype in (("contiguous", torch.float32), ("channels_last", torch.float16)):
                ours = _fusion_by_kernels(FUSIONS[name], _fusion_tensors(FUSIONS[name], layout, dtype))
                results[-1] |= {f"{name} {layout} {key}": value for key, value in ours.items()}
    for key, value in results[0].items():
        assert torch.equal(value, results[1][key]), key
        assert torch.equal(value, results[2][key]), key


def _everything() -> list[Tensor]:
    """One result of every kernel and plan, from fixed inputs."""
    torch.manual_seed(3)
    results = []
    for dtype in (torch.float32, torch.float16):
        for layout in ("contiguous", "channels_last"):
            students, teachers = _pyramids(layout, dtype)
            leaves = [feature.requires_grad_() for feature in students]
            rows = functional.attention_transfer(leaves, teachers, 2.0, "none", impl="cpu")
            rows.backward(torch.randn_like(rows))
            results += [rows.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]
            results.append(functional.attention_map(teachers[5], impl="cpu"))
    for case in LOGITS:
        for kind in ("labels", "probabilities"):
            student, teacher = LOGITS[case]().requires_grad_(), LOGITS[case]()
            targets = _labels(kind, student)
            parts = functional.cross_entropy_kd(student, teacher, targets, reduction="none", impl="cpu")
            torch.stack(parts).backward(torch.randn(3, *parts.kd.shape))
            assert student.grad is not None
            results += [*(part.detach() for part in parts), student.grad]
    many = torch.randn(9001, 3)
    results.append(functional.cross_entropy_kd(many, None, _labels("labels", many), impl="cpu").ce_student)
    return results


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("multiprocessors", ["1", EVERY_SM_IDLE], ids=["fused", "tiled"])
def test_bits_do_not_depend_on_the_order_of_the_threads(multiprocessors: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A missing barrier shows as another result when the threads between two barriers run in another order."""
    monkeypatch.setenv("EMULATION_MULTIPROCESSORS", multiprocessors)
    results = []
    for order in ("ascending", "descending", "shuffled"):
        monkeypatch.setenv("EMULATION_ORDER", order)
        results.append(_everything())
    for first, second, third in zip(*results, strict=True):
        assert torch.equal(first, second)
        assert torch.equal(first, third)


def _between_canaries(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A contiguous tensor in the middle of a larger one of sevens, and the larger one."""
    numel = 1
    for size in shape:
        numel *= size
    storage = torch.full((numel + 128,), 7.0, dtype=dtype)
    return storage[64 : 64 + numel].view(shape), storage


@pytest.mark.parametrize("multiprocessors", ["1", EVERY_SM_IDLE], ids=["fused", "tiled"])
def test_nothing_is_written_beside_the_outputs(
    operations: Any, multiprocessors: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EMULATION_MULTIPROCESSORS", multiprocessors)
    students, teachers = _pyramids("contiguous", torch.float32)
    numel = sum(2 * h * w for _, _, h, w in LEVELS)
    shapes = [(len(LEVELS), 2), (numel,), (numel,), (2 * numel,)]
    outputs, storages = zip(*(_between_canaries(shape, torch.float32) for shape in shapes), strict=True)
    operations.attention_forward.default(students, teachers, 2.0, *outputs)
    gradients, gradient_storages = zip(*(_between_canaries(tuple(s.shape), s.dtype) for s in students), strict=True)
    operations.attention_backward.default(
        torch.ones(1, 1).expand(len(LEVELS), 2), 1.0, students, outputs[1], 2.0, gradients
    )
    for storage in storages + gradient_storages:
        assert bool((storage[:64] == 7).all())
        assert bool((storage[-64:] == 7).all())
    for case, make in LOGITS.items():
        logits = make().contiguous()
        rows = logits.numel() // logits.shape[1]
        shapes = [(4, rows), (6, rows), (1,)]
        outputs, storages = zip(*(_between_canaries(shape, torch.float32) for shape in shapes), strict=True)
        operations.logits_forward.default([logits], [logits + 1], [], [], 1.0, 0.0, -100, 4.0, *outputs)
        gradient, gradient_storage = _between_canaries(tuple(logits.shape), torch.float32)
        operations.logits_backward.default(
            [torch.ones(1)] * 3, 0, 0, [0.0, 0.0, 1.0], None, [logits], [logits + 1], [], [], 1.0, 0.0, -100, 4.0,
            outputs[1], outputs[0], False, [gradient], [],
        )  # fmt: skip
        for storage in (*storages, gradient_storage):
            assert bool((storage[:64] == 7).all()), case
            assert bool((storage[-64:] == 7).all()), case


def _attention_arguments() -> dict[str, Any]:
    return {
        "students": [torch.randn(2, 3, 4, 4)],
        "teachers": [torch.randn(2, 5, 4, 4)],
        "exponent": 2.0,
        "losses": torch.empty(1, 2),
        "student_coefficients": torch.empty(32),
        "teacher_coefficients": None,
        "workspace": torch.empty(64),
    }


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("students", [], "students is empty"),
        ("teachers", [], "teachers has 0 tensors, but 1 were wanted"),
        ("teachers", [torch.zeros(2, 5, 4, 5)], "equal heights and widths were wanted"),
        ("teachers", [torch.zeros(3, 5, 4, 4)], "batch size 3, but 2"),
        ("teachers", [torch.zeros(2, 5, 16)], r"has shape \(2, 5, 16\), but \(N, C, H, W\)"),
        ("teachers", [torch.zeros(2, 5, 4, 4, dtype=torch.float64)], "has dtype Double, but Float"),
        ("students", [torch.zeros(2, 0, 4, 4)], "at least one channel and one pixel"),
        ("losses", torch.zeros(2, 1), r"losses has shape \(2, 1\), but \(1, 2\)"),
        ("losses", torch.zeros(1, 2, dtype=torch.float64), "losses has dtype Double"),
        ("student_coefficients", torch.zeros(31), r"student_coefficients has shape \(31\), but \(32\)"),
        ("student_coefficients", torch.zeros(64)[::2], "student_coefficients is not contiguous"),
        ("workspace", torch.zeros(63), r"workspace has shape \(63\), but \(64\)"),
    ],
)
def test_attention_refuses_what_it_could_not_index(operations: Any, name: str, value: Any, message: str) -> None:
    arguments = _attention_arguments()
    arguments[name] = value
    with pytest.raises(RuntimeError, match=message):
        operations.attention_forward.default(*arguments.values())


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("grad", torch.zeros(2, 1), r"grad has shape \(2, 1\), but \(1, 2\)"),
        ("features", [], "features is empty"),
        ("coefficients", torch.zeros(16), r"coefficients has shape \(16\), but \(32\)"),
        ("gradients", [], "gradients has 0 tensors, but 1"),
        ("gradients", [torch.zeros(2, 3, 4, 5)], r"gradients\[0\] has shape \(2, 3, 4, 5\), but \(2, 3, 4, 4\)"),
        ("gradients", [torch.zeros(2, 3, 4, 4).half()], "has dtype Half, but Float"),
    ],
)
def test_attention_backward_refuses_what_it_could_not_index(
    operations: Any, name: str, value: Any, message: str
) -> None:
    arguments = {
        "grad": torch.ones(1, 2),
        "scale": 1.0,
        "features": [torch.randn(2, 3, 4, 4)],
        "coefficients": torch.zeros(32),
        "exponent": 2.0,
        "gradients": [torch.zeros(2, 3, 4, 4)],
    }
    arguments[name] = value
    with pytest.raises(RuntimeError, match=message):
        operations.attention_backward.default(*arguments.values())


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("students", [], "students is empty"),
        ("students", [torch.zeros(4)], r"students\[0\] has shape \(4\)"),
        ("students", [torch.zeros(4, 0)], "from 1 to 2\\^30 classes"),
        ("teachers", [torch.zeros(4, 5)], r"teachers\[0\] has shape \(4, 5\), but \(4, 6\)"),
        ("teachers", [torch.zeros(4, 6), torch.zeros(4, 6)], "teachers has 2 tensors, but 1"),
        ("targets", [torch.zeros(5, dtype=torch.int64)], "without the class axis was wanted"),
        ("targets", [torch.zeros(4, dtype=torch.int32)], "has dtype Int, but Float"),
        ("targets", [torch.zeros(4, 6, dtype=torch.float64)], "has dtype Double, but Float"),
        ("targets", [torch.zeros(4, 5)], r"targets\[0\] has shape \(4, 5\), but \(4, 6\)"),
        ("targets_b", [torch.zeros(4, 1, dtype=torch.int64)], "without the class axis was wanted"),
        ("temperature", 0.0, "temperature is 0"),
        ("losses", torch.zeros(4, 3), r"losses has shape \(4, 3\), but \(4, 4\)"),
        ("statistics", torch.zeros(4, 4), r"statistics has shape \(4, 4\), but \(6, 4\)"),
        ("inverse_valid", torch.zeros(2), r"inverse_valid has shape \(2\), but \(1\)"),
    ],
)
def test_logits_refuses_what_it_could_not_index(operations: Any, name: str, value: Any, message: str) -> None:
    arguments = {
        "students": [torch.zeros(4, 6)],
        "teachers": [torch.zeros(4, 6)],
        "targets": [torch.zeros(4, dtype=torch.int64)],
        "targets_b": [],
        "mix": 1.0,
        "label_smoothing": 0.0,
        "ignore_index": -100,
        "temperature": 4.0,
        "losses": torch.zeros(4, 4),
        "statistics": torch.zeros(6, 4),
        "inverse_valid": torch.zeros(1),
    }
    arguments[name] = value
    with pytest.raises(RuntimeError, match=message):
        operations.logits_forward.default(*arguments.values())


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("grads", [torch.ones(1)] * 2, "grads has 2 tensors, but 3"),
        ("grads", [torch.ones(3)] * 3, "has 3 elements, but its last index is"),
        ("grads", [torch.ones(4, dtype=torch.float64)] * 3, "has dtype Double, but Float"),
        ("grad_row_stride", -1, "grad_row_stride is -1"),
        ("grad_row_stride", 2**62, "its last index is"),
        ("scales", [1.0, 1.0], "scales has 2 numbers, but 3"),
        ("inverse_valid", torch.ones(2), r"inverse_valid has shape \(2\), but \(1\)"),
        ("losses", torch.zeros(3, 4), r"losses has shape \(3, 4\), but \(4, 4\)"),
        ("student_gradients", [torch.zeros(4, 5)], r"student_gradients\[0\] has shape \(4, 5\), but \(4, 6\)"),
        ("teachers", [], "teacher_gradients is given without teachers"),
    ],
)
def test_logits_backward_refuses_what_it_could_not_index(operations: Any, name: str, value: Any, message: str) -> None:
    arguments = {
        "grads": [torch.ones(4)] * 3,
        "grad_head_stride": 0,
        "grad_row_stride": 1,
        "scales": [1.0, 1.0, 1.0],
        "inverse_valid": torch.ones(1),
        "students": [torch.zeros(4, 6)],
        "teachers": [torch.zeros(4, 6)],
        "targets": [torch.zeros(4, dtype=torch.int64)],
        "targets_b": [],
        "mix": 1.0,
        "label_smoothing": 0.0,
        "ignore_index": -100,
        "temperature": 4.0,
        "statistics": torch.zeros(6, 4),
        "losses": torch.zeros(4, 4),
        "kd_to_teacher": True,
        "student_gradients": [torch.zeros(4, 6)],
        "teacher_gradients": [torch.zeros(4, 6)],
    }
    arguments[name] = value
    with pytest.raises(RuntimeError, match=message):
        operations.logits_backward.default(*arguments.values())


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_fusion_writes_nothing_beside_its_outputs(operations: Any, layout: str) -> None:
    for name in ("odd", "normalised", "half packs", "after"):
        node = FUSIONS[name]
        tensors = _fusion_tensors(node, layout, torch.float32)
        storages = []

        def output(shape: tuple[int, ...], kept: list[Tensor] = storages) -> Tensor:
            tensor, storage = _between_canaries(shape, torch.float32)
            kept.append(storage)
            return tensor

        def like(x: Tensor, make: Callable[[tuple[int, ...]], Tensor] = output) -> Tensor:
            if x.is_contiguous():
                return make(tuple(x.shape))
            return make(tuple(x.permute(0, 2, 3, 1).shape)).permute(0, 3, 1, 2)

        inputs, count = tensors.inputs, len(tensors.inputs)
        used = [position in node.normalised for position in range(count)]
        statistics = [output((3, node.channels)) for _ in inputs]
        workspace = output((native_fusion.workspace_size(inputs),))
        operations.fusion_statistics.default(inputs, [VARIANCE_STEP] * count, statistics, workspace)
        statistics = [rows if normalised else rows[:0] for rows, normalised in zip(statistics, used, strict=True)]
        gammas, betas = (
            [torch.empty(0) if x is None else x for x in given] for given in (tensors.gammas, tensors.betas)
        )
        resamples = [reference_fusion.RESAMPLES.index(resample) for resample, _, _ in node.inputs]
        act = reference_fusion.ACTIVATIONS.index(node.act)
        affine = (inputs, statistics, gammas, betas, tensors.weight)
        options = (resamples, 1, act, 1, STEP)
        operations.fusion_forward.default(*affine, *options, like(tensors.grad))
        sums = [output((2, node.channels)) if normalised else torch.empty(0) for normalised in used]
        operations.fusion_backward_sums.default(tensors.grad, *affine, *options, sums, output((count,)), workspace)
        gradients = [like(x) for x in inputs]
        operations.fusion_backward.default(
            tensors.grad, *affine, sums, *options, list(range(count)), gradients, output((count,)), workspace
        )
        for storage in storages:
            assert bool((storage[:64] == 7).all())
            assert bool((storage[-64:] == 7).all())


def _fusion_arguments() -> dict[str, Any]:
    numbers = torch.ones(3)
    return {
        "grad": torch.ones(2, 3, 4, 4),
        "inputs": [torch.ones(2, 3, 4, 4), torch.ones(2, 3, 7, 8)],
        "statistics": [torch.ones(3, 3), torch.empty(0)],
        "gammas": [numbers, torch.empty(0)],
        "betas": [numbers, torch.empty(0)],
        "weight": torch.ones(2),
        "sums": [torch.zeros(2, 3), torch.empty(0)],
        "resamples": [0, 2],
        "pre": 1,
        "act": 0,
        "weighting": 1,
        "epsilon": STEP,
        "positions": [0, 1],
        "gradients": [torch.ones(2, 3, 4, 4), torch.ones(2, 3, 7, 8)],
        "weight_gradient": torch.ones(2),
        "workspace": torch.empty(10000),
    }


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("inputs", [], "inputs has 0 tensors, but 1 to 4"),
        ("inputs", [torch.ones(2, 3, 4, 4)] * 5, "inputs has 5 tensors"),
        ("inputs", [torch.ones(3), torch.ones(3)], r"inputs\[0\] has shape \(3\)"),
        (
            "inputs",
            [torch.ones(2, 3, 4, 4), torch.ones(2, 2, 7, 8)],
            r"inputs\[1\] has shape \(2, 2, 7, 8\), but batch",
        ),
        ("inputs", [torch.ones(2, 3, 4, 4), torch.ones(2, 3, 7, 8).half()], r"inputs\[1\] has dtype Half, but Float"),
        ("inputs", [torch.ones(2, 3, 4, 4), torch.ones(2, 3, 9, 8)], "a size whose half, rounded up"),
        ("inputs", [torch.ones(2, 3, 4, 5), torch.ones(2, 3, 7, 8)], "the same size was wanted"),
        ("inputs", [torch.ones(1).expand(2, 2**20, 2**10, 2)] * 2, "of at most 2\\^30 elements"),
        ("inputs", [torch.ones(1).expand(2**31, 3, 4, 4)] * 2, "at most 2\\^30 samples"),
        ("grad", torch.ones(2, 3, 4), r"grad has shape \(2, 3, 4\)"),
        ("grad", torch.ones(2, 3, 4, 4).double(), "grad has dtype Double"),
        ("resamples", [0], "resamples has 1 numbers"),
        ("resamples", [0, 3], r"resamples\[1\] is 3"),
        ("resamples", [0, 1], "at most that size"),
        ("pre", 3, "pre is 3, but a number from 0 to 2"),
        ("act", -1, "act is -1"),
        ("weighting", 4, "weighting is 4"),
        ("weight", torch.ones(3), r"weight has shape \(3\), but \(2\)"),
        ("weight", torch.ones(2).half(), "weight has dtype Half"),
        ("statistics", [torch.ones(1, 3), torch.empty(0)], r"statistics\[0\] has shape \(1, 3\)"),
        ("statistics", [torch.empty(0)] * 2, r"gammas\[0\] has 3 elements"),
        ("gammas", [torch.ones(4), torch.empty(0)], r"gammas\[0\] has shape \(4\), but \(3\)"),
        ("betas", [torch.ones(3)], "betas has 1 tensors, but 2"),
        ("sums", [torch.ones(2, 3), torch.ones(2, 3)], r"inputs\[1\] is not normalised"),
        ("sums", [torch.ones(3, 3), torch.empty(0)], r"sums\[0\] has shape \(3, 3\)"),
        ("positions", [0, 2], r"positions\[1\] is 2"),
        ("positions", [0, 0], "rising numbers"),
        ("gradients", [torch.ones(2, 3, 4, 4)], "gradients has 1 tensors, but 2"),
        ("gradients", [torch.ones(2, 3, 4, 4)] * 2, r"gradients\[1\] has shape"),
        ("weight_gradient", torch.ones(1), "weight_gradient has shape"),
        ("workspace", None, "workspace has 0 elements"),
        ("workspace", torch.empty(1), "workspace has 1 elements"),
        ("workspace", torch.empty(10000, dtype=torch.float64), "workspace has dtype Double"),
    ],
)
def test_fusion_refuses_what_it_could_not_index(operations: Any, name: str, value: Any, message: str) -> None:
    arguments = _fusion_arguments()
    operations.fusion_backward.default(*arguments.values())
    arguments[name] = value
    with pytest.raises(RuntimeError, match=message):
        operations.fusion_backward.default(*arguments.values())
    for skipped in ("positions", "gradients"):
        del arguments[skipped]
    if name in arguments:
        order = ["grad", "inputs", "statistics", "gammas", "betas", "weight", "resamples", "pre", "act", "weighting",
                 "epsilon", "sums", "weight_gradient", "workspace"]  # fmt: skip
        with pytest.raises(RuntimeError, match=message):
            operations.fusion_backward_sums.default(*(arguments[key] for key in order))
    if name not in ("grad", "sums", "weight_gradient", "workspace"):
        out = arguments.pop("grad")
        for skipped in ("sums", "weight_gradient", "workspace"):
            del arguments[skipped]
        if name in arguments:
            with pytest.raises(RuntimeError, match=message.replace("grad", "out")):
                operations.fusion_forward.default(*arguments.values(), out)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("inputs", [], "inputs has 0 tensors"),
        ("epsilons", [1.0, 1.0], "epsilons has 2 numbers, but 1"),
        ("statistics", [torch.ones(2, 3)], r"statistics\[0\] has shape \(2, 3\), but \(3, 3\)"),
        ("workspace", torch.ones(5), "workspace has 5 elements"),
    ],
)
def test_fusion_statistics_refuse_what_they_could_not_index(
    operations: Any, name: str, value: Any, message: str
) -> None:
    arguments: dict[str, Any] = {
        "inputs": [torch.ones(2, 3, 4, 4)],
        "epsilons": [1e-5],
        "statistics": [torch.ones(3, 3)],
        "workspace": torch.empty(6),
    }
    operations.fusion_statistics.default(*arguments.values())
    arguments[name] = value
    with pytest.raises(RuntimeError, match=message):
        operations.fusion_statistics.default(*arguments.values())
