"""A loss, a network and a task of somebody else's: what `docs/architecture.md` says about adding a method, done."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from toy_method import ToyLoss, ToyNet, ToyTask

from frskd_fast.losses import SLALoss
from frskd_fast.losses.base import DistillationLoss
from frskd_fast.models import create_model, list_models, register_model
from frskd_fast.tasks import FrozenTeacher, FRSKDTask, Student

CLASSES = 6


def batch(size: int = 5) -> tuple[Tensor, Tensor]:
    return torch.randn(size, 3, 12, 12), torch.randint(0, CLASSES, (size,))


def toy(**arguments: Any) -> ToyTask:
    return ToyTask(create_model("ToyNet", CLASSES, width=3), **arguments)


def taught(tmp_path: Path, seed: int = 7) -> ToyTask:
    torch.manual_seed(seed)
    path = tmp_path / f"teacher{seed}.pt"
    torch.save(ToyNet(CLASSES).state_dict(), path)
    return toy(teacher=str(path))


def trained(task: ToyTask, epochs: int = 3) -> list[float]:
    optimiser = torch.optim.SGD(task.parameter_groups(), lr=0.1, momentum=0.9, weight_decay=1e-3)
    generator = torch.Generator().manual_seed(1)
    losses = []
    for epoch in range(epochs):
        task.start_epoch(epoch, epochs)
        images, targets = torch.randn(8, 3, 12, 12, generator=generator), torch.arange(8) % CLASSES
        loss = task(images, targets)["loss"]
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    return losses


def test_the_network_is_known_by_its_name() -> None:
    assert list_models("Toy*") == ["ToyNet"] and "ToyNet" in list_models()
    assert create_model("ToyNet", CLASSES, width=3).channels == [3, 6]
    with pytest.raises(ValueError, match="did you mean 'ToyNet'"):
        create_model("ToyNte")

    def cifarresnet18(num_classes: int = 10) -> nn.Module:
        raise AssertionError

    with pytest.raises(ValueError, match="a model called 'cifarresnet18' is registered by"):
        register_model(cifarresnet18)


def test_the_loss() -> None:
    student, teacher = (torch.randn(4, CLASSES, requires_grad=True) for _ in range(2))
    targets = torch.tensor([0, 5, 2, 2])
    parts = ToyLoss(0.5)(student, teacher, targets, ramp=0.25, return_parts=True)
    hint = F.mse_loss(student, teacher.detach())
    wanted = F.cross_entropy(student, targets) + F.cross_entropy(teacher, targets) + 0.125 * hint
    torch.testing.assert_close(parts.loss, wanted)
    assert [part.requires_grad for part in parts] == [True, False, False, False]
    got, gradients = (torch.autograd.grad(value, [student, teacher]) for value in (parts.loss, wanted))
    torch.testing.assert_close(got, gradients)
    assert torch.equal(ToyLoss(0.5)(student, teacher, targets, ramp=0.25), parts.loss)
    assert repr(ToyLoss(0.5)) == "ToyLoss(weight=0.5)"


def test_the_task_keeps_the_protocol() -> None:
    task = toy(head_weight_decay=0.25)
    images, targets = batch()
    parts = task(images, targets)
    assert list(parts) == ["loss", "ce_student", "ce_teacher", "hint", "output", "teacher_output"]
    assert torch.equal(parts["loss"], parts["ce_student"] + parts["ce_teacher"])  # the ramp is at 0
    groups = task.parameter_groups()
    assert [group.get("weight_decay") for group in groups] == [None, 0.25]
    assert sum(len(group["params"]) for group in groups) == len(list(task.parameters()))
    assert task.views == "plain"
    losses = trained(task, epochs=4)
    assert task.ramp == 1.0 and losses[-1] < losses[0]
    assert type(task.student()) is Student and type(task.get_eval_model()) is Student
    output = task.eval()(images, targets)
    assert list(output) == ["output"] and torch.equal(task.student()(images), output["output"])
    assert task.state_dict_for_inference().keys() == task.backbone.state_dict().keys()


def test_a_ramp_does_not_compile_anew() -> None:
    torch.compiler.reset()
    task = toy()
    counter = CompileCounterWithBackend("eager")
    plain = copy.deepcopy(task)
    task.compile(backend=counter)
    totals = []
    images, targets = batch()
    for epoch in range(3):
        for each in (task, plain):
            each.start_epoch(epoch, 3)
        totals.append(task(images, targets)["loss"])
        torch.testing.assert_close(totals[-1], plain(images, targets)["loss"])
    assert counter.frame_count == 1 and len({total.item() for total in totals}) == 3


def test_a_frozen_teacher_neither_learns_nor_wakes(tmp_path: Path) -> None:
    task = taught(tmp_path)
    assert task.teacher is not None
    before = copy.deepcopy(task.teacher.network.state_dict())
    for mode in (True, False):
        task.train(mode)
        assert task.training is mode and not any(module.training for module in task.teacher.modules())
    task.train()
    given = {id(parameter) for group in task.parameter_groups() for parameter in group["params"]}
    assert given.isdisjoint(map(id, task.teacher.parameters()))
    assert given == {id(parameter) for parameter in task.parameters() if parameter.requires_grad}
    trained(task)
    for name, value in task.teacher.network.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(parameter.grad is None for parameter in task.teacher.parameters())


def test_a_checkpoint_names_the_frozen_teacher_and_does_not_hold_it(tmp_path: Path) -> None:
    task = taught(tmp_path)
    trained(task)
    state = task.state_dict()
    assert [name for name in state if name.startswith("teacher.")] == ["teacher.source"]
    assert bytes(state["teacher.source"].tolist()).decode().endswith(str(tmp_path / "teacher7.pt"))
    torch.save(state, tmp_path / "checkpoint.pt")
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    names = list(state)
    other = taught(tmp_path)
    assert task.teacher is not None and other.teacher is not None
    other.teacher.to(memory_format=torch.channels_last)  # the checksum is of values, not of strides
    other.load_state_dict(state)  # strictly
    assert list(state) == names
    images, targets = batch()
    assert torch.equal(other(images, targets)["loss"], task(images, targets)["loss"])
    for same in (copy.deepcopy(task), pickle.loads(pickle.dumps(task))):
        same.load_state_dict(state)
        assert not same.train().teacher.network.training
    with pytest.raises(RuntimeError, match=r"teacher.source is that of a teacher from '.*teacher7.pt' with checksum"):
        taught(tmp_path, seed=8).load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"Missing key.*teacher\.source"):
        taught(tmp_path).load_state_dict({name: value for name, value in state.items() if name != "teacher.source"})
    # Alone, and with gradients that pass through.
    teacher = FrozenTeacher(ToyNet(CLASSES).double())
    teacher.load_state_dict(teacher.state_dict())
    images = images.double().requires_grad_()
    teacher(images)[1].sum().backward()
    assert images.grad is not None and images.grad.any()


class Mean(DistillationLoss):
    """D = mean over images of (mean f_s - mean f_t)^2 of the last maps: a feature term of somebody else's."""

    needs_preact = True

    def __init__(self, by_image: bool) -> None:
        super().__init__(1.5, 3.0, 2.0, "auto", 0.0, -100)
        self.by_image = by_image

    def rows(self, students: Any, teachers: Any) -> Tensor:
        return (students[-1].mean((1, 2, 3)) - teachers[-1].detach().mean((1, 2, 3))).square()

    def feature_rows(self, students: Any, teachers: Any) -> Tensor | None:
        return self.rows(students, teachers) if self.by_image else None

    def feature_term(self, students: Any, teachers: Any) -> Tensor:
        return self.rows(students, teachers).mean()


@pytest.mark.parametrize("passes", ["one", "two"])
def test_another_feature_term_serves_frskd_and_sla(passes: str) -> None:
    student, teacher = (torch.randn(12, CLASSES, requires_grad=True) for _ in range(2))
    students, teachers = [torch.randn(12, 4, 3, 3, requires_grad=True)], [torch.randn(12, 7, 3, 3)]
    loss = Mean(by_image=True)
    parts = loss(student, teacher, students, teachers, return_parts=True)
    torch.testing.assert_close(parts.feature, loss.rows(students, teachers).mean().detach())
    torch.testing.assert_close(parts.loss, 1.5 * parts.kd + 3.0 * parts.feature)
    images = {"one": slice(None, None, 4), "two": slice(0, 3)}[passes]
    rotated = {} if passes == "one" else {"rotated_student_feats": students, "rotated_teacher_feats": teachers}
    rows = slice(None) if passes == "one" else images
    terms = []
    for by_image in (True, False):
        torch.manual_seed(3)
        sla = SLALoss(Mean(by_image), 4, 7, CLASSES, passes=passes)
        assert sla.needs_preact
        features = [x[rows] for x in students], [x[rows] for x in teachers]
        terms.append(sla(student[rows], teacher[rows], *features, **rotated, return_parts=True))
    torch.testing.assert_close(terms[0], terms[1])
    upright = loss.rows([x[images] for x in students], [x[images] for x in teachers])
    torch.testing.assert_close(terms[0].feature, torch.cat([upright, loss.rows(students, teachers)]).mean().detach())


class Declaring(nn.Module):
    """A loss that is no `Loss`, and says what it wants by the same names."""

    needs_preact = True
    ignore_index = 3

    def __init__(self, passes: str | None) -> None:
        super().__init__()
        self.passes = passes
        self.seen: dict[str, Any] = {}

    def forward(self, student: Tensor, teacher: Tensor, students: Any, teachers: Any, targets: Any, **more: Any) -> Any:
        self.seen = {"rows": len(student), "negative": bool((students[0] < 0).any()), "more": sorted(more)}
        return ToyLoss()(student, teacher, targets if len(student) == len(targets) else targets.repeat(4), **{
            "return_parts": more["return_parts"]
        })  # fmt: skip


@pytest.mark.parametrize(("passes", "rows"), [(None, 5), ("two", 5), ("one", 20)])
def test_a_task_gives_a_loss_what_it_declares(passes: str | None, rows: int) -> None:
    from frskd_fast.models import wrn16x2

    task = FRSKDTask(wrn16x2(num_classes=CLASSES), loss=Declaring(passes))
    parts = task(*batch())
    assert len(parts["output"]) == 5 and list(parts)[:2] == ["loss", "output"]
    rotated = ["rotated_student_feats", "rotated_teacher_feats"] if passes == "two" else []
    assert task.loss.seen == {"rows": rows, "negative": True, "more": ["return_parts", *rotated]}
