"""On a CUDA device: every implementation against float64, streams, graphs, synchronisation, AMP and compile."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import problems
import pytest
import torch
from layouts import LAYOUTS, channels_last
from numerics import assert_close, largest_error
from torch import Tensor, nn

import frskd_fast
from frskd_fast import _dispatch, functional
from frskd_fast.losses import FRSKDLoss
from frskd_fast.models import wrn16x2
from frskd_fast.tasks import FRSKDTask, build_frskd

pytestmark = pytest.mark.gpu

IMPLEMENTATIONS = ["cuda", "triton"]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
PYRAMID = [(64, 128, 32), (128, 256, 16), (256, 512, 8), (512, 1024, 4)]  # CIFAR ResNet-18 and its self-teacher


@pytest.fixture(params=IMPLEMENTATIONS)
def impl(request: pytest.FixtureRequest) -> Iterator[str]:
    """An implementation that this machine has; skips, with the reason, where it has not."""
    name: str = request.param
    problem = _dispatch.problem(name, "cuda", torch.float32)
    if problem is not None:
        pytest.skip(f"impl={name!r}: {problem}")
    yield name


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize(
    ("impl", "operation", "problem"),
    [
        pytest.param(name, operation, problem, id=f"{name}, {operation}: {problem.name}")
        for name in IMPLEMENTATIONS
        for operation, problem in problems.of_implementation(name)
    ],
    indirect=["impl"],
)
def test_problems(impl: str, operation: str, problem: problems.Problem) -> None:
    torch.manual_seed(0)
    problem.run(impl, "cuda")
    assert frskd_fast.last_impl().get(operation, impl) == impl


def _normal(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda")


LOGITS: dict[str, Callable[[], Tensor]] = {
    "CIFAR": lambda: _normal(128, 100),
    "few classes": lambda: _normal(37, 10),
    "one class": lambda: _normal(3, 1),
    "ImageNet": lambda: _normal(64, 1000),
    "odd": lambda: _normal(5, 1003),
    "vocabulary": lambda: _normal(3, 50257),
    "map": lambda: _normal(2, 21, 65, 65),
    "channels_last map": lambda: channels_last(_normal(2, 24, 33, 47)),
    "sliced map": lambda: _normal(3, 23, 19, 20)[1:, 2:, :, 3:],
    "transposed": lambda: _normal(100, 70).t(),
    "sequence": lambda: _normal(2, 6, 400),
}


def _labels(kind: str, logits: Tensor) -> Any:
    shape = (logits.shape[0], *logits.shape[2:])

    def indices() -> Tensor:
        labels = torch.randint(logits.shape[1], shape, device="cuda")
        labels[torch.rand(shape, device="cuda") < 0.2] = -100
        return labels

    if kind == "labels":
        return indices()
    if kind == "mix":
        return indices(), indices(), 0.3
    return torch.rand(logits.shape, device="cuda").softmax(1) if kind == "probabilities" else None


def _objective_inputs(
    dtype: torch.dtype = torch.float32, batch: int = 16, channels_last: bool = False
) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor], Tensor]:
    change = channels_last if channels_last else LAYOUTS["contiguous"]
    students = [change(_normal(batch, c, s, s).to(dtype)).requires_grad_() for c, _, s in PYRAMID]
    teachers = [change(_normal(batch, d, s, s).to(dtype)) for _, d, s in PYRAMID]
    logits = [(2 * _normal(batch, 100)).to(dtype).requires_grad_() for _ in range(2)]
    return logits[0], logits[1], students, teachers, torch.randint(100, (batch,), device="cuda")


def _leaves(inputs: tuple[Tensor, Tensor, list[Tensor], list[Tensor], Tensor]) -> list[Tensor]:
    return [inputs[0], inputs[1], *inputs[2]]


def _gradients(inputs: tuple[Tensor, Tensor, list[Tensor], list[Tensor], Tensor]) -> list[Tensor]:
    gradients = []
    for leaf in _leaves(inputs):
        assert leaf.grad is not None
        gradients.append(leaf.grad)
    return gradients


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_whole_objective(dtype: torch.dtype, channels_last: bool, impl: str) -> None:
    inputs = _objective_inputs(dtype, 16, channels_last)

    def run(name: str, run_dtype: torch.dtype) -> list[Tensor]:
        students = [feature.detach().to(run_dtype).requires_grad_() for feature in inputs[2]]
        logits = [leaf.detach().to(run_dtype).requires_grad_() for leaf in inputs[:2]]
        teachers = [feature.to(run_dtype) for feature in inputs[3]]
        parts = FRSKDLoss(2.0, 100.0, 4.0, impl=name)(*logits, students, teachers, inputs[4], return_parts=True)
        (128.0 * parts.loss).backward()
        return [
            *(part.detach() for part in parts),
            *(leaf.grad for leaf in [*logits, *students] if leaf.grad is not None),
        ]

    for ours, plain, truth in zip(
        run(impl, dtype), run("reference", dtype), run("reference", torch.float64), strict=True
    ):
        assert_close(ours, plain, truth, str(tuple(truth.shape)))


@pytest.mark.parametrize("value", [3e4, -3e4, 0.0, 1e-7])
def test_extreme_float16_stays_finite(value: float, impl: str) -> None:
    inputs = _objective_inputs(torch.float16)
    with torch.no_grad():
        for tensor in [*inputs[:2], *inputs[2], *inputs[3]]:
            tensor.fill_(value)
        inputs[0][:, ::2] *= -1
    loss = FRSKDLoss(impl=impl)(*inputs)
    loss.backward()
    assert bool(loss.isfinite())
    for gradient in _gradients(inputs):
        assert bool(gradient.isfinite().all())


def test_the_same_bits_a_hundred_times(impl: str) -> None:
    inputs = _objective_inputs()
    map_logits = [LOGITS["map"]().requires_grad_(), LOGITS["map"]()]
    map_targets = _labels("labels", map_logits[0])
    criterion = FRSKDLoss(impl=impl)

    def run() -> list[Tensor]:
        for leaf in [*_leaves(inputs), map_logits[0]]:
            leaf.grad = None
        parts = functional.cross_entropy_kd(*map_logits, map_targets, impl=impl)
        loss = criterion(*inputs) + parts.ce_student + parts.kd
        loss.backward()
        assert map_logits[0].grad is not None
        return [loss.detach(), *_gradients(inputs), map_logits[0].grad]

    first = run()
    for _ in range(99):
        for again, value in zip(run(), first, strict=True):
            assert torch.equal(again, value)


def test_no_host_synchronisation(impl: str) -> None:
    inputs = _objective_inputs()
    two_labels = (inputs[4], inputs[4].flip(0), 0.5)
    criterion = FRSKDLoss(impl=impl)
    maps = [LOGITS["map"]().requires_grad_(), LOGITS["map"]()]
    map_targets = _labels("labels", maps[0])

    def run() -> None:
        criterion(*inputs).backward()
        criterion(*inputs[:4], two_labels).backward()
        sum(functional.cross_entropy_kd(*maps, map_targets, impl=impl)).backward()
        functional.attention_map(inputs[3][0], impl=impl)

    run()  # compiles and loads the kernels, which may wait
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_cuda_graph(impl: str) -> None:
    """A captured step gives, on new inputs, the bits of an eager step."""
    inputs = _objective_inputs()
    criterion = FRSKDLoss(impl=impl)

    def step() -> Tensor:
        loss: Tensor = criterion(*inputs)
        loss.backward()
        return loss

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            for leaf in _leaves(inputs):
                leaf.grad = None
            step()
    torch.cuda.current_stream().wait_stream(side)
    for leaf in _leaves(inputs):
        leaf.grad = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for seed in (11, 12):
        torch.manual_seed(seed)
        fresh = _objective_inputs()
        with torch.no_grad():
            for static, new in zip(
                [*_leaves(inputs), *inputs[3], inputs[4]], [*_leaves(fresh), *fresh[3], fresh[4]], strict=True
            ):
                static.copy_(new)
        graph.replay()
        loss = criterion(*fresh)
        loss.backward()
        assert torch.equal(captured, loss)
        for replayed, eager in zip(_gradients(inputs), _gradients(fresh), strict=True):
            assert torch.equal(replayed, eager)


def test_the_current_stream_is_used(impl: str) -> None:
    """The inputs arrive late on a side stream; a kernel on another stream would read what was there before."""
    inputs = _objective_inputs()
    expected = FRSKDLoss(impl=impl)(*inputs)
    expected.backward()
    expected_gradients = [gradient.clone() for gradient in _gradients(inputs)]
    late = [torch.full_like(tensor, float("nan")) for tensor in [*_leaves(inputs), *inputs[3]]]
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(200_000_000)  # about a tenth of a second
        for target, source in zip(late, [*_leaves(inputs), *inputs[3]], strict=True):
            target.copy_(source.detach())
        leaves = [tensor.requires_grad_() for tensor in late[: 2 + len(PYRAMID)]]
        loss = FRSKDLoss(impl=impl)(leaves[0], leaves[1], leaves[2:], late[2 + len(PYRAMID) :], inputs[4])
        loss.backward()
    side.synchronize()
    assert torch.equal(loss, expected)
    for leaf, gradient in zip(leaves, expected_gradients, strict=True):
        assert leaf.grad is not None
        assert torch.equal(leaf.grad, gradient)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_the_tensors_device_is_used(impl: str) -> None:
    inputs = _objective_inputs()
    expected = FRSKDLoss(impl=impl)(*inputs)
    expected.backward()
    moved = [tensor.detach().to("cuda:1") for tensor in [*_leaves(inputs), *inputs[3], inputs[4]]]
    leaves = [tensor.requires_grad_() for tensor in moved[: 2 + len(PYRAMID)]]
    assert torch.cuda.current_device() == 0
    loss = FRSKDLoss(impl=impl)(leaves[0], leaves[1], leaves[2:], moved[2 + len(PYRAMID) : -1], moved[-1])
    loss.backward()
    assert loss.device == torch.device("cuda:1")
    assert torch.cuda.current_device() == 0
    torch.testing.assert_close(loss.cpu(), expected.cpu(), rtol=1e-6, atol=0)
    for leaf, gradient in zip(leaves, _gradients(inputs), strict=True):
        assert leaf.grad is not None
        assert largest_error(leaf.grad.cpu(), gradient.cpu()) <= 1e-6 * float(gradient.abs().max())


@pytest.mark.parametrize("normalised", [False, True], ids=["plain", "BatchNorm"])
def test_fusion_is_deterministic_and_capturable(normalised: bool, impl: str) -> None:
    """The same bits a hundred times, without a synchronisation, and from a CUDA graph on new inputs."""
    sizes, resample = [(9, 7), (5, 4), (17, 14), (9, 7)], ["none", "up", "pool", "none"]
    static = [channels_last(_normal(5, 24, *size)).requires_grad_() for size in sizes]
    static.append(torch.rand(4, device="cuda").requires_grad_())
    norms: list[nn.BatchNorm2d] = [nn.BatchNorm2d(24).cuda() for _ in sizes if normalised]
    for parameter in (parameter for norm in norms for parameter in norm.parameters()):
        nn.init.normal_(parameter)
    leaves = [*static, *(parameter for norm in norms for parameter in norm.parameters())]

    def step() -> list[Tensor]:
        out = functional.weighted_fusion(
            static[:-1], static[-1], resample=resample, batch_norms=norms or None, pre="silu", impl=impl
        )
        return [out.detach(), *torch.autograd.grad(out.square().sum(), leaves)]

    first = step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        repeated = [step() for _ in range(99)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(left, right) for again in repeated for left, right in zip(again, first, strict=True))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for leaf in static[:-1]:
            leaf.normal_()
    graph.replay()
    replayed = [value.clone() for value in captured]
    assert all(torch.equal(left, right) for left, right in zip(replayed, step(), strict=True))


class _TwoHeads(nn.Module):
    """A student and a self-teacher, as small as they can be."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, padding=1)
        self.second = nn.Conv2d(16, 32, 3, stride=2, padding=1)
        self.teacher_first = nn.Conv2d(16, 32, 1)
        self.teacher_second = nn.Conv2d(32, 64, 1)
        self.heads = nn.ModuleList([nn.Linear(32, 10), nn.Linear(64, 10)])

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
        first = self.first(images).relu()
        second = self.second(first).relu()
        teachers = [self.teacher_first(first).relu(), self.teacher_second(second).relu()]
        logits = [head(feature.mean((2, 3))) for head, feature in zip(self.heads, (second, teachers[1]), strict=True)]
        return logits[0], logits[1], [first, second], teachers


def test_autocast_with_a_gradient_scaler(impl: str) -> None:
    """Twenty float16 steps stay finite and follow float32 steps of the plain formulas."""
    losses: dict[str, list[float]] = {}
    for name, mixed in (("reference", False), (impl, True)):
        torch.manual_seed(5)
        model = _TwoHeads().cuda()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
        scaler = torch.amp.GradScaler("cuda", enabled=mixed)
        criterion = FRSKDLoss(impl=name)
        images, targets = _normal(32, 3, 16, 16), torch.randint(10, (32,), device="cuda")
        losses[name] = []
        for _ in range(20):
            optimizer.zero_grad()
            with torch.autocast("cuda", torch.float16, enabled=mixed):
                outputs = model(images)
            assert not mixed or outputs[0].dtype == torch.float16
            loss = criterion(*outputs, targets)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            losses[name].append(loss.item())
        assert not mixed or scaler.get_scale() >= 2.0**14, "steps were skipped for infinite gradients"
    difference = torch.tensor(losses[impl]) - torch.tensor(losses["reference"])
    assert bool(difference.isfinite().all())
    assert float(difference.abs().max()) < 0.02 * losses["reference"][0]


VARIANTS = [("att", None), ("fit", None), ("od", None), ("att", "sla")]


def _variant_step(
    distill: str, auxiliary: str | None, device: str, dtype: torch.dtype
) -> tuple[Any, Callable[[], Any]]:
    """A task of that variant, the same on every device, and one step of it."""
    torch.manual_seed(3)
    task = build_frskd(wrn16x2(num_classes=10), distill, auxiliary, beta=1.0).to(device, dtype)
    images = torch.randn(8, 3, 16, 16).to(device, dtype)
    targets = torch.randint(10, (8,)).to(device)

    def step() -> Any:
        task.zero_grad(set_to_none=True)
        parts = task(images, (targets, targets.flip(0), 0.3))
        parts["loss"].backward()
        return parts

    return task, step


@pytest.mark.parametrize(("distill", "auxiliary"), VARIANTS)
def test_variants_agree_with_the_cpu_and_never_wait(distill: str, auxiliary: str | None) -> None:
    """Every part of the loss and the whole gradient against float64 on the host; a second step without synchronisation."""
    task, step = _variant_step(distill, auxiliary, "cuda", torch.float32)
    exact, exact_step = _variant_step(distill, auxiliary, "cpu", torch.float64)
    with torch.backends.cudnn.flags(allow_tf32=False):
        parts = step()
    for name, value in exact_step().items():
        if value.dim() == 0:
            torch.testing.assert_close(parts[name].cpu().double(), value, rtol=1e-3, atol=1e-6)
    pairs = [(p.grad, q.grad) for p, q in zip(task.parameters(), exact.parameters(), strict=True) if q.grad is not None]
    wrong = sum(float((mine.cpu().double() - true).square().sum()) for mine, true in pairs)
    # A rounding across the kink of a ReLU removes a term, so the gradient is compared as one vector.
    assert wrong < 1e-3 * sum(float(true.square().sum()) for _, true in pairs)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_task_trains_two_hundred_steps_in_float16() -> None:
    """Autocast and GradScaler on the whole of FRSKD: no step but the scaler's own trials is lost, the loss falls."""
    torch.manual_seed(3)
    task = FRSKDTask(wrn16x2(num_classes=10)).cuda()
    optimizer = torch.optim.SGD(task.parameters(), lr=0.02, momentum=0.9)
    scaler = torch.amp.GradScaler("cuda")
    images, targets = _normal(32, 3, 32, 32), torch.randint(10, (32,), device="cuda")
    losses = []
    for _ in range(200):
        optimizer.zero_grad()
        with torch.autocast("cuda", torch.float16):
            loss = task(images, targets)["loss"]
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.detach())
    history = torch.stack(losses).cpu()
    assert bool(history.isfinite().all())
    assert float(history[-20:].mean()) < 0.5 * float(history[:5].mean())
    assert scaler.get_scale() >= 2.0**10, "steps were skipped for infinite gradients"


def test_compiled_without_graph_breaks(impl: str) -> None:
    criterion = FRSKDLoss(impl=impl)
    compiled = torch.compile(criterion, fullgraph=True, dynamic=True)
    for batch in (16, 9):
        inputs = _objective_inputs(batch=batch)
        twins = [leaf.detach().clone().requires_grad_() for leaf in _leaves(inputs)]
        loss = compiled(*inputs)
        loss.backward()
        expected = criterion(twins[0], twins[1], twins[2:], *inputs[3:])
        expected.backward()
        torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
        for gradient, twin in zip(_gradients(inputs), twins, strict=True):
            torch.testing.assert_close(gradient, twin.grad, rtol=1e-5, atol=1e-7)


def test_one_launch_for_all_levels_and_one_for_the_logits() -> None:
    """With many samples the CUDA objective is three launches forward and two backward."""
    problem = _dispatch.problem("cuda", "cuda", torch.float32)
    if problem is not None:
        pytest.skip(f"impl='cuda': {problem}")
    inputs = _objective_inputs(batch=256)
    criterion = FRSKDLoss(impl="cuda")
    criterion(*inputs).backward()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        criterion(*inputs).backward()
        torch.cuda.synchronize()
    names = [event.name for event in profile.events() if "frskd" in event.name]
    kernels = ("attention_fused", "logits_losses", "combine_parts", "attention_gradient", "logits_gradients")
    assert {kernel: sum(kernel in name for name in names) for kernel in kernels} == dict.fromkeys(kernels, 1)
    assert len(names) == len(kernels)


@pytest.mark.slow
def test_more_than_two_to_the_31_elements(impl: str) -> None:
    """The last sample lies behind 2^31 elements; its loss and gradient are those of the sample alone."""
    if torch.cuda.mem_get_info()[0] < 20 * 2**30:
        pytest.skip("needs 20 GiB of free device memory")
    student = torch.empty(33, 1024, 256, 256, dtype=torch.float16, device="cuda")
    student[0].normal_()
    student[1:] = student[0]
    student[32].normal_()
    teacher = _normal(33, 2, 256, 256).half()
    student.requires_grad_()
    rows = functional.attention_transfer(student, teacher, reduction="none", impl=impl)
    rows[0, 32].backward()
    alone = student.detach()[32:].clone().requires_grad_()
    functional.attention_transfer(alone, teacher[32:], reduction="sum", impl=impl).backward()
    single = functional.attention_transfer(alone.detach(), teacher[32:], reduction="none", impl=impl)
    torch.testing.assert_close(rows[0, 32:], single[0], rtol=1e-5, atol=0)
    assert student.grad is not None
    assert alone.grad is not None
    torch.testing.assert_close(student.grad[32:], alone.grad, rtol=2e-3, atol=1e-7)
    assert float(student.grad[:32].abs().max()) == 0.0
