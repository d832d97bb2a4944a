"""FFL as a task: the original's training steps, who learns, independent networks, one graph, autocast, state, refusals."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_utils import golden_settings, load_golden
from task_checks import check_sharded
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from trajectory_utils import assert_final, filled, follow

from frskd_fast._dispatch import use_impl
from frskd_fast.models import FFLResNet, resnet8, resnet14, wrn_16_2
from frskd_fast.tasks import FFLTask, FusedNetwork, IndependentNetworks

NAMES = ("subnetwork_1", "subnetwork_2", "fused")


def small(**settings: Any) -> FFLTask:
    return FFLTask(FFLResNet(8, 10), **settings)


def batch(count: int = 4) -> tuple[Tensor, Tensor]:
    return torch.randn(count, 3, 16, 16), torch.arange(count)


@pytest.mark.parametrize("impl", ["reference", "auto"])  # on a CPU with the extension, "auto" is "cpu"
def test_trajectory(impl: str) -> None:
    """Ten SGD steps in float64 against the original, fusion module and networks each with their weight decay."""
    settings = golden_settings("trajectory_ffl")
    task = FFLTask(FFLResNet(settings["depth"], settings["num_classes"]))
    filled(task.net.backbone)
    filled(task.net.fusion)
    task.double()
    task.start_epoch(settings["epoch"], 300)
    assert task.fusion_weight_decay == settings["weight_decay_fusion"]
    assert task.consistency_weight.item() == load_golden("trajectory_ffl")["rampup"].item()
    columns = ["loss", *(f"{name}_{term}" for term in ("ce", "kd") for name in NAMES)]
    with use_impl(impl):
        stored = follow("trajectory_ffl", task, lambda parts: [parts[column] for column in columns])
    assert stored is not None
    task.eval()
    with torch.no_grad():
        for name, student in task.students().items():
            logits = student(stored["images"].double())
            assert_final(logits, stored["final_eval_" + {"fused": "fused_logits"}.get(name, f"logits{name[-1]}")])


def test_everything_learns_and_any_classifier_can_be_taken_away() -> None:
    task = small(which="subnetwork_2")
    images, targets = batch()
    parts = task(images, targets)
    outputs = ["output", "subnetwork_1_output", "fused_output"]
    assert list(parts) == ["loss", *outputs, *(f"{name}_{term}" for name in NAMES for term in ("ce", "kd"))]
    total = sum(parts[f"{name}_ce"] + parts[f"{name}_kd"] for name in NAMES)
    torch.testing.assert_close(parts["loss"].detach(), total)
    parts["loss"].backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in task.parameters())
    # The fused classifier's terms reach the networks, whose maps are not detached.
    task.zero_grad()
    logits, fused = task.net(images, all_logits=True)
    (reached,) = torch.autograd.grad(fused.sum(), task.net.backbone.conv1.weight)
    assert len(logits) == 2 and reached.abs().sum() > 0

    task.eval()
    assert list(task(images)) == ["output"]
    students = {name: student(images) for name, student in task.students().items()}
    assert tuple(students) == task.names == NAMES
    assert torch.equal(task(images)["output"], students["subnetwork_2"])
    assert torch.equal(task.student()(images), students["subnetwork_2"])
    measured = task.evaluate(images, targets)
    assert list(measured) == ["output", "subnetwork_1_accuracy", "fused_accuracy", "ensemble_accuracy"]
    for name in ("subnetwork_1", "fused"):
        assert measured[f"{name}_accuracy"] == (students[name].argmax(1) == targets).float().mean()
    mean = (students["subnetwork_1"] + students["subnetwork_2"]) / 2
    assert measured["ensemble_accuracy"] == (mean.argmax(1) == targets).float().mean()
    task.evaluate_all = False
    assert list(task.evaluate(images, targets)) == ["output"]
    assert {name: len(maps) for name, maps in task.maps(images).items()} == {"subnetwork_1": 3, "subnetwork_2": 3}


def test_ramp_and_weight_decay() -> None:
    task = small()
    assert task.consistency_weight == 1.0
    for epoch, weight in ((0, math.exp(-5)), (20, math.exp(-5 * 0.75**2)), (80, 1.0), (299, 1.0)):
        task.start_epoch(epoch, 300)
        assert task.consistency_weight.item() == pytest.approx(weight, rel=1e-6)
    assert small(ramp_epochs=0).consistency_weight == 1.0
    quick = small(ramp_epochs=2)
    quick.start_epoch(1, None)
    assert quick.consistency_weight.item() == pytest.approx(math.exp(-1.25))
    groups = task.parameter_groups()
    assert [group.get("weight_decay") for group in groups] == [None, 1e-5]
    assert {id(p) for group in groups for p in group["params"]} == {id(p) for p in task.parameters()}
    assert "weight_decay" not in small(fusion_weight_decay=None).parameter_groups()[1]


def test_independent_networks() -> None:
    """Three of unlike depth, width and size of maps; each keeps its own form."""
    torch.manual_seed(0)
    task = FFLTask(resnet8(10), ["resnet14", wrn_16_2(10)], which="subnetwork_3")
    assert task.net.fusion.channels == [64, 64, 128] and task.net.fusion.conv1_1.weight.shape == (128, 256, 1, 1)
    parts = task(*batch())
    parts["loss"].backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in task.parameters())
    assert isinstance(task.student("subnetwork_2").backbone, type(resnet14(10)))
    assert task.student().backbone is task.net.backbone.networks[2] is task.backbone
    twins = FFLTask(resnet8(10)).net.backbone.networks
    assert not torch.equal(twins[0].conv1.weight, twins[1].conv1.weight)
    single = FFLTask(resnet8(10), resnet14(10))
    assert single.names == NAMES
    assert isinstance(single.net.backbone, IndependentNetworks) and isinstance(single.backbone, FusedNetwork)


@pytest.mark.parametrize("shared", [True, False])
def test_one_graph_for_every_batch_and_epoch(shared: bool) -> None:
    torch.compiler.reset()
    backbone = FFLResNet(8, 10) if shared else resnet8(10)
    task = FFLTask(backbone, channels_last=False)
    backend = CompileCounterWithBackend("aot_eager")
    plain = copy.deepcopy(task)
    task.compile(backend=backend)
    for epoch, count in enumerate((4, 6, 5)):
        images, targets = torch.randn(count, 3, 16, 16), torch.arange(count)
        for one in (task, plain):
            one.start_epoch(40 * epoch, 300)
        parts, wanted = task(images, targets), plain(images, targets)
        torch.testing.assert_close(parts, wanted, rtol=1e-4, atol=1e-5)
        parts["loss"].backward()
    assert backend.frame_count == 1


def test_sharded_tasks_train_and_every_classifier_runs_alone(tmp_path: Path) -> None:
    images, targets = batch()
    settings: list[dict[str, Any]] = [{"which": name, "channels_last": False} for name in NAMES]
    tasks = [*(small(**one) for one in settings), FFLTask(resnet8(10), "resnet14", **settings[1])]
    check_sharded(tasks, images, targets, images, tmp_path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype) -> None:
    task, (images, targets) = small(), batch()
    with torch.autocast("cpu", dtype=dtype):
        parts = task(images, (targets, targets.flip(0), 0.25))
    assert parts["loss"].dtype == torch.float32 and parts["loss"].isfinite()
    parts["loss"].backward()
    assert all(parameter.grad.isfinite().all() for parameter in task.parameters())


def test_state_goes_into_a_file_and_the_originals_files_go_in() -> None:
    task, other, (images, targets) = small(), small(), batch()
    task.start_epoch(7, 300)
    task(images, targets)["loss"].backward()
    other.load_state_dict(task.state_dict())
    assert torch.equal(other.eval()(images)["output"], task.eval()(images)["output"])
    assert other.consistency_weight == task.consistency_weight
    network = FFLResNet(8, 10)
    other.net.backbone.load_state_dict(network.state_dict())
    torch.testing.assert_close(other.student("subnetwork_1").eval()(images), network.eval()(images)[0][0])


def test_students_export() -> None:
    task = small().eval()
    images = torch.randn(2, 3, 16, 16)
    for name in ("fused", "subnetwork_2"):
        student = task.student(name)
        program = torch.export.export(
            student, (images,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},), strict=False
        )
        more = torch.randn(5, 3, 16, 16)
        torch.testing.assert_close(program.module()(more), student(more))


class NoMaps(nn.Module):
    """A network whose last features are vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.channels, self.num_classes = [4], 10
        self.fc = nn.Linear(3, 10)

    def forward(self, images: Tensor) -> tuple[list[Tensor], Tensor]:
        features = images.mean((2, 3))
        return [features], self.fc(features)


@pytest.mark.parametrize(
    ("call", "error", "sentence"),
    [
        (lambda: FFLTask("resnet8"), TypeError, "backbone is a str, but a torch.nn.Module"),  # type: ignore[arg-type]
        (lambda: FFLTask(resnet8(10), []), ValueError, "peers is empty, but at least one other network"),
        (lambda: FFLTask(resnet8(10), resnet8(7)), ValueError, r"peers\[0\] \(CIFARResNet\) scores 7 classes"),
        (lambda: FFLTask(resnet8(10), [3]), TypeError, r"peers\[0\] is a int"),  # type: ignore[list-item]
        (lambda: FFLTask(resnet8(10), ["resnet9"]), ValueError, r"peers\[0\] is 'resnet9', but one of"),
        (lambda: FFLTask(FFLResNet(8, 10), resnet8(10)), ValueError, "peers were given, but backbone .FFLResNet. has"),
        (lambda: small(which="fuse"), ValueError, "which is 'fuse', but one of 'subnetwork_1', 'subnetwork_2', 'fused'"),
        (lambda: small().student("net1"), ValueError, "which is 'net1', but one of"),
        (lambda: small(ramp_epochs=-1), ValueError, "ramp_epochs is -1, but at least 0"),
        (lambda: small(ramp_epochs=0.5), ValueError, "ramp_epochs is 0.5"),
        (lambda: small(fusion_weight_decay="a"), TypeError, "fusion_weight_decay is 'a'"),
        (lambda: small(fusion_weight_decay=-1), ValueError, "fusion_weight_decay is -1, but None or at least 0"),
        (lambda: small(temperature=0.0), ValueError, "temperature is 0.0"),
        (lambda: small()(*batch()[:1], torch.tensor([0, 1, 2, 10])), ValueError, "holds the label 10"),
        (
            lambda: small()(torch.randn(1, 3, 2, 2), torch.zeros(1).long()),
            ValueError,
            r"images has shape \(1, 3, 2, 2\), of which a BatchNorm of backbone .* one value per channel",
        ),
        (
            lambda: FFLTask(resnet8(10))(torch.randn(1, 3, 4, 4), torch.zeros(1).long()),
            ValueError,
            r"images has shape \(1, 3, 4, 4\), of which a BatchNorm of backbone \(CIFARResNet\) gets one value per channel",
        ),
        (lambda: FFLTask(NoMaps(), NoMaps())(*batch()), ValueError, r"maps\[0\] has shape \(4, 3\), but a map"),
    ],
)  # fmt: skip
def test_refusals(call: Any, error: type[Exception], sentence: str) -> None:
    with pytest.raises(error, match=sentence):
        call()


def test_the_same_network_twice_is_refused() -> None:
    network = resnet8(10)
    with pytest.raises(ValueError, match=r"peers\[0\] is a network that was given before"):
        FFLTask(network, network)
