"""The guard: it names a term or a module that does nothing, and lets every method of the package train."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from small_tasks import SMALL_TASKS
from torch import Tensor, nn
from toy_method import ToyNet, ToyTask

from frskd_fast import tasks
from frskd_fast.losses import HSAKDTeacherLoss
from frskd_fast.mixing import rotate4
from frskd_fast.tasks import ClassificationTask, DistillationTask, FRSKDTask, HSAKDTeacherTask, Task, build_frskd
from frskd_fast.tasks.guard import Guard, ZeroTermError


class Broken(ToyTask):
    """A `ToyTask` with one fault: its `hint` is 0, or its `head` is not in the loss, or only from the third step on."""

    def __init__(self, backbone: nn.Module, fault: str = "none") -> None:
        super().__init__(backbone)
        self.fault, self.calls = fault, 0

    def forward(self, images: Tensor, targets: Any = None) -> dict[str, Tensor]:
        outputs = super().forward(images, targets)
        if targets is None or not self.training:
            return outputs
        self.calls += 1
        late = self.fault.startswith("late") and self.calls >= 3
        if self.fault.endswith("hint") and not late:
            outputs["hint"] = outputs["hint"] * 0
        if self.fault.endswith("head") and not late:
            outputs["loss"] = nn.functional.cross_entropy(outputs["output"], targets)
        return outputs


class Ramped(Broken):
    may_be_zero = ("hint",)


class Detached(ToyNet):
    """Its second map is recorded without gradients, as by a hook that lost them."""

    def forward(self, images: Tensor) -> tuple[list[Tensor], Tensor]:
        features, logits = super().forward(images)
        return [features[0], features[1].detach()], logits


class Unheard(HSAKDTeacherTask):
    """The last of its auxiliary heads is not part of the loss."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__(backbone)
        self.loss.forward = self.first_head

    def first_head(self, logits: Tensor, auxiliary: list[Tensor], targets: Tensor, return_parts: bool) -> Any:
        return HSAKDTeacherLoss()(logits, auxiliary[:1], targets, return_parts=return_parts)


class Aside(Task):
    """A network and a list of heads, of which the second is not part of the loss."""

    def __init__(self, backbone: nn.Module, heads: int = 2) -> None:
        super().__init__()
        self.backbone, self.channels_last = backbone, False
        self.heads = nn.ModuleList(nn.Linear(10, 10) for _ in range(heads))

    def forward(self, images: Tensor, targets: Any = None) -> dict[str, Tensor]:
        logits = self.backbone(images)[1]
        loss = nn.functional.cross_entropy(self.heads[0](logits), targets)
        return {"loss": loss, "accuracy": loss.detach() * 0, "output": logits}


def trained(task: Task, guard: Guard | None = None, steps: int = 4, lr: float = 0.1) -> None:
    """A hand-written loop, whose first three steps the guard looks at."""
    guard = Guard(task) if guard is None else guard
    images = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    images = rotate4(images) if task.views == "rotations" else images
    optimizer = torch.optim.SGD(task.parameter_groups(), lr=lr)
    task.train()
    for _ in range(steps):
        optimizer.zero_grad()
        parts = task(images, torch.arange(8))
        parts["loss"].backward()
        guard.after_backward(parts)
        optimizer.step()
    assert guard.done == (steps >= 3)


@pytest.mark.parametrize("name", SMALL_TASKS)
def test_the_tasks_of_the_package_train_under_the_guard(name: str) -> None:
    trained(SMALL_TASKS[name](ToyNet()))


def test_no_task_of_the_package_is_left_out() -> None:
    public = {getattr(tasks, name) for name in tasks.__all__}
    wanted = {one for one in public - {Task} if isinstance(one, type) and issubclass(one, Task)}
    # Those of other targets than classes have tests of their own.
    wanted = {one for one in wanted if getattr(one, "predicts", "classes") == "classes"}
    assert wanted <= {type(build(ToyNet())) for build in SMALL_TASKS.values()}


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Broken(ToyNet(), "hint"), r"The term hint of Broken was exactly zero in each of the first 3 steps"),
        (lambda: Broken(ToyNet(), "head"), r"No gradient reached head of Broken in each of the first 3 steps"),
        (lambda: Aside(ToyNet()), r"No gradient reached heads.1 of Aside in each of the first 3 steps"),
        (
            lambda: Unheard(ToyNet()),
            r"No gradient reached net.auxiliary_classifier.block_extractor2, net.auxiliary_classifier.fc2 of",
        ),
        (lambda: FRSKDTask(Detached()), r"student_feats\[1\], given to FRSKDLoss, requires no gradient"),
    ],
)
def test_what_does_nothing_is_named(make: Any, sentence: str) -> None:
    with pytest.raises(ZeroTermError, match=sentence):
        trained(make())


def test_a_teacher_that_is_the_student_is_named() -> None:
    """It would teach something after a step, were there one."""
    task = DistillationTask(ToyNet(), ToyNet())
    task.backbone = copy.deepcopy(task.teacher.network).requires_grad_(True)
    task.backbone.train = lambda mode=True: task.backbone  # its BatchNorms stay in evaluation mode
    task.backbone.eval()
    with pytest.raises(ZeroTermError, match="The term kd of DistillationTask was exactly zero"):
        trained(task, lr=0.0)


def test_what_does_something_in_one_of_the_steps_or_says_that_it_may_not_passes() -> None:
    for fault in ("late hint", "late head"):
        trained(Broken(ToyNet(), fault))
    trained(Ramped(ToyNet(), "hint"))
    trained(Aside(ToyNet(), heads=1))
    frozen = FRSKDTask(Detached())
    frozen.backbone.first.requires_grad_(False)
    trained(frozen)


def test_hooks_are_gone_after_the_first_step() -> None:
    task = build_frskd(ToyNet())
    guard = Guard(task)
    assert task.loss._forward_pre_hooks
    trained(task, guard, steps=1)
    assert not task.loss._forward_pre_hooks


@pytest.mark.parametrize("steps", [0, 1])
def test_a_run_leaves_no_hooks_in_the_task(steps: int) -> None:
    """One that ends before its first batch, and one whose step returns no terms, as with manual optimisation."""
    pytest.importorskip("lightning")
    from frskd_fast.training.guard import RunGuard
    from frskd_fast.training.module import DistillationModule

    module: Any = DistillationModule(10, {"class_path": "frskd_fast.tasks.build_frskd"}, "ToyNet")
    guard, trainer = RunGuard(), cast(Any, None)
    guard.on_train_start(trainer, module)
    assert module.task.loss._forward_pre_hooks
    if steps:
        guard.on_train_batch_end(trainer, module, None, None, 0)
    else:
        guard.on_train_end(trainer, module)
    assert not module.task.loss._forward_pre_hooks


@pytest.mark.parametrize("in_place", [True, False])
def test_a_compiled_loss_gets_no_hook(in_place: bool) -> None:
    task: Any = build_frskd(ToyNet())
    if in_place:
        task.loss.compile()
    else:
        task.loss = torch.compile(task.loss)
    Guard(task)
    assert not any(module._forward_pre_hooks for module in task.modules())


def test_nothing_is_read_from_the_device_before_the_last_of_the_steps() -> None:
    """On the meta device nothing can be."""
    with torch.device("meta"):
        task = Aside(ToyNet())
        guard = Guard(task)
        for _ in range(2):
            parts = task(torch.zeros(4, 3, 16, 16), torch.zeros(4, dtype=torch.int64))
            parts["loss"].backward()
            guard.after_backward(parts)
        with pytest.raises(NotImplementedError, match="meta tensor"):
            guard.after_backward(parts)


def test_a_compiled_task_is_guarded_without_compiling_anew() -> None:
    compiled = ClassificationTask(ToyNet())
    compiled.compile(backend="aot_eager")
    trained(compiled, steps=1)
    with torch.compiler.set_stance("fail_on_recompile"):
        trained(compiled)


def test_a_run_stops_with_a_sentence_or_goes_on_without_the_guard(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for needed in ("lightning", "jsonargparse", "sklearn"):
        pytest.importorskip(needed)
    from training_utils import small_run, steps

    from frskd_fast.training.cli import main

    settings = {"task": "test_guard.Broken", "model__backbone": "ToyNet", "data__mixup": 0, "trainer__max_epochs": 1}
    for fault, sentence in (
        ("hint", "frskd-fast fit: The term hint of Broken"),
        ("head", "No gradient reached head of"),
    ):
        folder = tmp_path / fault
        assert main(small_run(folder, task__fault=fault, **settings)) == 1
        assert sentence in capsys.readouterr().err
        assert len(steps(folder)) <= 3
        assert main([*small_run(folder, task__fault=fault, **settings), "--guard", "false", "--fresh"]) == 0
        assert len(steps(folder)) == 4
    assert main(small_run(tmp_path / "sound", **settings)) == 0
    # Gradients are complete after the second batch: two steps in the epoch, then two more.
    accumulated = {**settings, "trainer__accumulate_grad_batches": 2, "trainer__max_epochs": 2, "task__fault": "head"}
    assert main(small_run(tmp_path / "accumulated", **accumulated)) == 1
    assert len(steps(tmp_path / "accumulated")) in (5, 6)
