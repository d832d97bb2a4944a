"""FRSKD's segmentation task: who learns, the ramp, the baseline, other backbones, one graph, autocast, processes, refusals."""

from __future__ import annotations

import copy
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.parallel import DistributedDataParallel

from frskd_fast.losses import SegmentationLoss
from frskd_fast.models import SegmentationNetwork, resnet8
from frskd_fast.tasks import FRSKDSegmentationTask
from frskd_fast.tasks.guard import Guard

CLASSES = 4
TERMS = ["ce_student", "ce_teacher", "kd", "attention"]


class SmallNetwork(nn.Module):
    """Two levels: the student's head reads the finer one, the self-teacher both; `spare` is never called."""

    def __init__(self, normalisation: Any = nn.BatchNorm2d) -> None:
        super().__init__()
        self.num_classes = CLASSES
        self.fine = nn.Sequential(nn.Conv2d(3, 8, 3, 4, 1), normalisation(8), nn.ReLU())
        self.coarse = nn.Sequential(nn.Conv2d(8, 8, 3, 2, 1), normalisation(8), nn.ReLU())
        self.spare = nn.Conv2d(8, 8, 1)
        self.refine = nn.ModuleList(nn.Sequential(nn.Conv2d(8, 8, 1), normalisation(8), nn.ReLU()) for _ in range(2))
        self.head, self.teacher_head = nn.Conv2d(8, CLASSES, 1), nn.Conv2d(8, CLASSES, 1)

    def student_maps(self, images: Tensor) -> Tensor:
        maps: Tensor = self.head(self.fine(images))
        return maps

    def forward(self, images: Tensor) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor]:
        fine = self.fine(images)
        features = [fine, self.coarse(fine)]
        coarse = self.refine[1](features[1])
        refined = [self.refine[0](fine + F.interpolate(coarse, size=fine.shape[2:])), coarse]
        return features, refined, self.head(fine), self.teacher_head(refined[0])


def small(**settings: Any) -> FRSKDSegmentationTask:
    return FRSKDSegmentationTask(SmallNetwork(), **settings)


def batch(count: int = 4, height: int = 24, width: int = 32) -> tuple[Tensor, Tensor]:
    """Images, and their masks, of whose pixels some are ignored."""
    targets = torch.randint(CLASSES, (count, height, width)).masked_fill(torch.rand(count, height, width) < 0.2, 255)
    return torch.randn(count, 3, height, width), targets


def names_of(task: FRSKDSegmentationTask, parameters: Any) -> set[str]:
    wanted = {id(parameter) for parameter in parameters}
    return {name.removeprefix("backbone.") for name, parameter in task.named_parameters() if id(parameter) in wanted}


def test_the_loss_is_that_of_the_networks_outputs() -> None:
    task, (images, targets) = small(alpha=0.7, beta=20.0, temperature=2.0, label_smoothing=0.1), batch()
    task.start_epoch(49, 60)
    parts = task(images, targets)
    assert list(parts) == ["loss", "output", *TERMS, "teacher_output"]
    student_feats, teacher_feats, maps, teacher_maps = task.backbone(images)
    criterion = SegmentationLoss(0.7, 20.0, 2.0, label_smoothing=0.1)
    wanted = criterion(maps, teacher_maps, student_feats, teacher_feats, targets, ramp=task.ramp, return_parts=True)
    torch.testing.assert_close([parts[name] for name in ("loss", *TERMS)], list(wanted))
    torch.testing.assert_close([parts["output"], parts["teacher_output"]], [maps, teacher_maps])
    parts["loss"].backward()
    assert not any(parts[name].requires_grad for name in TERMS)
    without = {name for name, parameter in task.backbone.named_parameters() if parameter.grad is None}
    assert without == {"spare.weight", "spare.bias"} == names_of(task, task.unused_parameters())
    assert all(p.grad.abs().sum() > 0 for p in task.parameters() if p.grad is not None)
    assert names_of(task, task.parameter_groups()[0]["params"]) | without == {
        n for n, _ in task.backbone.named_parameters()
    }


def test_what_is_left_when_training_is_over() -> None:
    task, (images, targets) = small(), batch()
    assert task.predicts == "maps"
    task.eval()
    assert list(task(images, targets)) == list(task(images)) == ["output"]
    scores = task.evaluate(images, targets)["output"]
    assert torch.equal(scores, task.backbone(images)[2])
    student = task.student()
    wanted = F.interpolate(scores, size=images.shape[2:], mode="bilinear", align_corners=False)
    assert student(images).shape == (4, CLASSES, 24, 32) and torch.equal(student(images), wanted)
    maps, predicted = task.maps(images), task.predicted_maps(images)
    assert list(maps) == list(predicted) == ["student", "self-teacher"]
    assert [len(levels) for levels in maps.values()] == [2, 2]
    assert torch.equal(predicted["student"], scores) and torch.equal(
        predicted["self-teacher"], task.backbone(images)[3]
    )
    program = torch.export.export(
        student, (images,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},), strict=False
    )
    more = torch.randn(3, 3, 24, 32)
    torch.testing.assert_close(program.module()(more), student(more))


def test_warm_up_and_ramp() -> None:
    task = small()
    assert task.ramp == 1.0
    for epoch, weight in (
        (0, 0.0),
        (39, 0.0),
        (40, math.exp(-5 * 0.95**2)),
        (49, math.exp(-1.25)),
        (59, 1.0),
        (80, 1.0),
    ):
        task.start_epoch(epoch, 60)
        assert task.ramp.item() == pytest.approx(weight, rel=1e-6)
    constant = small(ramp_shape="constant", warmup_epochs=3)
    for epoch, weight in ((2, 0.0), (3, 1.0), (9, 1.0)):
        constant.start_epoch(epoch, None)
        assert constant.ramp == weight
    quick = small(warmup_epochs=0, ramp_epochs=2)
    quick.start_epoch(0, -1)
    assert quick.ramp.item() == pytest.approx(math.exp(-1.25))
    with pytest.raises(ValueError, match=r"ramp_epochs is None, .* how many epochs the run has is not known"):
        task.start_epoch(40, None)
    with pytest.warns(UserWarning, match="warmup_epochs is 40, but the run has 8 epochs, so that nothing is distilled"):
        task.start_epoch(0, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        small(alpha=0.0).start_epoch(0, 8)
        small(alpha=0.0).start_epoch(40, None)


def test_distillation_waits_for_the_end_of_the_warm_up() -> None:
    """Its terms are measured all the while, and the guard has nothing to say."""
    task, (images, targets) = small(), batch()
    task.start_epoch(0, 60)
    guard = Guard(task, steps=1)
    parts = task(images, targets)
    torch.testing.assert_close(parts["loss"].detach(), parts["ce_student"] + parts["ce_teacher"])
    assert parts["kd"] > 0 and parts["attention"] > 0
    parts["loss"].backward()
    guard.after_backward(parts)
    assert task.may_be_zero == [] and small(beta=0.0).may_be_zero == ["attention"]


def test_alpha_zero_is_the_plain_baseline(monkeypatch: pytest.MonkeyPatch) -> None:
    task, (images, targets) = small(alpha=0.0), batch()
    assert "teacher_head.weight" in names_of(task, task.unused_parameters())
    monkeypatch.setattr(SmallNetwork, "forward", None)  # the self-teacher's outputs come from nowhere else
    guard = Guard(task, steps=1)
    parts = task(images, targets)
    parts["loss"].backward()
    guard.after_backward(parts)
    assert list(parts) == ["loss", "output", "ce_student"]
    wide = F.interpolate(parts["output"], size=targets.shape[1:], mode="bilinear", align_corners=False)
    torch.testing.assert_close(parts["loss"], F.cross_entropy(wide, targets, ignore_index=255))
    trained = {name for name, parameter in task.backbone.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, parameter in task.backbone.named_parameters() if parameter.grad is not None}
    assert {name.split(".")[0] for name in trained} == {"fine", "head"}
    task.eval()
    assert list(task(images)) == ["output"] and task.student()(images).shape == (4, CLASSES, 24, 32)
    monkeypatch.undo()
    assert list(task.maps(images)) == list(task.predicted_maps(images)) == ["student"]


class Stages(nn.Module):
    """Two maps in a dict, and no word of classes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3, 4, 1), nn.Conv2d(4, 6, 3, 2, 1)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        first = self.first(images)
        return {"first": first, "second": self.second(first.relu())}


@pytest.mark.parametrize(("backbone", "classes"), [(resnet8, CLASSES), (Stages, None)])
def test_a_network_with_feature_maps_becomes_a_segmentation_network(backbone: Any, classes: int | None) -> None:
    network = backbone(classes) if classes else backbone()
    task = FRSKDSegmentationTask(network.double(), CLASSES if classes is None else None)
    assert isinstance(task.backbone, SegmentationNetwork) and task.backbone.backbone is network
    assert names_of(task, task.unused_parameters()) == (
        {"backbone.fc.weight", "backbone.fc.bias"} if classes else set()
    )
    images, targets = batch(2)
    task(images.double(), targets)["loss"].backward()
    assert all(p.grad is not None for p in task.parameters() if p.requires_grad)
    assert task.eval().student()(images.double()).shape == (2, CLASSES, 24, 32)


@pytest.mark.parametrize("alpha", [1.0, 0.0])
def test_one_graph_for_every_batch_and_epoch(alpha: float) -> None:
    torch.compiler.reset()
    task = small(alpha=alpha, channels_last=False)
    plain, backend = copy.deepcopy(task), CompileCounterWithBackend("aot_eager")
    task.compile(backend=backend)
    for epoch, count in ((0, 7), (45, 9), (59, 11)):
        images, targets = batch(count)
        for one in (task, plain):
            one.start_epoch(epoch, 60)
        parts, wanted = task(images, targets), plain(images, targets)
        torch.testing.assert_close(parts, wanted, rtol=1e-4, atol=1e-5)
        parts["loss"].backward()
        wanted["loss"].backward()
        for ours, theirs in zip(task.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5)
    assert backend.frame_count == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_and_scaled_gradients(dtype: torch.dtype) -> None:
    task, (images, targets) = small(), batch()
    optimiser = torch.optim.SGD(task.parameter_groups(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    before = [parameter.detach().clone() for parameter in task.parameter_groups()[0]["params"]]
    with torch.autocast("cpu", dtype=dtype):
        parts = task(images, targets)
    assert parts["loss"].dtype == torch.float32 and parts["output"].dtype == dtype
    scaler.scale(parts["loss"]).backward()
    scaler.unscale_(optimiser)
    torch.nn.utils.clip_grad_value_(task.parameters(), 2.0)
    scaler.step(optimiser)
    scaler.update()
    assert scaler.get_scale() == 1024.0
    for old, new in zip(before, task.parameter_groups()[0]["params"], strict=True):
        assert new.isfinite().all() and not torch.equal(old, new)


def test_state_goes_into_a_file() -> None:
    task, other, (images, targets) = small(class_weights=[1.0, 2.0, 3.0, 4.0]), small(), batch()
    task.start_epoch(45, 60)
    task(images, targets)["loss"].backward()
    assert set(task.state_dict()) == {"ramp", *(f"backbone.{name}" for name in task.backbone.state_dict())}
    other.load_state_dict(task.state_dict())
    assert other.ramp == task.ramp
    assert torch.equal(other.eval()(images)["output"], task.eval()(images)["output"])


def _train(rank: int, count: int, folder: str) -> None:
    """What one of `count` processes does: two steps with and without a self-teacher; gradients and losses are saved."""
    torch.set_num_threads(1)
    if count > 1:
        dist.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=count)
    saved = []
    for alpha in (1.0, 0.0):
        torch.manual_seed(0)
        task = FRSKDSegmentationTask(SmallNetwork(lambda channels: nn.GroupNorm(2, channels)), alpha=alpha).double()
        task.start_epoch(49, 60)
        images, targets = batch()
        targets = targets.masked_fill(
            targets == 255, 0
        )  # a mean over valid pixels is the mean of means for equal numbers
        targets[:, 0] = 255
        share = slice(rank * 4 // count, (rank + 1) * 4 // count)
        model = DistributedDataParallel(task) if count > 1 else task
        optimiser = torch.optim.SGD(task.parameter_groups(), lr=0.1)
        for _ in range(2):
            optimiser.zero_grad()
            loss = model(images[share].double(), targets[share])["loss"]
            loss.backward()
            optimiser.step()
            gradients = {name: p.grad for name, p in task.named_parameters() if p.grad is not None}
            saved.append({"loss": loss.detach(), **gradients})
    torch.save(saved, f"{folder}/{count}-{rank}.pt")
    # The reducer must not be the group's last owner: it would join gloo's threads while it holds the GIL that they may want.
    del model, loss
    if count > 1:
        dist.destroy_process_group()


def test_two_processes_are_one(tmp_path: Path) -> None:
    """Without find_unused_parameters: a parameter without a gradient would be an error in the second step."""
    _train(0, 1, str(tmp_path))
    torch.multiprocessing.spawn(_train, (2, str(tmp_path)), nprocs=2)
    one, *two = (torch.load(tmp_path / f"{name}.pt") for name in ("1-0", "2-0", "2-1"))
    for wanted, first, second in zip(one, *two, strict=True):
        torch.testing.assert_close((first.pop("loss") + second.pop("loss")) / 2, wanted.pop("loss"), rtol=1e-9, atol=0)
        for found in (first, second):
            torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)


class Incomplete(SmallNetwork):
    """Says it is a segmentation network, but has no self-teacher."""

    def forward(self, images: Tensor) -> Any:
        return self.student_maps(images)


@pytest.mark.parametrize(
    ("call", "error", "sentence"),
    [
        (lambda: FRSKDSegmentationTask(3), TypeError, "backbone is a int, but a torch.nn.Module"),  # type: ignore[arg-type]
        (lambda: FRSKDSegmentationTask("efficientdet_seg_d0"), ValueError, "num_classes is None, but the number of classes of"),
        (lambda: FRSKDSegmentationTask("efficientdet_seg_d9", 5), ValueError, "did you mean 'efficientdet_seg_d"),
        (lambda: small(num_classes=7), ValueError, r"num_classes is 7, but backbone \(SmallNetwork\) scores 4 classes"),
        (lambda: FRSKDSegmentationTask(nn.Conv2d(3, 8, 3)), ValueError, "num_classes is None, and backbone .Conv2d. does"),
        (lambda: FRSKDSegmentationTask(Incomplete()), TypeError, r"backbone \(Incomplete\) returned a Tensor, but \(student_f"),
        (lambda: small(ramp_shape="linear"), ValueError, "ramp_shape is 'linear', but 'anneal' or 'constant'"),
        (lambda: small(warmup_epochs=-1), ValueError, "warmup_epochs is -1, but at least 0"),
        (lambda: small(ramp_epochs=0), ValueError, "ramp_epochs is 0, but at least 1"),
        (lambda: small(temperature=0.0), ValueError, "temperature is 0.0"),
        (lambda: small()(batch()[0], batch()[1].float()), TypeError, "targets has dtype torch.float32"),
        (lambda: small()(batch()[0], batch()[1] + 4), ValueError, "the label"),
        (lambda: small()(batch()[0], batch(3)[1]), ValueError, "targets has 3 masks, but student_maps has 4 images"),
        (lambda: small()(batch()[0], batch(4, 3, 4)[1]), ValueError, "the labels are of 3 x 4 pixels"),
        (
            lambda: small()(torch.randn(1, 3, 4, 4), torch.zeros(1, 4, 4).long()),
            ValueError,
            r"images has shape \(1, 3, 4, 4\), of which a BatchNorm of backbone \(SmallNetwork\) gets one value per channel",
        ),
        (
            lambda: small(alpha=0.0)(torch.randn(1, 3, 4, 4), torch.zeros(1, 4, 4).long()),
            ValueError,
            r"images has shape \(1, 3, 4, 4\), of which a BatchNorm of backbone \(SmallNetwork\) gets one value per channel",
        ),
    ],
)  # fmt: skip
def test_refusals(call: Any, error: type[Exception], sentence: str) -> None:
    with pytest.raises(error, match=sentence):
        call()
