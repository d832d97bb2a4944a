"""The tasks: the dict, the low-memory mode, variants of the loss, layouts, copies, autocast, data parallelism, compilation."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from frskd_fast.losses import FitNetLoss, FRSKDLoss, OverhaulLoss, SLALoss
from frskd_fast.mixing import rotate4
from frskd_fast.models import BiFPN, BiFPNc, wrn16x2
from frskd_fast.ops.labels import mixed_probabilities
from frskd_fast.tasks import ClassificationTask, FRSKDTask, Student, build_frskd

CLASSES = 5


class Net(nn.Module):
    """Two levels, BatchNorm; `channels` and `num_classes` where a backbone of the library has them."""

    def __init__(self, described: bool = True) -> None:
        super().__init__()
        if described:
            self.channels, self.num_classes = [4, 6], CLASSES
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 6, 3, 2, 1), nn.BatchNorm2d(6)
        self.fc = nn.Linear(6, CLASSES)

    def forward(self, images: Tensor) -> tuple[list[Tensor], Tensor]:
        first = F.relu(self.bn1(self.conv1(images)))
        second = F.relu(self.bn2(self.conv2(first)))
        return [first, second], self.fc(second.mean((2, 3)))


class PreactNet(Net):
    """`Net`, which also hands out its maps before their ReLU."""

    def forward(self, images: Tensor, preact: bool = False) -> tuple[list[Tensor], Tensor]:
        first = self.bn1(self.conv1(images))
        second = self.bn2(self.conv2(F.relu(first)))
        logits = self.fc(F.relu(second).mean((2, 3)))
        return ([first, second] if preact else [F.relu(first), F.relu(second)]), logits


class Several(nn.Module):
    """A network whose outputs are named."""

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return {"out": images}


class Restless(nn.Module):
    """A self-teacher with all that a second forward pass could disturb: dropout, every kind of statistics, a counter."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(4, 7, 1), nn.BatchNorm2d(7, momentum=None), nn.ReLU(), nn.Dropout(0.3))
        self.second = nn.Sequential(nn.Conv2d(6, 9, 1), nn.InstanceNorm2d(9, affine=True, track_running_stats=True))
        self.frozen = nn.BatchNorm2d(9).eval()
        self.fc = nn.Linear(9, CLASSES)
        self.register_buffer("calls", torch.zeros(()))

    def train(self, mode: bool = True) -> Restless:
        super().train(mode)
        self.frozen.eval()
        return self

    def forward(self, features: list[Tensor]) -> tuple[list[Tensor], Tensor]:
        self.calls += 1
        first, second = self.first(features[0]), self.frozen(self.second(features[1]))
        pooled = second.mean((2, 3)) + first.mean((1, 2, 3)).unsqueeze(1)
        return [first, second], self.fc(F.dropout(pooled, 0.2, self.training))


def batch(size: int = 4) -> tuple[Tensor, Tensor]:
    return torch.randn(size, 3, 10, 8), torch.randint(0, CLASSES, (size,))


def small_task(**arguments: Any) -> FRSKDTask:
    return FRSKDTask(Net(), BiFPNc([4, 6], CLASSES, depth=1), **arguments)


def every_kind_of_targets(labels: Tensor) -> Iterator[Any]:
    yield labels
    yield labels, labels.flip(0), 0.3
    yield torch.rand(len(labels), CLASSES).softmax(1)


def test_the_dict_is_what_the_three_modules_give() -> None:
    images, labels = batch()
    for targets in every_kind_of_targets(labels):
        task = small_task(channels_last=False)
        network, self_teacher = copy.deepcopy(task.backbone), copy.deepcopy(task.self_teacher)
        got = task(images, targets)
        assert list(got) == ["loss", "output", "ce_student", "ce_teacher", "kd", "feature", "teacher_output"]
        features, logits = network(images)
        teacher_features, teacher_logits = self_teacher(features)
        wanted = FRSKDLoss(2.0, 100.0, 4.0)(
            logits, teacher_logits, features, teacher_features, targets, return_parts=True
        )
        for name, value in wanted._asdict().items():
            assert torch.equal(got[name], value), name
        assert torch.equal(got["output"], logits) and torch.equal(got["teacher_output"], teacher_logits)
        assert {name for name, value in got.items() if value.requires_grad} == {"loss", "output", "teacher_output"}
        got["loss"].backward()
        wanted.loss.backward()
        for ours, theirs in zip(task.parameters(), [*network.parameters(), *self_teacher.parameters()], strict=True):
            assert torch.equal(ours.grad, theirs.grad)


def test_the_student_works_alone_without_targets_and_in_evaluation() -> None:
    images, labels = batch()
    task = small_task()
    task.self_teacher.forward = None  # type: ignore[assignment]
    assert list(task(images)) == ["output"]
    task.eval()
    output = task(images, labels)
    assert list(output) == ["output"]
    student = task.student()
    assert type(student) is Student and not student.training
    assert torch.equal(student(images), output["output"])
    assert torch.equal(task.get_eval_model()(images), output["output"])
    assert next(student.parameters()) is next(task.backbone.parameters())
    task.train()
    task.backbone.bn1.eval()
    task.student()
    assert not task.backbone.bn1.training and task.backbone.bn2.training


def trained(task: FRSKDTask, steps: int = 3, side: int | None = None) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Losses and state after some steps of SGD with momentum, the last on a smaller batch."""
    generator = torch.Generator().manual_seed(1)
    optimiser = torch.optim.SGD(task.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
    losses = []
    torch.manual_seed(2)
    for step in range(steps):
        size = 6 if step < steps - 1 else 3
        images = torch.randn(size, 3, 16, side or 12, generator=generator)
        parts = task(images, torch.randint(0, CLASSES, (size,), generator=generator))
        optimiser.zero_grad()
        parts["loss"].backward()
        optimiser.step()
        losses.append(parts["loss"].detach())
    return losses, task.state_dict()


@pytest.mark.parametrize("kind", ["bifpnc", "bifpn", "restless", "wrn"])
def test_low_memory_trains_to_the_same_bits(kind: str) -> None:
    if kind == "wrn":
        normal = FRSKDTask(wrn16x2(num_classes=CLASSES))
    else:
        self_teacher = {
            "bifpnc": lambda: BiFPNc([4, 6], CLASSES, repeat=2),
            "bifpn": lambda: BiFPN([4, 6], CLASSES, num_channels=5),
            "restless": Restless,
        }[kind]()
        normal = FRSKDTask(Net(), self_teacher)
    low = copy.deepcopy(normal)
    low.memory = "low"
    momenta = [getattr(module, "momentum", ...) for module in low.modules()]
    (losses, state), (low_losses, low_state) = trained(normal), trained(low)
    for step, (loss, low_loss) in enumerate(zip(losses, low_losses, strict=True)):
        assert torch.equal(loss, low_loss), step
    for name, value in state.items():
        assert torch.equal(value, low_state[name]), name
    assert momenta == [getattr(module, "momentum", ...) for module in low.modules()]
    if kind == "restless":
        assert low.self_teacher.calls == 3


def saved_bytes(task: FRSKDTask, images: Tensor, labels: Tensor) -> int:
    """Bytes of the different storages kept for backward, parameters and buffers not counted."""
    own = {value.untyped_storage().data_ptr() for value in (*task.parameters(), *task.buffers())}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        parts = task(images, labels)
    del parts
    return sum(tensor.untyped_storage().nbytes() for pointer, tensor in kept.items() if pointer not in own)


def test_low_memory_keeps_far_fewer_bytes() -> None:
    normal = FRSKDTask(wrn16x2(num_classes=CLASSES))
    low = copy.deepcopy(normal)
    low.memory = "low"
    images, labels = torch.randn(2, 3, 32, 32), torch.tensor([0, 1])
    features, _ = normal.backbone(images)
    maps = sum(feature.untyped_storage().nbytes() for feature in features)
    saved, low_saved = saved_bytes(normal, images, labels), saved_bytes(low, images, labels)
    # The self-teacher alone keeps at least its own output maps, twice the width of the student's.
    assert low_saved + 2 * maps < saved
    without = copy.deepcopy(normal)
    without.self_teacher = Nothing(normal.self_teacher(features))
    assert low_saved <= 1.02 * saved_bytes(without, images, labels), "something of the self-teacher is kept"


class Nothing(nn.Module):
    """A self-teacher whose outputs are given."""

    def __init__(self, outputs: Any) -> None:
        super().__init__()
        features, logits = outputs
        self.outputs = [feature.detach() for feature in features], logits.detach().requires_grad_()

    def forward(self, features: list[Tensor]) -> Any:
        return self.outputs


def train_in_a_group_of_one(task: nn.Module, batches: list[tuple[Tensor, Tensor]], folder: Path) -> None:
    """Forward and backward passes of DistributedDataParallel; from the second batch on it complains of parameters that the
    backward pass before left out."""
    store = torch.distributed.FileStore(str(folder / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    parallel: Any = None
    try:
        parallel = nn.parallel.DistributedDataParallel(task)
        for images, labels in batches:
            parallel(images, labels)["loss"].backward()
    finally:
        # Before the group: the reducer, were it the group's last owner, would join the group's threads while it holds the
        # GIL, which such a thread may be waiting for to let go of its last piece of work.
        parallel = None
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("memory", ["normal", "low"])
def test_data_parallel_finds_no_unused_parameter(memory: str, tmp_path: Path) -> None:
    task = FRSKDTask(wrn16x2(num_classes=CLASSES), memory=memory)
    train_in_a_group_of_one(task, [(torch.randn(2, 3, 8, 8), torch.tensor([0, 1])) for _ in range(2)], tmp_path)
    idle = [name for name, parameter in task.named_parameters() if parameter.requires_grad and parameter.grad is None]
    assert idle == []


@pytest.mark.parametrize("memory", ["normal", "low"])
@pytest.mark.parametrize("mixed", [False, True])
def test_autocast(memory: str, mixed: bool) -> None:
    task = small_task(memory=memory)
    if mixed:  # what a LayerNorm does on a GPU: one map in float32 among maps in bfloat16
        task.backbone.register_forward_hook(
            lambda module, arguments, output: ([output[0][0].float(), output[0][1]], output[1])
        )
    images, labels = batch()
    with torch.autocast("cpu", torch.bfloat16):
        parts = task(images, labels)
    assert parts["output"].dtype == parts["teacher_output"].dtype == torch.bfloat16
    assert parts["loss"].dtype == torch.float32
    parts["loss"].backward()
    assert all(parameter.grad.isfinite().all() for parameter in task.parameters())


def test_state_moves_and_copies_agree() -> None:
    images, labels = batch()
    task = small_task()
    assert {key.split(".")[0] for key in task.state_dict()} == {"backbone", "self_teacher"}
    other = small_task()
    other.load_state_dict(task.state_dict())
    wanted = copy.deepcopy(task)(images, labels)["loss"]
    for same in (other, pickle.loads(pickle.dumps(task))):
        assert torch.equal(same(images, labels)["loss"], wanted)
    student = task.student()
    other.backbone.load_state_dict(
        {key.removeprefix("backbone."): value for key, value in student.state_dict().items()}
    )
    double = copy.deepcopy(task).double()
    torch.testing.assert_close(double(images.double(), labels)["loss"].float(), wanted)


def test_layouts() -> None:
    images, labels = batch()
    task, plain = small_task(), small_task(channels_last=False)
    assert task.backbone.conv2.weight.is_contiguous(memory_format=torch.channels_last)
    assert plain.backbone.conv2.weight.is_contiguous()
    plain.load_state_dict(task.state_dict())
    torch.testing.assert_close(task(images, labels)["loss"], plain(images, labels)["loss"])
    seen = []
    task.backbone.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    task.student()(images)
    task(images)
    assert all(image.is_contiguous(memory_format=torch.channels_last) for image in seen) and len(seen) == 2
    assert repr(task).startswith("FRSKDTask(\n  memory='normal', channels_last=True")


def test_a_bare_network_is_adapted_and_its_self_teacher_built() -> None:
    task = FRSKDTask(Net(described=False).double())
    assert task.backbone.channels == [4, 6] and task.self_teacher.fc.out_features == CLASSES
    assert task.self_teacher.fc.weight.dtype == torch.float64
    counted = Net()
    del counted.num_classes
    assert FRSKDTask(counted).self_teacher.fc.out_features == CLASSES
    assert FRSKDTask(Net(), num_classes=7).self_teacher.fc.out_features == 7
    assert (task.loss.alpha, task.loss.beta, task.loss.temperature) == (2.0, 100.0, 4.0)


@pytest.mark.parametrize(
    ("build", "error", "sentence"),
    [
        (lambda: FRSKDTask("resnet18"), TypeError, "backbone is a str, but a torch.nn.Module"),
        (lambda: FRSKDTask(Net(), BiFPNc), TypeError, "self_teacher is a type, but"),
        (lambda: FRSKDTask(Net(), loss=2.0), TypeError, "loss is a float, but"),
        (lambda: FRSKDTask(Net(), memory="tiny"), ValueError, "memory is 'tiny', but 'normal' or 'low'"),
        (lambda: small_task(num_classes=3), ValueError, "num_classes is 3, but self_teacher came with a classifier"),
        (lambda: FRSKDTask(nn.Flatten()), TypeError, "adapt_backbone"),
        (lambda: FRSKDTask(nn.Flatten(), Restless())(*batch()), TypeError, r"backbone \(Flatten\) returned a Tensor"),
        (lambda: small_task()(torch.randn(2, 3, 8, 8), "labels"), TypeError, "targets is a str"),
    ],
)
def test_wrong_arguments_are_refused(build: Callable[[], Any], error: type[Exception], sentence: str) -> None:
    with pytest.raises(error, match=sentence):
        build()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("ignored", [(), (1,), (0, 1, 2, 3)])
def test_mixed_labels_as_probabilities_are_the_same_objective(
    smoothing: float, ignored: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    loss = FRSKDLoss(label_smoothing=smoothing)
    student, teacher = torch.randn(4, CLASSES, requires_grad=True), torch.randn(4, CLASSES)
    maps = [torch.randn(4, 2, 3, 3)]
    first, second = torch.tensor([0, 1, 2, 4]), torch.tensor([3, 1, 0, 2])
    first[list(ignored)] = -100
    if len(ignored) == 4:
        second[:] = -100
    targets = (first, second, 0.3)
    wanted = loss(student, teacher, maps, maps, targets, return_parts=True)
    got = loss(student, teacher, maps, maps, mixed_probabilities(targets, student, -100, smoothing), return_parts=True)
    torch.testing.assert_close(tuple(got), tuple(wanted))
    torch.testing.assert_close(
        torch.autograd.grad(got.loss, student), torch.autograd.grad(wanted.loss, student), rtol=1e-5, atol=1e-6
    )
    for wrong in ((first, second.clamp_min(0) + 7, 0.3), (second.clamp_min(0) + 7, second, 0.3)):
        with pytest.raises(ValueError, match=r"targets\[\d\] holds the label"):
            mixed_probabilities(wrong, student)
        with monkeypatch.context() as traced:  # where labels are not looked at
            traced.setattr(torch.compiler, "is_compiling", lambda: True)
            assert mixed_probabilities(wrong, student).isnan().all()


def compare_compiled(
    backend: str,
    task: FRSKDTask | ClassificationTask,
    batches: list[tuple[int, float | None]],
    batch_of: Callable[[int], tuple[Tensor, Tensor]] = batch,
) -> int:
    """Compiled against plain steps from the same state; returns how many graphs were compiled."""
    torch.compiler.reset()
    plain = copy.deepcopy(task)
    counter = CompileCounterWithBackend(backend)
    task.compile(backend=counter)
    for size, mix in batches:
        images, labels = batch_of(size)
        targets = labels if mix is None else (labels, labels.flip(0), mix)
        got, wanted = task(images, targets), plain(images, targets)
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
        got["loss"].backward()
        wanted["loss"].backward()
    for (name, value), other in zip(task.state_dict().items(), plain.state_dict().values(), strict=True):
        torch.testing.assert_close(value, other, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
    for ours, theirs in zip(task.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-4)
    return counter.frame_count


def replay_matches_a_plain_step(task: nn.Module, images: Tensor, labels: Tensor) -> None:
    """A step of a task on a device without a wait for it, and the loss and gradients of its replay from a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            task(images, labels)["loss"].backward()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.set_sync_debug_mode("error")
    try:
        task(images, labels)["loss"].backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    task.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = task(images, labels)["loss"]
        loss.backward()
    graph.replay()
    torch.cuda.synchronize()
    trained = [parameter for parameter in task.parameters() if parameter.requires_grad]
    captured = [parameter.grad.clone() for parameter in trained]
    task.zero_grad(set_to_none=True)
    wanted = task(images, labels)["loss"]
    wanted.backward()
    torch.testing.assert_close(loss, wanted.detach())
    for ours, parameter in zip(captured, trained, strict=True):
        torch.testing.assert_close(ours, parameter.grad, rtol=1e-3, atol=1e-4)


# What `build_frskd` chooses between.
VARIANTS: dict[str, dict[str, Any]] = {
    "fit": {"distill": "fit", "beta": 3.0},
    "od": {"distill": "od", "margins": "live", "beta": 0.02},
    "sla": {"auxiliary": "sla", "auxiliary_weight": 0.7},
    "sla one pass": {"auxiliary": "sla", "passes": "one"},
    "fit sla": {"distill": "fit", "auxiliary": "sla"},
    "od sla one pass": {"distill": "od", "auxiliary": "sla", "passes": "one", "label_smoothing": 0.1},
}


def variant(name: str, **settings: Any) -> FRSKDTask:
    arguments = {"self_teacher": "BiFPN", "num_channels": 4, "depth": 1, **VARIANTS[name], **settings}
    return build_frskd(PreactNet(), **arguments)


def squares(size: int = 4) -> tuple[Tensor, Tensor]:
    return torch.randn(size, 3, 8, 8), torch.randint(0, CLASSES, (size,))


def by_hand(task: FRSKDTask, images: Tensor, targets: Any) -> tuple[Any, Tensor, Tensor]:
    """Networks and loss of a variant called one by one: parts and both logits."""
    preact = task.loss.needs_preact if not isinstance(task.loss, FRSKDLoss) else False

    def outputs(images: Tensor) -> tuple[list[Tensor], Tensor, list[Tensor], Tensor]:
        features, logits = task.backbone(images.contiguous(memory_format=torch.channels_last), preact=preact)
        return features, logits, *task.self_teacher(features, preact=preact)

    passes = getattr(task.loss, "passes", None)
    features, logits, teacher_features, teacher_logits = outputs(rotate4(images) if passes == "one" else images)
    rotated = {}
    if passes == "two":
        turned, _, teacher_turned, _ = outputs(rotate4(images))
        rotated = {"rotated_student_feats": turned, "rotated_teacher_feats": teacher_turned}
    arguments = logits, teacher_logits, features, teacher_features, targets
    parts = task.loss(*arguments, **rotated, return_parts=True)
    return parts, logits[:: 4 if passes == "one" else 1], teacher_logits[:: 4 if passes == "one" else 1]


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_is_its_networks_and_its_loss(name: str) -> None:
    task = variant(name)
    hand = copy.deepcopy(task)
    images, labels = squares()
    for targets in every_kind_of_targets(labels):
        got, (wanted, logits, teacher_logits) = task(images, targets), by_hand(hand, images, targets)
        assert list(got) == ["loss", "output", *wanted._fields[1:], "teacher_output"]
        for key, value in wanted._asdict().items():
            assert torch.equal(got[key], value), key
        assert torch.equal(got["output"], logits) and torch.equal(got["teacher_output"], teacher_logits)
        task.zero_grad()
        hand.zero_grad()
        got["loss"].backward()
        wanted.loss.backward()
        for (key, parameter), other in zip(task.named_parameters(), hand.parameters(), strict=True):
            assert parameter.grad is not None and torch.equal(parameter.grad, other.grad), key
    for (key, value), other in zip(task.state_dict().items(), hand.state_dict().values(), strict=True):
        assert torch.equal(value, other), key
    assert list(task.eval()(images, labels)) == ["output"]
    assert torch.equal(task.student()(images), task(images)["output"])


def test_one_pass_and_two_agree_where_batch_norm_does_not_see_the_batch() -> None:
    images, labels = squares()
    losses = []
    for name in ("sla", "sla one pass"):
        torch.manual_seed(1)
        task = variant(name, auxiliary_weight=1.0)
        for module in (task.backbone, task.self_teacher):
            module.eval()
        losses.append(task(images, labels))
    for key, value in losses[0].items():
        torch.testing.assert_close(losses[1][key], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_trains_to_the_same_bits_with_low_memory(name: str) -> None:
    normal = variant(name)
    low = copy.deepcopy(normal)
    low.memory = "low"
    (losses, state), (low_losses, low_state) = (trained(task, side=16) for task in (normal, low))
    assert all(torch.equal(loss, low_loss) for loss, low_loss in zip(losses, low_losses, strict=True))
    for key, value in state.items():
        assert torch.equal(value, low_state[key]), key


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_under_autocast(name: str, dtype: torch.dtype) -> None:
    task = variant(name)
    images, labels = squares()
    with torch.autocast("cpu", dtype):
        parts = task(images, labels)
    assert parts["output"].dtype == dtype and parts["loss"].dtype == torch.float32
    wanted = copy.deepcopy(task)(images, labels)["loss"]
    torch.testing.assert_close(parts["loss"], wanted, rtol=0.1, atol=0)
    parts["loss"].backward()
    assert all(parameter.grad.isfinite().all() for parameter in task.parameters())


@pytest.mark.parametrize("name", VARIANTS)
def test_data_parallel_trains_every_parameter_of_a_variant(name: str, tmp_path: Path) -> None:
    task = variant(name)
    train_in_a_group_of_one(task, [squares(), squares()], tmp_path)
    assert all(parameter.grad is not None for parameter in task.parameters())


def test_frskd_is_built_by_name() -> None:
    task = build_frskd(PreactNet().double(), width=3, repeat=2, temperature=3.0)
    assert type(task.loss) is FRSKDLoss and (task.loss.beta, task.loss.temperature) == (100.0, 3.0)
    assert type(task.self_teacher) is BiFPNc and task.self_teacher.out_channels == [12, 18]
    assert len(task.self_teacher.layers) == 2 and task.self_teacher.fc.weight.dtype == torch.float64
    task = build_frskd(PreactNet().double(), "fit", "sla", self_teacher="BiFPN", num_channels=7, num_classes=9)
    assert type(task.loss) is SLALoss and type(task.loss.distillation) is FitNetLoss
    assert task.loss.fc1.weight.shape == (36, 6) and task.loss.fc2.weight.shape == (36, 7)
    assert task.loss.distillation.linear[0][0].weight.dtype == torch.float64
    assert task.loss.distillation.linear[0][0].weight.shape == (7, 4, 1, 1)
    self_teacher = BiFPNc([4, 6], CLASSES)
    task = build_frskd(PreactNet(), "od", self_teacher=self_teacher, alpha=1.0, memory="low", channels_last=False)
    assert type(task.loss) is OverhaulLoss and task.self_teacher is self_teacher
    assert (task.loss.alpha, task.loss.beta, task.memory, task.channels_last) == (1.0, 1e-3, "low", False)
    assert type(build_frskd(Net(described=False), "fit").loss) is FitNetLoss


@pytest.mark.parametrize(
    ("build", "error", "sentence"),
    [
        (lambda: build_frskd(Net(), "at"), ValueError, "distill is 'at', but 'att', 'fit' or 'od'"),
        (lambda: build_frskd(Net(), auxiliary="rot"), ValueError, "auxiliary is 'rot'"),
        (lambda: build_frskd(Net(), self_teacher="FPN"), ValueError, "self_teacher is 'FPN'"),
        (lambda: build_frskd("resnet18"), TypeError, "backbone is a str"),
        (lambda: build_frskd(Net(), self_teacher=Restless(), num_classes=3), ValueError, "num_classes is 3, but"),
        (
            lambda: build_frskd(Net(), "fit", self_teacher=Restless()),
            TypeError,
            r"\(Restless\) has no list out_channels",
        ),
        (
            lambda: build_frskd(Net(), "od"),
            TypeError,
            r"backbone \(Net\) takes no argument preact, but loss \(Overhaul",
        ),
        (
            lambda: FRSKDTask(PreactNet(), Restless(), OverhaulLoss([4, 6], [7, 9])),
            TypeError,
            r"self_teacher \(Restless\) takes no argument preact",
        ),
        (
            lambda: FRSKDTask(PreactNet(), loss=OverhaulLoss([4, 6], BiFPNc([4, 6], CLASSES), margins="live")),
            ValueError,
            "loss takes live margins from another self-teacher",
        ),
        (lambda: variant("sla")(*batch()), ValueError, "images has maps of 10 x 8 pixels, but square"),
        (lambda: ClassificationTask("resnet18"), TypeError, "backbone is a str"),
        (lambda: ClassificationTask(Net(), 1.5), ValueError, "label_smoothing is 1.5"),
        (
            lambda: ClassificationTask(Several())(batch()[0]),
            TypeError,
            r"backbone \(Several\) returned a dict, but logits",
        ),
    ],
)
def test_what_cannot_be_built_is_refused(build: Callable[[], Any], error: type[Exception], sentence: str) -> None:
    with pytest.raises(error, match=sentence):
        build()


@pytest.mark.parametrize("bare", [False, True])
def test_plain_classification_has_the_same_contract(bare: bool) -> None:
    network: nn.Module = (
        nn.Sequential(nn.Conv2d(3, CLASSES, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()) if bare else Net()
    )
    task = ClassificationTask(network, 0.1)
    images, labels = batch()
    for targets in every_kind_of_targets(labels):
        parts = task(images, targets)
        assert list(parts) == ["loss", "output", "ce_student"]
        if isinstance(targets, tuple):
            first, second, lam = targets
            wanted = sum(
                share * F.cross_entropy(parts["output"], target, label_smoothing=0.1)
                for target, share in ((first, lam), (second, 1 - lam))
            )
        else:
            wanted = F.cross_entropy(parts["output"], targets, label_smoothing=0.1)
        torch.testing.assert_close(parts["loss"], wanted)
        assert torch.equal(parts["ce_student"], parts["loss"]) and not parts["ce_student"].requires_grad
        parts["loss"].backward()
    assert all(parameter.grad is not None for parameter in task.parameters())
    assert list(task.eval()(images, labels)) == ["output"] and list(task.train()(images)) == ["output"]
    assert torch.equal(task.eval().student()(images), task(images)["output"])
    assert {key.split(".")[0] for key in task.state_dict()} == {"backbone"}


def test_plain_classification_is_compiled() -> None:
    assert compare_compiled("eager", ClassificationTask(Net(), 0.1), [(4, 0.3), (7, 0.4)]) == 1


@pytest.mark.parametrize("name", ["fit", "od", "sla"])
def test_a_variant_is_compiled(name: str) -> None:
    assert compare_compiled("aot_eager", variant(name), [(4, None), (5, None)], squares) == 1


def test_mixed_labels_of_a_compiled_variant() -> None:
    assert compare_compiled("eager", variant("sla one pass"), [(4, 0.3), (5, 0.6)], squares) == 1


def test_one_graph_serves_every_batch() -> None:
    assert compare_compiled("eager", small_task(), [(4, None), (7, None), (3, None)]) == 1
    mixed = FRSKDTask(Net(), BiFPN([4, 6], CLASSES, num_channels=4, depth=1))
    assert compare_compiled("eager", mixed, [(4, 0.3), (7, 0.4), (3, 0.85)]) == 1


def test_a_compiled_task_evaluates_with_one_graph_and_copies_uncompiled() -> None:
    torch.compiler.reset()
    task = small_task().eval()
    counter = CompileCounterWithBackend("eager")
    task.compile(backend=counter)
    for size in (4, 7):
        images, labels = batch(size)
        assert torch.equal(task(images, labels)["output"], task(images)["output"])
        assert torch.equal(copy.deepcopy(task)(images)["output"], task(images)["output"])
    assert counter.frame_count == 1
    with pytest.raises(ValueError, match=r"targets\[2\] \(lam\) is 1.5"):
        task.train()(images, (labels, labels, 1.5))


@pytest.mark.slow
def test_low_memory_is_compiled_and_updates_statistics_once() -> None:
    task = FRSKDTask(Net(), BiFPN([4, 6], CLASSES, num_channels=4, depth=1), memory="low")
    assert compare_compiled("aot_eager_decomp_partition", task, [(4, None), (7, None), (3, None)]) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("memory", ["normal", "low"])
def test_a_step_is_captured_in_a_cuda_graph(memory: str) -> None:
    task = small_task(memory=memory).cuda()
    images, labels = (tensor.cuda() for tensor in batch())
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            task(images, labels)["loss"].backward()
    torch.cuda.current_stream().wait_stream(stream)
    task.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = task(images, labels)["loss"]
        loss.backward()
    before = int(task.self_teacher.layers[0].lat_conv[0].conv[0][1].num_batches_tracked)
    graph.replay()
    torch.cuda.synchronize()
    assert int(task.self_teacher.layers[0].lat_conv[0].conv[0][1].num_batches_tracked) == before + 1
    captured = [parameter.grad.clone() for parameter in task.parameters()]
    task.zero_grad(set_to_none=True)
    wanted = task(images, labels)["loss"]
    wanted.backward()
    torch.testing.assert_close(loss, wanted.detach())
    for ours, parameter in zip(captured, task.parameters(), strict=True):
        torch.testing.assert_close(ours, parameter.grad, rtol=1e-3, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("memory", ["normal", "low"])
def test_a_compiled_step_on_a_device(memory: str) -> None:
    torch.compiler.reset()
    task = small_task(memory=memory).cuda()
    task.compile()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for size in (4, 7, 3):
            images, labels = (tensor.cuda() for tensor in batch(size))
            task(images, labels)["loss"].backward()
    assert all(parameter.grad.isfinite().all() for parameter in task.parameters())
