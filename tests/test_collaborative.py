"""CollaborativeTeachingTask: its objective, the shared stem, who learns, files, every way to run it, refusals."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from task_checks import check_autocast, check_copies, check_kept_outputs, check_sharded, check_step
from test_tasks import CLASSES, Net, PreactNet, batch, compare_compiled, every_kind_of_targets, train_in_a_group_of_one
from torch import Tensor, nn

from frskd_fast.losses import CollaborativeTeachingLoss
from frskd_fast.models import vgg8, wrn_16_1
from frskd_fast.tasks import CollaborativeTeachingTask, Student
from frskd_fast.tasks.guard import Guard

VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "shared": {"share_stem": True},
    "scratch": {"attention_on": "scratch", "batch_size": 7},
    "both": {"attention_on": "both", "beta": 10.0, "label_smoothing": 0.1},
    "no attention": {"beta": 0.0},
    "no scratch teacher": {"gamma": 0.0, "alpha": 0.4, "temperature": 2.0},
    "attention alone": {"gamma": 0.0, "alpha": 0.0},
}


def task_of(name: str = "default", **settings: Any) -> CollaborativeTeachingTask:
    variant = {**VARIANTS[name], **settings}
    return CollaborativeTeachingTask(Net(), None if variant.get("gamma") == 0.0 else PreactNet(), Net(), **variant)


def by_hand(task: CollaborativeTeachingTask, images: Tensor, targets: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss and all that the dict has besides, from networks and loss called one by one."""
    features, output = task.backbone(images)
    scratch_features, scratch = task.scratch(images) if task.scratch is not None else (None, None)
    expert_features, expert = task.expert.network(images)
    given = output, scratch, features, scratch_features, expert_features, targets, expert
    parts = task.loss(*given, return_parts=True)
    terms = {"output": output, "ce_student": parts.ce_student}
    if scratch is not None:
        terms |= {"scratch_output": scratch, "ce_scratch": parts.ce_scratch, "hint": parts.hint}
    elif task.loss.alpha:
        terms |= {"expert_output": expert, "kd": parts.kd}
    return parts.loss, {**terms, **{f"attention_{level}": value for level, value in enumerate(parts.attention, 1)}}


@pytest.mark.parametrize("name", VARIANTS)
def test_the_dict_is_what_networks_and_loss_give(name: str) -> None:
    task = task_of(name, channels_last=False)
    hand = copy.deepcopy(task)
    images, labels = batch()
    for targets in every_kind_of_targets(labels):
        check_step(task, hand, targets, images, by_hand)
    assert list(task(images)) == ["output"] and list(task.eval()(images, labels)) == ["output"]
    student = task.student()
    assert type(student) is Student and student.backbone is task.backbone
    assert torch.equal(student(images), task(images)["output"])


def test_settings_reach_the_loss() -> None:
    settings = {"beta": 3.0, "gamma": 0.2, "attention_on": "both", "batch_size": 7, "resize": "pool", "ignore_index": 3}
    loss = task_of(**settings, alpha=0.3, temperature=2.0, label_smoothing=0.1).loss
    assert isinstance(loss, CollaborativeTeachingLoss)
    wanted = {**settings, "alpha": 0.3, "temperature": 2.0, "label_smoothing": 0.1}
    assert {name: getattr(loss, name) for name in wanted} == wanted


def test_the_expert_neither_learns_nor_wakes_and_both_others_do() -> None:
    task = task_of()
    before = {key: value.clone() for key, value in task.state_dict().items()}
    expert = {key: value.clone() for key, value in task.expert.network.state_dict().items()}
    (group,) = task.parameter_groups()
    names = {id(parameter): name for name, parameter in task.named_parameters()}
    assert {names[id(parameter)].split(".")[0] for parameter in group["params"]} == {"backbone", "scratch"}
    optimiser = torch.optim.SGD(task.parameter_groups(), lr=0.1)
    for mode in (False, True):
        assert task.train(mode).training is mode
        assert not any(module.training for module in task.expert.modules())
    task(*batch())["loss"].backward()
    optimiser.step()
    assert all(torch.equal(value, expert[key]) for key, value in task.expert.network.state_dict().items())
    moved = [key for key, value in task.state_dict().items() if not torch.equal(value, before[key])]
    assert {key.split(".")[0] for key in moved} == {"backbone", "scratch"} and "expert.source" in before


def test_a_shared_stem_is_one_parameter_that_both_train() -> None:
    student, scratch = wrn_16_1(CLASSES), wrn_16_1(CLASSES)
    kept = scratch.conv1.weight.clone()
    task = CollaborativeTeachingTask(student, scratch, wrn_16_1(CLASSES), share_stem=True)
    assert student.conv1 is scratch.conv1 and torch.equal(student.conv1.weight, kept)
    (group,) = task.parameter_groups()
    alone = sum(1 for _ in wrn_16_1(CLASSES).parameters())
    assert len(group["params"]) == len(set(map(id, group["params"]))) == 2 * alone - 1
    state = task.state_dict()
    assert state["backbone.conv1.weight"].data_ptr() == state["scratch.conv1.weight"].data_ptr()
    for twin in (copy.deepcopy(task), pickle.loads(pickle.dumps(task)), copy.deepcopy(task).double()):
        assert twin.backbone.conv1 is twin.scratch.conv1 is not student.conv1
        assert twin.backbone.conv1.weight.dtype == next(twin.parameters()).dtype
    images, labels = torch.randn(2, 3, 16, 16), torch.tensor([3, 1])
    parts = task(images, labels)
    shared = student.conv1.weight
    features, logits = student(images)
    own = nn.functional.cross_entropy(scratch(images)[1], labels)
    (of_scratch,) = torch.autograd.grad(own, shared)
    (total,) = torch.autograd.grad(parts["loss"], shared)
    rest = task.loss(logits, parts["scratch_output"].detach(), features, None, task.expert(images)[0], labels)
    (of_student,) = torch.autograd.grad(rest, shared)
    torch.testing.assert_close(total, of_scratch + of_student, rtol=1e-4, atol=1e-5)
    again = CollaborativeTeachingTask(wrn_16_1(CLASSES), wrn_16_1(CLASSES), task.expert, share_stem=True)
    again.load_state_dict(state)
    assert again.backbone.conv1 is again.scratch.conv1 and torch.equal(again.backbone.conv1.weight, kept)
    alone_again = wrn_16_1(CLASSES)
    alone_again.load_state_dict(task.state_dict_for_inference())
    torch.testing.assert_close(alone_again.eval()(images)[1], task.eval().student()(images))


@pytest.mark.parametrize("name", ["default", "no scratch teacher"])
def test_kept_outputs_of_the_expert_take_its_place(name: str) -> None:
    task = task_of(name)
    names = [*(["logits"] if name != "default" else []), "features_1", "features_2"]
    check_kept_outputs(task, task.expert, *batch(), names)


def test_without_attention_the_expert_does_not_run() -> None:
    task = task_of("no attention")
    assert task.teacher_outputs(batch()[0]) == {}
    task.expert.network.forward = None
    assert list(task(*batch())) == ["loss", "output", "ce_student", "scratch_output", "ce_scratch", "hint"]


def test_states_and_copies_agree() -> None:
    task = task_of("shared")
    images, labels = batch()
    state = task.state_dict()
    assert {key.split(".")[0] for key in state} == {"backbone", "scratch", "expert"}
    assert [key for key in state if key.startswith("expert.")] == ["expert.source"]
    check_copies(task, images, labels, task_of("shared"), "scratch.fc")


@pytest.mark.parametrize("name", ["shared", "both", "no scratch teacher"])
def test_autocast_with_a_scaler(name: str) -> None:
    check_autocast(task_of(name), *batch(), lr=0.01)


# PyTorch chooses between two convolutions on the CPU at 16 rows, and a graph serves one side of that.
@pytest.mark.parametrize(("name", "backend"), [("shared", "aot_eager"), ("no scratch teacher", "eager")])
def test_one_graph_serves_every_batch(name: str, backend: str) -> None:
    assert compare_compiled(backend, task_of(name), [(4, None), (7, None)]) == 1


def test_one_graph_serves_mixed_labels() -> None:
    assert compare_compiled("eager", task_of("both"), [(4, 0.3), (7, 0.6)]) == 1


@pytest.mark.parametrize("name", ["shared", "scratch", "no scratch teacher"])
def test_data_parallel_finds_no_unused_parameter(name: str, tmp_path: Path) -> None:
    task = task_of(name)
    train_in_a_group_of_one(task, [batch(), batch()], tmp_path)
    assert all((parameter.grad is not None) == parameter.requires_grad for parameter in task.parameters())


def test_sharded_tasks_train_and_evaluate(tmp_path: Path) -> None:
    images, labels = batch()
    tasks = [task_of(name, channels_last=False) for name in ("default", "shared")]
    check_sharded(tasks, images, labels, images, tmp_path)


def test_the_scratch_teacher_is_measured_and_may_be_taken_away() -> None:
    images, labels = batch()
    task = task_of().eval()
    measured = task.evaluate(images, labels)
    assert list(measured) == ["output", "scratch_accuracy"]
    teacher = task.scratch_teacher()
    assert teacher.backbone is task.scratch
    assert measured["scratch_accuracy"] == (teacher(images).argmax(1) == labels).float().mean()
    for quiet in (task_of(evaluate_scratch=False), task_of("no scratch teacher")):
        assert list(quiet.eval().evaluate(images, labels)) == ["output"]
    assert {name: len(maps) for name, maps in task.maps(images).items()} == {"student": 2, "scratch": 2, "expert": 2}
    assert list(task_of("no scratch teacher").maps(images)) == ["student", "expert"]


@pytest.mark.parametrize("name", VARIANTS)
def test_the_guard_lets_it_train(name: str) -> None:
    task = task_of(name)
    guard = Guard(task, steps=1)
    parts = task(*batch())
    parts["loss"].backward()
    guard.after_backward(parts)
    assert guard.done


@pytest.mark.parametrize("own", ["backbone", "scratch", "expert"])
def test_networks_with_parameters_in_common_are_refused_and_left_alone(own: str) -> None:
    """A frozen expert would freeze the other network with it."""
    networks = {"backbone": Net(), "scratch": Net(), "expert": Net()}
    first, second = (name for name in ("expert", "scratch", "backbone") if name != own)
    networks[first].fc = networks[second].fc
    with pytest.raises(ValueError, match=f"{first} .Net. and {second} .Net. have parameters in common"):
        CollaborativeTeachingTask(**networks)
    assert all(parameter.requires_grad for network in networks.values() for parameter in network.parameters())


def test_a_stem_that_is_shared_already_stays_so() -> None:
    task = task_of("shared")
    again = CollaborativeTeachingTask(task.backbone, task.scratch, Net(), share_stem=True)
    assert again.backbone.conv1 is again.scratch.conv1 is task.backbone.conv1
    with pytest.raises(ValueError, match=r"in common.*set share_stem to true"):
        CollaborativeTeachingTask(task.backbone, task.scratch, Net())


def test_networks_by_name_and_an_expert_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    first = wrn_16_1(CLASSES)
    state = {f"task.backbone.{key}": value for key, value in first.state_dict().items()}
    torch.save({"state_dict": state, "hyper_parameters": {"backbone": "wrn_16_1", "num_classes": CLASSES}}, path)
    task = CollaborativeTeachingTask(wrn_16_1(CLASSES).double(), "wrn_16_2", str(path))
    assert task.expert.path == str(path) and task.scratch.channels == [32, 64, 128]
    assert {parameter.dtype for parameter in task.parameters()} == {torch.float64}
    torch.testing.assert_close(task.expert.network.fc.weight, first.fc.weight.double(), check_dtype=True)
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    assert task(images, torch.arange(2))["loss"].dtype == torch.float64
    bare = CollaborativeTeachingTask(Net(described=False), Net(), Net(described=False), share_stem=True)
    assert bare.backbone.model.conv1 is bare.scratch.conv1 and bare.expert.network.channels == [4, 6]
    assert bare(*batch())["attention_2"] > 0


@pytest.mark.parametrize(
    ("build", "error", "sentence"),
    [
        (lambda: CollaborativeTeachingTask("wrn_16_1", Net(), Net()), TypeError, "backbone is a str"),
        (lambda: CollaborativeTeachingTask(Net(), None, Net()), TypeError, "scratch is None, but a torch.nn.Module or"),
        (lambda: CollaborativeTeachingTask(Net(), 3, Net()), TypeError, "scratch is a int"),
        (lambda: CollaborativeTeachingTask(Net(), "wrn_40", Net()), ValueError, "scratch is 'wrn_40', but one of"),
        (
            lambda: CollaborativeTeachingTask(Net(described=False), "wrn_40_1", Net(), beta=0.0),
            TypeError,
            "scratch is 'wrn_40_1'.*backbone .Net. has no num_classes",
        ),
        (lambda: CollaborativeTeachingTask(*[Net()] * 2, Net()), ValueError, "scratch is the backbone itself"),
        (lambda: CollaborativeTeachingTask(Net(), Net(), 3), TypeError, "expert is a int"),
        (
            lambda: CollaborativeTeachingTask(Net(), Net(), Net(), expert_name="wrn_16_1"),
            ValueError,
            r"expert is a module \(Net\), which is used as it is, so expert_name",
        ),
        (
            lambda: CollaborativeTeachingTask(Net(), Net(), "no file"),
            ValueError,
            "expert is 'no file'.*with expert_name=",
        ),
        (
            lambda: CollaborativeTeachingTask(Net(), Net(), wrn_16_1(CLASSES)),
            ValueError,
            r"expert \(CIFARWideResNet\) has 3 feature maps, but backbone \(Net\) has 2",
        ),
        (
            lambda: CollaborativeTeachingTask(wrn_16_1(3), wrn_16_1(4), wrn_16_1(3)),
            ValueError,
            r"scratch \(CIFARWideResNet\) scores 4 classes, but backbone .* scores 3",
        ),
        (
            lambda: CollaborativeTeachingTask(wrn_16_1(3), wrn_16_1(3), wrn_16_1(4)),
            ValueError,
            r"expert \(CIFARWideResNet\) scores 4 classes",
        ),
        (
            lambda: CollaborativeTeachingTask(wrn_16_1(3), Net(), wrn_16_1(3), attention_on="scratch"),
            ValueError,
            "scratch .Net. scores 5",
        ),
        (lambda: task_of(attention_on="expert"), ValueError, "attention_on is 'expert'"),
        (lambda: CollaborativeTeachingTask(Net(), Net(), Net(), gamma=0.0), ValueError, "gamma is 0.*scratch is a Net"),
        (lambda: task_of("attention alone", share_stem=True), ValueError, "share_stem is true, but gamma is 0"),
        (
            lambda: CollaborativeTeachingTask(wrn_16_1(3), vgg8(3), wrn_16_1(3), share_stem=True),
            ValueError,
            r"scratch \(VGG\) begins with Conv2d\(3, 64.* and backbone \(CIFARWideResNet\) with Conv2d\(3, 16",
        ),
        (lambda: task_of("attention alone").scratch_teacher(), ValueError, "there is no scratch teacher"),
        (
            lambda: CollaborativeTeachingTask(Net(), wrn_16_1(CLASSES), Net())(
                torch.randn(1, 3, 4, 4), torch.tensor([0])
            ),
            ValueError,
            r"images has shape \(1, 3, 4, 4\), of which a BatchNorm of (backbone|scratch)",
        ),
        (lambda: task_of()(batch()[0], torch.tensor([0, 1, 2, CLASSES])), ValueError, f"holds the label {CLASSES}"),
    ],
)
def test_what_does_not_fit_is_refused(build: Callable[[], Any], error: type[Exception], sentence: str) -> None:
    with pytest.raises(error, match=sentence):
        build()
