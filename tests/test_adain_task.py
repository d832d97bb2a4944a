"""AdaINTask: objective, frozen teacher, kept outputs, files, every way to run it."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from task_checks import check_autocast, check_copies, check_kept_outputs, check_sharded
from test_tasks import CLASSES, Net, compare_compiled, every_kind_of_targets, train_in_a_group_of_one
from torch import Tensor, nn

from frskd_fast.functional import adain, channel_moments
from frskd_fast.losses import AdaINLoss
from frskd_fast.models import create_model
from frskd_fast.tasks import AdaINTask, Student
from frskd_fast.tasks.guard import Guard

IMAGES = (3, 10, 10)


class Teacher(Net):
    """Other sizes and channels than the student's."""

    def __init__(self) -> None:
        super().__init__()
        self.channels = [5, 7]
        self.conv1, self.bn1 = nn.Conv2d(3, 5, 3, 2, padding=1), nn.BatchNorm2d(5)
        self.conv2, self.bn2 = nn.Conv2d(5, 7, 3, 2, 1), nn.BatchNorm2d(7)
        self.fc = nn.Linear(7, CLASSES)


def small_task(**settings: Any) -> AdaINTask:
    return AdaINTask(Net(), Teacher(), **{"image_shape": IMAGES, **settings})


def batch(size: int = 4) -> tuple[Tensor, Tensor]:
    return torch.randn(size, *IMAGES), torch.randint(CLASSES, (size,))


@pytest.mark.parametrize("settings", [{}, {"judge": "kl", "unbiased": False}, {"judge": "ce", "stages": [1]}], ids=str)
def test_the_dict_is_what_networks_and_loss_give(settings: dict[str, Any]) -> None:
    task = small_task(channels_last=False, statistics_weight=0.5, transfer_weight=2.0, **settings)
    hand = copy.deepcopy(task)
    images, labels = batch()
    stages = settings.get("stages", [0, 1])
    unbiased = settings.get("unbiased", True)
    assert task.stages == stages
    for targets in every_kind_of_targets(labels):
        got = task(images, targets)
        features, logits = hand.backbone(images)
        teacher = hand.teacher.network
        with torch.no_grad():
            maps, teacher_logits = teacher(images)
        connected = [connect(features[stage]) for connect, stage in zip(hand.connectors, stages, strict=True)]
        heads = []
        for stage, feature in zip(stages, connected, strict=True):
            mixed = adain(maps[stage], *channel_moments(feature, unbiased=unbiased), unbiased=unbiased)
            torch.testing.assert_close(mixed.mean((2, 3)), feature.mean((2, 3)))  # the student's means
            last = torch.relu(teacher.bn2(teacher.conv2(mixed))) if stage == 0 else mixed
            heads.append(teacher.fc(last.mean((2, 3))))
        loss = AdaINLoss(0.5, 2.0, unbiased, judge=settings.get("judge", "mse"))
        used = [maps[stage] for stage in stages]
        wanted = loss(logits, connected, used, heads, teacher_logits, targets, return_parts=True)
        torch.testing.assert_close(got["loss"], wanted.loss)
        terms = {f"{name}_{stage + 1}" for name in ("mean", "std", "transfer") for stage in stages}
        assert got.keys() == {"loss", "output", "ce", "teacher_output"} | terms
        for place, stage in enumerate(stages):
            torch.testing.assert_close(got[f"transfer_{stage + 1}"], wanted.transfer[place])
            assert got[f"std_{stage + 1}"].dim() == 0 and not got[f"std_{stage + 1}"].requires_grad
        task.zero_grad()
        hand.zero_grad()
        got["loss"].backward()
        wanted.loss.backward()
        for (key, parameter), other in zip(task.named_parameters(), hand.parameters(), strict=True):
            assert (parameter.grad is None) == key.startswith("teacher."), key
            assert parameter.grad is None or torch.allclose(parameter.grad, other.grad, rtol=1e-4, atol=1e-6), key
    assert list(task(images)) == ["output"] and list(task.eval()(images, labels)) == ["output"]
    student = task.student()
    assert type(student) is Student and student.backbone is task.backbone and type(task.backbone) is Net
    assert {"student": 2, "teacher": 2} == {name: len(maps) for name, maps in task.maps(images).items()}


def test_the_teacher_neither_learns_nor_wakes_and_the_guard_is_content() -> None:
    task = small_task()
    before = copy.deepcopy(task.teacher.network.state_dict())
    optimiser = torch.optim.SGD(task.parameter_groups(), lr=0.1)
    guard = Guard(task, steps=2)
    for _ in range(2):
        optimiser.zero_grad()
        parts = task(*batch())
        parts["loss"].backward()
        guard.after_backward(parts)
        optimiser.step()
    after = task.teacher.network.state_dict()
    assert not task.teacher.network.training and all(torch.equal(after[key], value) for key, value in before.items())


def test_what_has_no_weight_costs_nothing() -> None:
    task = small_task(transfer_weight=0.0)
    assert task._tails == () and task.may_be_zero == ["transfer_1", "transfer_2"]
    parts = task(*batch())
    parts["loss"].backward()
    assert parts["transfer_1"] == 0.0 and all(p.grad is not None for p in task.connectors.parameters())
    task = small_task(statistics_weight=0.0)
    assert task.may_be_zero == ["mean_1", "mean_2", "std_1", "std_2"] and task(*batch())["mean_2"] == 0.0


def test_tails_of_ones_own() -> None:
    teacher = Teacher()
    calls = []

    def last(feature: Tensor) -> Tensor:
        calls.append(feature.shape)
        return teacher.fc(feature.mean((2, 3)))

    task, found = (AdaINTask(Net(), teacher, [1], image_shape=IMAGES, tails=tails) for tails in ([last], None))
    found.load_state_dict(task.state_dict())
    images, labels = batch()
    torch.testing.assert_close(task(images, labels)["loss"], found(images, labels)["loss"])
    assert calls == [(4, 7, 3, 3)]


def test_kept_outputs_of_the_teacher_take_its_place() -> None:
    task = small_task()
    check_kept_outputs(task, task.teacher, *batch(), ["logits", "features_1", "features_2"])


def test_a_teacher_that_was_woken_runs_in_evaluation_mode() -> None:
    task = small_task()
    for module in task.modules():
        module.train()
    task(*batch())
    assert not any(module.training for module in task.teacher.network.modules())


def test_states_and_copies_agree() -> None:
    task = small_task()
    images, labels = batch()
    state = task.state_dict()
    assert {key.split(".")[0] for key in state} == {"backbone", "teacher", "connectors"}
    assert [key for key in state if key.startswith("teacher.")] == ["teacher.source"]
    assert list(state)[-6:] == [
        "connectors.1.0.weight",
        *(
            f"connectors.1.1.{name}"
            for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
        ),
    ]
    check_copies(task, images, labels, small_task(), "connectors.0.0")
    for same in (copy.deepcopy(task), pickle.loads(pickle.dumps(task))):
        assert same._tails[0].network.fc is same.teacher.network.fc


def test_autocast_with_a_scaler() -> None:
    check_autocast(small_task(), *batch())


@pytest.mark.parametrize(
    ("backend", "settings"), [("aot_eager", {"stages": [1], "judge": "kl"}), ("eager", {"judge": "ce"})]
)
def test_one_graph_serves_every_batch(backend: str, settings: dict[str, Any]) -> None:
    mix = 0.3 if settings["judge"] == "ce" else None
    assert compare_compiled(backend, small_task(**settings), [(4, mix), (7, mix)], batch) == 1


def test_data_parallel_finds_no_unused_parameter(tmp_path: Path) -> None:
    task = small_task()
    train_in_a_group_of_one(task, [batch(), batch()], tmp_path)
    assert all((parameter.grad is not None) == parameter.requires_grad for parameter in task.parameters())


def test_sharded_tasks_train_and_evaluate(tmp_path: Path) -> None:
    images, labels = batch()
    variants: tuple[dict[str, Any], ...] = ({}, {"transfer_weight": 0.0}, {"stages": [1]})
    tasks = [small_task(channels_last=False, **settings) for settings in variants]
    check_sharded(tasks, images, labels, images, tmp_path)


def test_networks_of_the_zoo() -> None:
    task = AdaINTask(create_model("resnet8", CLASSES), create_model("wrn_16_1", CLASSES), image_shape=(3, 32, 32))
    parts = task(torch.randn(2, 3, 32, 32), torch.tensor([0, 1]))
    parts["loss"].backward()
    assert task.stages == [0, 1, 2] and parts["transfer_1"] > 0
    assert all(p.grad is not None for p in task.parameters() if p.requires_grad)


def test_what_does_not_fit_is_refused() -> None:
    class Alone(nn.Module):
        channels, num_classes = [4, 6], CLASSES

        def forward(self, images: Tensor) -> Tensor:
            return images.mean((2, 3))

    class TenClasses(Teacher):
        def __init__(self) -> None:
            super().__init__()
            self.num_classes = 10

    class ThreeLevels(Teacher):
        def __init__(self) -> None:
            super().__init__()
            self.channels = [5, 7, 9]

    class Detached(Teacher):
        def forward(self, images: Tensor) -> Any:
            maps, _ = super().forward(images)
            return maps, self.fc(images.mean((1, 2, 3), keepdim=True).expand(-1, 7, 1, 1)[:, :, 0, 0])

    plain = small_task()
    plain.backbone.bn1 = plain.backbone.bn2 = nn.Identity()  # whose own complaint would come first
    cases: list[tuple[Any, type[Exception], str]] = [
        (lambda: AdaINTask(Net(), TenClasses()), ValueError, "teacher .* scores 10 classes, but backbone"),
        (lambda: AdaINTask(Net(), ThreeLevels()), ValueError, "teacher .* has 3 feature maps, but backbone"),
        (lambda: AdaINTask(Net(), Detached()), LookupError, "do not come from its feature map 0"),
        (lambda: AdaINTask(Net(), Alone()), TypeError, "returned a Tensor, but"),
        (lambda: AdaINTask("net", Teacher()), TypeError, "backbone is a str"),
        (lambda: small_task(stages=[2]), ValueError, "stages holds 2, but backbone and teacher hand out 2"),
        (lambda: small_task(stages=[1, 0]), ValueError, r"stages is \[1, 0\], but rising"),
        (lambda: small_task(stages=[]), TypeError, r"stages is \[\]"),
        (lambda: small_task(tails=[]), ValueError, "tails holds 0, but one for each of 2 stages"),
        (lambda: small_task(tails=[1, 2]), TypeError, r"tails is \[1, 2\]"),
        (lambda: small_task(judge="l1"), ValueError, "judge is 'l1'"),
        (lambda: small_task(statistics_weight=0.0, transfer_weight=0.0), ValueError, "are both 0"),
        (lambda: plain(torch.randn(1, 3, 2, 2), torch.tensor([0])), ValueError, "images is a batch of one"),
        (
            lambda: small_task()(torch.randn(1, 3, 2, 2), torch.tensor([0])),
            ValueError,
            r"images has shape \(1, 3, 2, 2\), of which a BatchNorm of backbone \(Net\)",
        ),
        (
            lambda: small_task()(torch.randn(2, 3, 2, 2), torch.tensor([0, 1])),
            ValueError,
            "feature map 1 of the student",
        ),
        (lambda: small_task()(batch()[0], torch.full((4,), CLASSES)), ValueError, "targets holds the label"),
    ]
    for call, error, sentence in cases:
        with pytest.raises(error, match=sentence):
            call()
