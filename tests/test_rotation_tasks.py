"""The tasks of HSAKD and SSKD, which learn from rotated images: objective, frozen parts, files, every way to run them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from task_checks import check_autocast, check_copies, check_kept_outputs, check_sharded, check_step
from test_tasks import (
    CLASSES,
    Net,
    PreactNet,
    compare_compiled,
    every_kind_of_targets,
    replay_matches_a_plain_step,
    train_in_a_group_of_one,
)
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from frskd_fast.losses import HSAKDLoss, HSAKDOnlineLoss, HSAKDTeacherLoss, SSKDHeadLoss, SSKDLoss
from frskd_fast.mixing import rotate4
from frskd_fast.models import ProjectionHead, create_model, load_backbone_weights, resnet8, with_auxiliary_heads
from frskd_fast.tasks import HSAKDOnlineTask, HSAKDTask, HSAKDTeacherTask, SSKDHeadTask, SSKDTask, Student, Task

TASKS: dict[str, Callable[..., Any]] = {
    "hsakd teacher": lambda **settings: HSAKDTeacherTask(Net(), **settings),
    "hsakd heads": lambda **settings: HSAKDTeacherTask(Net(), freeze_backbone=True, **settings),
    "hsakd": lambda **settings: HSAKDTask(Net(), with_auxiliary_heads(PreactNet()), **settings),
    "hsakd online": lambda **settings: HSAKDOnlineTask(Net(), PreactNet(), **settings),
    "sskd head": lambda **settings: SSKDHeadTask(Net(), **settings),
    "sskd": lambda **settings: SSKDTask(Net(), ProjectionHead(Net()), **settings),
}
TAUGHT = ("hsakd", "sskd")
# What neither trains nor changes: the prefix of its parameters, and the modules that stay in evaluation mode.
FROZEN = {
    "hsakd heads": ("net.backbone.", "net.backbone"),
    "hsakd": ("teacher.", "teacher"),
    "sskd head": ("net.backbone.", "net"),
    "sskd": ("teacher.", "teacher"),
}


def views(size: int = 3) -> tuple[Tensor, Tensor]:
    return rotate4(torch.randn(size, 3, 10, 10)), torch.randint(CLASSES, (size,))


def by_hand(task: Any, images: Tensor, targets: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss and all that the dict has besides, from networks and losses called one by one."""

    def numbered(name: str, values: Tensor) -> dict[str, Tensor]:
        return {f"{name}_{number + 1}": values[number] for number in range(2)}

    if isinstance(task, HSAKDTeacherTask):
        logits, auxiliary = task.net(images, detach_features=task.freeze_backbone)
        parts = HSAKDTeacherLoss()(logits, auxiliary, targets, return_parts=True)
        return parts.loss, {"output": logits[::4], "ce": parts.ce, **numbered("auxiliary_ce", parts.auxiliary_ce)}
    if isinstance(task, HSAKDTask):
        (logits, auxiliary), (teacher, teacher_auxiliary) = task.net(images), task.teacher.network(images)
        parts = HSAKDLoss(2.0)(logits, teacher, auxiliary, teacher_auxiliary, targets, return_parts=True)
        terms = {"ce": parts.ce, "kd": parts.kd, **numbered("auxiliary_kd", parts.auxiliary_kd)}
        return parts.loss, {"output": logits[::4], "teacher_output": teacher[::4], **terms}
    if isinstance(task, HSAKDOnlineTask):
        outputs = [task.net1(images), task.net2(images)]
        parts = HSAKDOnlineLoss(2.0)(*map(list, zip(*outputs, strict=True)), targets, return_parts=True)
        terms = {}
        for index, net in enumerate(("net1", "net2")):
            terms |= {f"{net}_ce": parts.ce[index], f"{net}_kd": parts.kd[index]}
            terms |= numbered(f"{net}_auxiliary_ce", parts.auxiliary_ce[index])
            terms |= numbered(f"{net}_auxiliary_kd", parts.auxiliary_kd[index])
        return parts.loss, {"output": outputs[0][0][::4], "net2_output": outputs[1][0][::4], **terms}
    logits, projections, _ = task.net(images)
    if isinstance(task, SSKDHeadTask):
        parts = SSKDHeadLoss()(projections, return_parts=True)
        return parts.loss, {"output": logits[::4], "pretext_accuracy": parts.accuracy}
    teacher, teacher_projections, _ = task.teacher.network(images)
    parts = SSKDLoss(kd_temperature=2.0)(logits, teacher, projections, teacher_projections, targets, return_parts=True)
    return parts.loss, {
        "output": logits[::4],
        "teacher_output": teacher[::4],
        **dict(list(parts._asdict().items())[1:]),
    }


@pytest.mark.parametrize("name", TASKS)
def test_the_dict_is_what_networks_and_loss_give(name: str) -> None:
    settings = {"sskd": {"kd_temperature": 2.0}, "hsakd": {"temperature": 2.0}, "hsakd online": {"temperature": 2.0}}
    task = TASKS[name](channels_last=False, **settings.get(name, {}))
    assert task.views == "rotations"
    hand = copy.deepcopy(task)
    images, labels = views()
    for targets in [labels] if name.startswith("sskd") else every_kind_of_targets(labels):
        check_step(task, hand, targets, images, by_hand)
    plain = images[::4]
    assert list(task(plain)) == ["output"] and list(task.eval()(plain, labels)) == ["output"]
    student = task.student()
    assert type(student) is Student and student.backbone is task.backbone and type(task.backbone) is Net
    assert torch.equal(student(plain), task(plain)["output"])


@pytest.mark.parametrize("name", FROZEN)
def test_what_is_frozen_neither_learns_nor_wakes(name: str) -> None:
    task = TASKS[name]()
    prefix, asleep = FROZEN[name]
    before = {
        key: value.clone() for key, value in [*task.named_parameters(), *task.named_buffers()] if key.startswith(prefix)
    }
    trained = {id(parameter) for group in task.parameter_groups() for parameter in group["params"]}
    assert trained == {id(value) for key, value in task.named_parameters() if not key.startswith(prefix)}
    optimiser = torch.optim.SGD(task.parameter_groups(), lr=0.1)
    for mode in (False, True):
        assert task.train(mode).training is mode
        assert not any(module.training for module in task.get_submodule(asleep).modules())
    for _ in range(2):
        task(*views())["loss"].backward()
        optimiser.step()
    after = {**dict(task.named_parameters()), **dict(task.named_buffers())}
    assert before and all(torch.equal(after[key], value) for key, value in before.items())


@pytest.mark.parametrize("name", TAUGHT)
def test_kept_outputs_of_the_teacher_take_its_place(name: str) -> None:
    task = TASKS[name]()
    names = ["logits", "projections"] if name == "sskd" else ["logits", "auxiliary_1", "auxiliary_2"]
    check_kept_outputs(task, task.teacher, *views(), names)


@pytest.mark.parametrize("name", TASKS)
def test_states_and_copies_agree(name: str) -> None:
    task = TASKS[name]()
    images, labels = views()
    state = task.state_dict()
    online = name == "hsakd online"
    assert {key.split(".")[0] for key in state} == (
        {"net1", "net2"} if online else {"net", "teacher"} if name in TAUGHT else {"net"}
    )
    assert [key for key in state if key.startswith("teacher.")] == (["teacher.source"] if name in TAUGHT else [])
    check_copies(task, images, labels, TASKS[name]() if name in TAUGHT else None)


@pytest.mark.parametrize("name", TASKS)
def test_autocast_with_a_scaler(name: str) -> None:
    check_autocast(TASKS[name](), *views())


# PyTorch chooses between two convolutions on the CPU at 16 rows, and a graph serves one side of that.
@pytest.mark.parametrize(
    ("name", "backend"),
    [
        ("hsakd heads", "eager"),
        ("hsakd", "aot_eager"),
        ("hsakd online", "eager"),
        ("sskd head", "eager"),
        ("sskd", "aot_eager"),
    ],
)
def test_one_graph_serves_every_batch(name: str, backend: str) -> None:
    assert compare_compiled(backend, TASKS[name](), [(4, None), (7, None)], views) == 1


def test_one_graph_serves_mixed_labels() -> None:
    assert compare_compiled("eager", TASKS["hsakd online"](), [(4, 0.3), (7, 0.6)], views) == 1


@pytest.mark.parametrize("name", ["hsakd", "sskd"])
def test_data_parallel_finds_no_unused_parameter(name: str, tmp_path: Path) -> None:
    task = TASKS[name]()
    train_in_a_group_of_one(task, [views(), views()], tmp_path)
    assert all((parameter.grad is not None) == parameter.requires_grad for parameter in task.parameters())


def test_data_parallel_without_similarities(tmp_path: Path) -> None:
    """The projection head stays unused."""
    train_in_a_group_of_one(TASKS["sskd"](similarity_weight=0.0), [views(), views()], tmp_path)


def test_sharded_tasks_train_and_evaluate(tmp_path: Path) -> None:
    images, labels = views()
    tasks = [build(channels_last=False) for build in TASKS.values()]
    check_sharded(tasks, images, labels, images[::4], tmp_path)


def test_evaluation_measures_heads_and_both_networks() -> None:
    images, labels = torch.randn(3, 3, 10, 10), torch.randint(CLASSES, (3,))
    heads = [f"{metric}_{head}" for head in (1, 2) for metric in ("rotation_class_accuracy", "joint_accuracy")]
    wanted = {
        "hsakd": ["rotation_class_accuracy", *heads],
        "hsakd teacher": ["rotation_class_accuracy", *heads],
        "hsakd online": [
            "net2_accuracy",
            *(f"{net}_{metric}" for net in ("net1", "net2") for metric in ("rotation_class_accuracy", *heads)),
        ],
        "sskd head": ["pretext_accuracy"],
        "sskd": [],
    }
    for name, metrics in wanted.items():
        task: Task = TASKS[name]().eval()
        measured = task.evaluate(images, labels)
        assert list(measured) == ["output", *metrics]
        assert torch.equal(measured.pop("output"), task.student()(images))
        assert all(0 <= value <= 1 and value.dim() == 0 for value in measured.values())
        if name != "sskd":
            measured = TASKS[name](evaluate_rotations=False).eval().evaluate(images, labels)
            assert list(measured) == (["output", "net2_accuracy"] if name == "hsakd online" else ["output"])


def test_a_peer_made_of_trained_weights_has_statistics_of_its_own() -> None:
    network = Net()
    network.train()(torch.randn(8, 3, 10, 10))
    task = HSAKDOnlineTask(network)
    assert network.bn1.num_batches_tracked == 1 and not torch.equal(network.bn1.running_mean, torch.zeros(4))
    twin = task.net2.backbone
    assert twin.bn1.num_batches_tracked == 0 and torch.equal(twin.bn1.running_mean, torch.zeros(4))
    # A layer that does not train keeps weights and statistics.
    network.requires_grad_(False)
    kept = HSAKDOnlineTask(network).net2.backbone
    assert all(torch.equal(value, kept.state_dict()[name]) for name, value in network.state_dict().items())


def test_either_network_of_a_pair_may_be_taken() -> None:
    images, _ = views()
    task = HSAKDOnlineTask(Net(), PreactNet(), which="net2").eval()
    students = task.students()
    assert {name: type(student.backbone) for name, student in students.items()} == {"net1": Net, "net2": PreactNet}
    assert task.student().backbone is task.backbone is students["net2"].backbone
    assert torch.equal(task(images)["output"], task.student("net2")(images))
    assert list(task.train()(images, torch.arange(3)))[:3] == ["loss", "output", "net1_output"]
    assert {name: len(maps) for name, maps in task.maps(images).items()} == {"net1": 2, "net2": 2}
    named = HSAKDOnlineTask(resnet8(num_classes=CLASSES), "resnet14")
    assert len(named.net2.backbone.layer1) == 2 and named.net2.num_classes == CLASSES
    alike = HSAKDOnlineTask(create_model("resnet8_aux", CLASSES))
    for (key, first), second in zip(alike.net1.named_parameters(), alike.net2.parameters(), strict=True):
        assert torch.equal(first.flatten().sort().values, second.flatten().sort().values), key
        assert first.dim() < 2 or not torch.equal(first, second), key


@pytest.mark.parametrize("kind", ["hsakd", "sskd"])
def test_a_teacher_comes_from_the_checkpoint_of_its_own_task(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    stage, task_of, keys = {
        "hsakd": (HSAKDTeacherTask, HSAKDTask, "auxiliary_classifier."),
        "sskd": (SSKDHeadTask, SSKDTask, "proj_head."),
    }[kind]
    first = stage(resnet8(num_classes=CLASSES))
    state = {f"task.{key}": value for key, value in first.state_dict().items()}
    torch.save({"state_dict": state, "hyper_parameters": {"backbone": "resnet8", "num_classes": CLASSES}}, path)
    task = task_of(resnet8(num_classes=CLASSES).double(), str(path))
    assert task.teacher.path == str(path)
    for key, value in task.teacher.network.state_dict().items():
        torch.testing.assert_close(value.float(), first.net.state_dict()[key].float(), msg=key)
    assert task(rotate4(torch.randn(2, 3, 16, 16, dtype=torch.float64)), torch.arange(2))["loss"].dtype == torch.float64
    same = task_of(resnet8(num_classes=CLASSES), str(path))
    same.load_state_dict(task.state_dict())
    # What `frskd-fast export` does with the student's checkpoint.
    torch.save(
        {"state_dict": {f"task.{key}": value for key, value in task.state_dict().items()}}, tmp_path / "student.ckpt"
    )
    student = resnet8(num_classes=CLASSES).double()
    load_backbone_weights(student, tmp_path / "student.ckpt")
    assert all(torch.equal(value, task.backbone.state_dict()[key]) for key, value in student.state_dict().items())
    torch.save({"state_dict": {key: value for key, value in state.items() if keys not in key}}, path)
    with pytest.raises(ValueError, match=f"{stage.__name__}"):
        task_of(resnet8(num_classes=CLASSES), str(path), teacher_name="resnet8")


def _taught_by_itself(task: Callable[..., Task], network: Any) -> Task:
    """Plain, the backbone gets heads of its own."""
    return task(network.backbone, network)


@pytest.mark.parametrize(
    ("build", "error", "sentence"),
    [
        (lambda: HSAKDTeacherTask("resnet8"), TypeError, "backbone is a str"),
        (lambda: SSKDTask(Net(), Net()), TypeError, "teacher is a Net without a projection head.*SSKDHeadTask"),
        (lambda: HSAKDTask(Net(), Net()), TypeError, "teacher is a Net without auxiliary heads.*HSAKDTeacherTask"),
        (
            lambda: HSAKDTask(Net(), create_model("resnet8_aux", CLASSES)),
            ValueError,
            r"teacher \(CIFARResNet\) has 3 auxiliary heads, but backbone \(Net\) has 2",
        ),
        (
            lambda: HSAKDTask(resnet8(3), create_model("resnet8_aux", 4)),
            ValueError,
            "scores 4 classes, but backbone .* scores 3",
        ),
        (lambda: SSKDTask(resnet8(3), ProjectionHead(resnet8(4))), ValueError, "scores 4 classes"),
        (lambda: _taught_by_itself(HSAKDTask, with_auxiliary_heads(Net())), ValueError, "have parameters in common"),
        (lambda: _taught_by_itself(SSKDTask, ProjectionHead(Net())), ValueError, "have parameters in common"),
        (lambda: HSAKDOnlineTask(Net(), which="net3"), ValueError, "which is 'net3', but 'net1' or 'net2'"),
        (lambda: HSAKDOnlineTask(Net()).student("first"), ValueError, "which is 'first'"),
        (lambda: HSAKDOnlineTask(Net(), 3), TypeError, "peer is a int"),
        (lambda: HSAKDOnlineTask(resnet8(CLASSES), Net()), ValueError, r"peer \(Net\) has 2 auxiliary heads"),
        (
            lambda: TASKS["hsakd"]()(views()[0][::4], torch.arange(3)),
            ValueError,
            "images has 3 rows and targets 3, but",
        ),
        (lambda: TASKS["sskd"]()(views()[0], torch.arange(12)), ValueError, r"call task\(frskd_fast.mixing.rotate4"),
        (lambda: TASKS["sskd head"]()(views()[0], torch.arange(5)), ValueError, "12 rows and targets 5"),
    ],
)
def test_what_does_not_fit_is_refused(build: Callable[[], nn.Module], error: type[Exception], sentence: str) -> None:
    with pytest.raises(error, match=sentence):
        build()


class NothingReadBack(TorchDispatchMode):
    """No operation that a device would have to be waited for: a number on the host, a shape that depends on values."""

    WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal")

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert not any(function.name().startswith(f"aten::{name}") for name in self.WAITING), function.name()
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", TASKS)
def test_a_step_reads_nothing_back(name: str) -> None:
    task = TASKS[name]()
    images, labels = views()
    with NothingReadBack():
        task(images, labels)["loss"].backward()


@pytest.mark.gpu
@pytest.mark.parametrize("name", TASKS)
def test_a_step_waits_for_no_device_and_is_captured_in_a_cuda_graph(name: str) -> None:
    task = TASKS[name]().cuda()
    images, labels = (tensor.cuda() for tensor in views())
    replay_matches_a_plain_step(task, images, labels)
