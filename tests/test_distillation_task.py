"""`KDLoss` and `DistillationTask`: the objective, the frozen teacher, every way to call the task, what is refused."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from task_checks import check_autocast, check_kept_outputs
from test_tasks import (
    CLASSES,
    Net,
    PreactNet,
    Several,
    batch,
    compare_compiled,
    every_kind_of_targets,
    replay_matches_a_plain_step,
    train_in_a_group_of_one,
)
from torch import Tensor, nn

from frskd_fast.losses import FitNetLoss, FRSKDLoss, KDLoss, OverhaulLoss, SLALoss
from frskd_fast.models import create_model, wrn16x2
from frskd_fast.tasks import DistillationTask, FrozenTeacher

DISTILL = ("kd", "att", "fit", "od")


class Teacher(PreactNet):
    """A wider teacher that says which BatchNorms make its maps."""

    def __init__(self, classes: int = CLASSES) -> None:
        super().__init__()
        self.channels, self.num_classes = [5, 7], classes
        self.conv1, self.bn1 = nn.Conv2d(3, 5, 3, padding=1), nn.BatchNorm2d(5)
        self.conv2, self.bn2 = nn.Conv2d(5, 7, 3, 2, 1), nn.BatchNorm2d(7)
        self.fc = nn.Linear(7, classes)

    def get_bn_before_relu(self) -> list[nn.BatchNorm2d]:
        return [self.bn1, self.bn2]


class LogitsAlone(nn.Sequential):
    """A network without feature maps."""

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, CLASSES, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def distilling(distill: str | None = None, **settings: Any) -> DistillationTask:
    return DistillationTask(PreactNet(), Teacher(), distill, **settings)


def plain_kd(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    log_student, log_teacher = (F.log_softmax(logits / temperature, 1) for logits in (student, teacher.detach()))
    return temperature**2 * F.kl_div(log_student, log_teacher, log_target=True, reduction="batchmean")


def plain_ce(logits: Tensor, targets: Any) -> Tensor:
    if isinstance(targets, tuple):
        first, second, lam = targets
        return lam * F.cross_entropy(logits, first) + (1 - lam) * F.cross_entropy(logits, second)
    return F.cross_entropy(logits, targets)


@pytest.mark.parametrize("impl", ["reference", "auto"])
def test_kd_is_its_formula(impl: str) -> None:
    student, teacher = (torch.randn(6, CLASSES, dtype=torch.float64, requires_grad=True) for _ in range(2))
    loss = KDLoss(0.3, 0.7, 2.0, impl)
    for targets in every_kind_of_targets(torch.randint(CLASSES, (6,))):
        targets = targets.double() if isinstance(targets, Tensor) and targets.is_floating_point() else targets
        parts = loss(student, teacher, targets, return_parts=True)
        ce, kd = plain_ce(student, targets), plain_kd(student, teacher, 2.0)
        torch.testing.assert_close(tuple(parts), (0.3 * ce + 0.7 * kd, ce.detach(), kd.detach()))
        upstream = torch.randn((), dtype=torch.float64)
        gradients = (torch.autograd.grad(total, student, upstream) for total in (parts.loss, 0.3 * ce + 0.7 * kd))
        torch.testing.assert_close(*gradients)
        assert torch.autograd.grad(loss(student, teacher, targets), teacher, allow_unused=True) == (None,)
    torch.testing.assert_close(loss(student, teacher), 0.7 * plain_kd(student, teacher, 2.0))
    assert repr(loss) == f"KDLoss(gamma=0.3, alpha=0.7, temperature=2.0, impl={impl!r})"
    with pytest.raises(TypeError, match="teacher_logits is None"):
        loss(student, None)


@pytest.mark.parametrize("impl", ["reference", "auto"])
def test_terms_of_weight_zero_are_not_computed(impl: str) -> None:
    student, labels = torch.randn(6, CLASSES, requires_grad=True), torch.randint(CLASSES, (6,))
    broken = torch.full((6, CLASSES), torch.nan)
    parts = KDLoss(0.5, 0.0, impl=impl)(student, broken, labels, return_parts=True)
    torch.testing.assert_close(parts.loss, 0.5 * plain_ce(student, labels))
    assert parts.kd == 0
    parts = KDLoss(0.0, 1.0, impl=impl)(student, broken.nan_to_num(), labels, return_parts=True)
    torch.testing.assert_close(parts.loss, plain_kd(student, broken.nan_to_num(), 4.0))
    assert parts.ce_student == 0
    for loss, targets in ((KDLoss(0.0, 0.0, impl=impl), labels), (KDLoss(0.5, 0.0, impl=impl), None)):
        total = loss(student, broken, targets)
        assert total == 0 and not torch.autograd.grad(total, student)[0].any()
    for loss in (KDLoss(0.0, 1.0, impl=impl), KDLoss(0.0, 0.0, impl=impl)):
        with pytest.raises(ValueError, match="targets holds the label"):
            loss(student, broken, labels + CLASSES)
        with pytest.raises(ValueError, match="teacher_logits has shape"):
            loss(student, broken[:, 1:], labels)


@pytest.mark.parametrize("distill", DISTILL)
def test_the_objective_is_its_terms(distill: str) -> None:
    weights = {"gamma": 0.25, "alpha": 0.5, **({} if distill == "kd" else {"beta": 3.0})}
    task = distilling(distill, temperature=2.0, channels_last=False, **weights).double()
    student, teacher, loss = copy.deepcopy([task.backbone, task.teacher.network, task.loss])
    assert not teacher.training
    images, labels = batch()
    images = images.double()
    preact = {"preact": True} if distill == "od" else {}
    for targets in every_kind_of_targets(labels):
        targets = targets.double() if isinstance(targets, Tensor) and targets.is_floating_point() else targets
        got = task(images, targets)
        features, logits = student(images, **preact)
        teacher_features, teacher_logits = teacher(images, **preact)
        kd, ce = plain_kd(logits, teacher_logits, 2.0), plain_ce(logits, targets)
        wanted = {"ce_student": ce, "kd": kd}
        total = 0.25 * ce + 0.5 * kd
        if distill != "kd":
            wanted["feature"] = loss(logits, teacher_logits, features, teacher_features, return_parts=True).feature
            total = total + loss(logits, teacher_logits, features, teacher_features) - 0.5 * kd
        assert got.keys() == {"loss", "output", "teacher_output", *wanted}
        for name, value in wanted.items():
            torch.testing.assert_close(got[name], value.detach())
        torch.testing.assert_close(got["loss"], total)
        assert torch.equal(got["output"], logits) and torch.equal(got["teacher_output"], teacher_logits)
        assert {name for name, value in got.items() if value.requires_grad} == {"loss", "output"}
        task.zero_grad()
        loss.zero_grad()
        student.zero_grad()
        got["loss"].backward()
        total.backward()
        for ours, theirs in zip(
            [*task.backbone.parameters(), *task.loss.parameters()],
            [*student.parameters(), *loss.parameters()],
            strict=True,
        ):
            torch.testing.assert_close(ours.grad, theirs.grad)


def test_the_names_have_repdistillers_weights() -> None:
    settings = {name: (task.gamma, task.loss) for name in DISTILL for task in [distilling(name)]}
    kd = distilling()
    assert kd.gamma is None and (kd.loss.gamma, kd.loss.alpha, kd.loss.temperature) == (0.1, 0.9, 4.0)
    assert type(settings["kd"][1]) is KDLoss and kd.may_be_zero == []
    for name, kind, beta in (("att", FRSKDLoss, 1000.0), ("fit", FitNetLoss, 100.0), ("od", OverhaulLoss, 1e-3)):
        gamma, loss = settings[name]
        assert type(loss) is kind and (gamma, loss.alpha, loss.beta) == (1.0, 0.0, beta)
    assert distilling(alpha=0.0).may_be_zero == ["kd"] and distilling(gamma=0.0).may_be_zero == ["ce_student"]
    assert distilling("att").may_be_zero == [] and distilling("fit", beta=0.0).may_be_zero == ["feature"]
    fit, od = settings["fit"][1], settings["od"][1]
    assert fit.student_channels == od.student_channels == [4, 6] and fit.teacher_channels == [5, 7]
    assert repr(distilling("att")).startswith("DistillationTask(\n  gamma=1.0, channels_last=True")


@pytest.mark.parametrize("distill", DISTILL)
def test_the_teacher_neither_learns_nor_wakes(distill: str) -> None:
    task = distilling(distill)
    before = copy.deepcopy(task.teacher.network.state_dict())
    trained = {id(parameter) for group in task.parameter_groups() for parameter in group["params"]}
    assert trained == {id(parameter) for module in (task.backbone, task.loss) for parameter in module.parameters()}
    seen: list[bool] = []
    task.teacher.network.register_forward_hook(lambda *_: seen.append(torch.is_grad_enabled()))
    optimiser = torch.optim.SGD(task.parameter_groups(), lr=0.1)
    for _ in range(2):
        task.train()(*batch())["loss"].backward()
        optimiser.step()
    assert seen == [False, False] and not any(module.training for module in task.teacher.modules())
    for name, value in task.teacher.network.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(parameter.grad is not None for group in task.parameter_groups() for parameter in group["params"])
    images, labels = batch()
    task.teacher.network.forward = None  # type: ignore[assignment]
    assert list(task(images)) == ["output"] and list(task.eval()(images, labels)) == ["output"]
    assert torch.equal(task.student()(images), task(images)["output"])


@pytest.mark.parametrize("distill", DISTILL)
def test_kept_outputs_of_the_teacher_take_its_place(distill: str) -> None:
    task = distilling(distill)
    names = {"kd": [], "od": ["preact_features_1", "preact_features_2"]}.get(distill, ["features_1", "features_2"])
    check_kept_outputs(task, task.teacher, *batch(), ["logits", *names])


@pytest.mark.parametrize("compiled", [False, True])
def test_a_teacher_that_was_woken_runs_in_evaluation_mode(compiled: bool) -> None:
    """By a loop over all modules, as some trainers have one."""
    task = distilling("kd")
    if compiled:
        task.compile(backend="eager")
    images, labels = batch(3)
    wanted = task(images, labels)["teacher_output"]
    statistics = task.teacher.network.bn1.running_mean.clone()
    for module in task.modules():
        module.train()
    assert task.teacher.network.training and task.teacher.network.bn1.training
    assert torch.equal(task(images, labels)["teacher_output"], wanted)
    assert torch.equal(task.teacher.network.bn1.running_mean, statistics)
    assert not any(module.training for module in task.teacher.modules())


def test_states_copies_and_files_agree(tmp_path: Path) -> None:
    images, labels = batch()
    task = distilling("fit")
    state = task.state_dict()
    assert {key.split(".")[0] for key in state} == {"backbone", "loss", "teacher"}
    assert [key for key in state if key.startswith("teacher.")] == ["teacher.source"]
    same = DistillationTask(PreactNet(), copy.deepcopy(task.teacher.network), "fit")
    same.load_state_dict(state)
    wanted = copy.deepcopy(task)(images, labels)["loss"]
    for other in (same, copy.deepcopy(task), pickle.loads(pickle.dumps(task))):
        assert torch.equal(other.train()(images, labels)["loss"], wanted) and not other.teacher.network.training
    with pytest.raises(RuntimeError, match="build the task with the teacher that it was trained with"):
        distilling("fit").load_state_dict(state)
    double = copy.deepcopy(task).double()
    torch.testing.assert_close(double(images.double(), labels)["loss"].float(), wanted)


def test_a_teacher_comes_from_a_file(tmp_path: Path) -> None:
    path, teacher = tmp_path / "resnet8_vanilla.pth", create_model("resnet8", CLASSES).eval()
    torch.save({"epoch": 240, "model": teacher.state_dict()}, path)  # as RepDistiller's trainer does
    images, labels = batch()
    task = DistillationTask(Net().double(), str(path), teacher_name="resnet8")
    assert task.teacher.path == str(path)
    output = task(images.double(), labels)["teacher_output"]
    torch.testing.assert_close(output, teacher.double()(images.double())[1].detach())
    # The checksum is that of the file's weights, in whatever dtype they are used.
    DistillationTask(Net(), str(path), teacher_name="resnet8").load_state_dict(task.state_dict())
    with pytest.raises(ValueError, match=r"teacher is a module .*so teacher_name"):
        DistillationTask(Net(), teacher, teacher_name="resnet8")


def test_networks_of_every_kind() -> None:
    images, labels = batch()
    teacher = FrozenTeacher(LogitsAlone(), "somewhere.pt")
    task = DistillationTask(LogitsAlone(), teacher)
    assert task.teacher is teacher and list(task(images, labels)) == [
        "loss",
        "output",
        "ce_student",
        "kd",
        "teacher_output",
    ]
    task = DistillationTask(Net(described=False), Net(described=False), "att")
    assert task.backbone.channels == task.teacher.network.channels == [4, 6]
    assert {name: len(maps) for name, maps in task.maps(images).items()} == {"student": 2, "teacher": 2}
    assert torch.isfinite(task(images, labels)["loss"])
    headed = create_model("resnet8_aux", CLASSES)
    assert DistillationTask(create_model("resnet8", CLASSES), headed, "att").teacher.network is headed.backbone
    with pytest.raises(TypeError, match=r"teacher \(Several\) returned a dict, but logits"):
        DistillationTask(LogitsAlone(), Several())(images, labels)
    # The teacher's maps are half as large.
    networks = wrn16x2(num_classes=CLASSES), nn.Module()
    networks[1].channels, networks[1].network = [32, 64, 128], wrn16x2(num_classes=CLASSES)  # type: ignore[assignment]
    networks[1].forward = lambda images: networks[1].network(F.avg_pool2d(images, 2))  # type: ignore[operator]
    for distill in ("att", "fit"):
        task = DistillationTask(*networks, distill, resize="pool")
        task(torch.randn(2, 3, 16, 16), torch.tensor([0, 1]))["loss"].backward()
    with pytest.raises(ValueError, match=r"teacher_feats\[0\] has maps of \(8, 8\) pixels.*resize='pool'"):
        DistillationTask(*networks, "att")(torch.randn(2, 3, 16, 16), torch.tensor([0, 1]))


def test_a_loss_of_the_users_own() -> None:
    images, labels = batch()
    for loss in (FRSKDLoss(2.0, 100.0), KDLoss(0.5, 0.5, label_smoothing=0.1)):
        task = DistillationTask(Net(), Teacher(), loss=loss)
        assert task.loss is loss and task.gamma == (1.0 if type(loss) is FRSKDLoss else None)
        parts = task(images, labels)
        smoothing = F.cross_entropy(parts["output"], labels, label_smoothing=loss.label_smoothing)
        torch.testing.assert_close(parts["ce_student"], smoothing.detach())
    assert DistillationTask(Net(), Teacher(), loss=FRSKDLoss(), gamma=0.25).gamma == 0.25


@pytest.mark.parametrize("distill", DISTILL)
def test_autocast_with_a_scaler(distill: str) -> None:
    task = distilling(distill, **({} if distill == "kd" else {"beta": 1.0}))
    check_autocast(task, *batch())


@pytest.mark.parametrize("distill", ["kd", "od"])
@pytest.mark.parametrize("mix", [None, 0.3])
def test_one_graph_serves_every_batch(distill: str, mix: float | None) -> None:
    mixes = [None, None] if mix is None else [mix, 0.6]
    assert compare_compiled("aot_eager", distilling(distill), list(zip((4, 7), mixes, strict=True))) == 1


@pytest.mark.parametrize("distill", ["fit", "od"])
def test_data_parallel_without_the_feature_term(distill: str, tmp_path: Path) -> None:
    """Its adapters stay unused."""
    train_in_a_group_of_one(distilling(distill, alpha=1.0, beta=0.0), [batch(2), batch(2)], tmp_path)


def test_data_parallel_trains_every_parameter_but_the_teachers(tmp_path: Path) -> None:
    task = distilling("fit")
    train_in_a_group_of_one(task, [batch(), batch()], tmp_path)
    assert all((parameter.grad is not None) == parameter.requires_grad for parameter in task.parameters())


@pytest.mark.parametrize("name", ["resnet8", "vgg8", "wrn_16_1"])
def test_networks_of_the_zoo_teach_by_the_overhaul_distance(name: str) -> None:
    teacher = create_model(name, CLASSES)
    for number, batch_norm in enumerate(teacher.get_bn_before_relu()):  # type: ignore[operator]
        nn.init.constant_(batch_norm.bias, number - 5.0)  # E[t | t < 0] is about the bias where that is far below 0
    task = DistillationTask(create_model(name, CLASSES), teacher, "od")
    for number, channels in enumerate(teacher.channels):  # type: ignore[arg-type, var-annotated]
        margin = task.loss.get_buffer(f"margin{number + 1}")
        assert margin.shape == (1, channels, 1, 1) and (margin < number - 4.9).all()
    assert task(torch.randn(2, 3, 16, 16), torch.tensor([0, 1]))["loss"].isfinite()


@pytest.mark.gpu
@pytest.mark.parametrize("distill", DISTILL)
def test_a_step_waits_for_no_device_and_is_captured_in_a_cuda_graph(distill: str) -> None:
    images, labels = (tensor.cuda() for tensor in batch())
    replay_matches_a_plain_step(distilling(distill).cuda(), images, labels)


@pytest.mark.parametrize(
    ("build", "error", "sentence"),
    [
        (lambda: DistillationTask("resnet8", Teacher()), TypeError, "backbone is a str"),
        (lambda: distilling("at"), ValueError, "distill is 'at', but 'kd', 'att', 'fit', 'od' or None"),
        (lambda: distilling("kd", beta=1.0), ValueError, "beta is 1.0, but distill='kd' has no term for it"),
        (lambda: distilling("att", loss=KDLoss()), ValueError, "distill is 'att', but loss came with settings"),
        (lambda: distilling(loss=FRSKDLoss(), alpha=1.0), ValueError, "alpha is 1.0, but loss came with settings"),
        (lambda: distilling(loss=KDLoss(), gamma=1.0), ValueError, "gamma is 1.0, but loss came with settings"),
        (lambda: distilling(loss=2.0), TypeError, "loss is a float"),
        (lambda: distilling("att", resize="crop"), ValueError, "resize is 'crop', but None or 'pool'"),
        (lambda: distilling("att", alpha="much"), TypeError, "alpha is 'much'"),
        (lambda: distilling("att", gamma="much"), TypeError, "gamma is 'much'"),
        (
            lambda: DistillationTask(Net(), Teacher(3)),
            ValueError,
            r"\(Teacher\) scores 3 classes, but backbone \(Net\)",
        ),
        (
            lambda: DistillationTask(net := Net(), net),
            ValueError,
            r"teacher \(Net\) and backbone \(Net\) have parameters in common",
        ),
        (lambda: DistillationTask(wrn16x2(CLASSES), Teacher(), "fit"), ValueError, "has 2 feature maps, but backbone"),
        (lambda: DistillationTask(Net(), Teacher(), "od"), TypeError, r"backbone \(Net\) takes no argument preact"),
        (lambda: DistillationTask(PreactNet(), PreactNet(), "od"), TypeError, r"without get_bn_before_relu\(\)"),
        (
            lambda: distilling(loss=SLALoss(FRSKDLoss(), 6, 7, CLASSES, passes="one")),
            ValueError,
            r"loss \(SLALoss\) wants the rotations of the images \(passes='one'\)",
        ),
    ],
)
def test_what_cannot_be_built_is_refused(build: Callable[[], Any], error: type[Exception], sentence: str) -> None:
    with pytest.raises(error, match=sentence):
        build()
