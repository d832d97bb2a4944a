"""Weights out of the checkpoints of this library and of others, and trained networks out of whatever holds them."""

from __future__ import annotations

import json
import sys
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import toy_method
from torch import Tensor, nn

from frskd_fast.models import (
    AuxiliaryNetwork,
    CheckpointError,
    ProjectionHead,
    adapt_backbone,
    create_model,
    load_backbone_weights,
    load_teacher,
)

State = dict[str, Tensor]


def under(prefix: str, state: State) -> State:
    return {f"{prefix}{name}": value for name, value in state.items()}


def trained(name: str = "resnet8", num_classes: int = 7, heads: str | None = None) -> nn.Module:
    """A network that no other seed gives."""
    torch.manual_seed(5)
    network = create_model(name, num_classes)
    return ProjectionHead(network) if heads == "projection" else network


def same(network: nn.Module, other: nn.Module) -> bool:
    """Whether both have the same state and are ready to teach."""
    state, wanted = network.state_dict(), other.state_dict()
    assert not network.training
    return list(state) == list(wanted) and all(torch.equal(state[name], wanted[name]) for name in state)


def written(folder: Path, content: Any) -> Path:
    path = folder / "teacher.pth"
    torch.save(content, path)
    return path


# What each program writes around the state of a network, the stray values of its files included.
PROGRAMS: dict[str, Callable[[State], dict[str, Any]]] = {
    "RepDistiller": lambda state: {
        "epoch": 240,
        "model": state,
        "accuracy": torch.tensor(75.6),
        "optimizer": {"state": {0: {"momentum_buffer": torch.ones(3)}}, "param_groups": [{"lr": 0.05}]},
    },
    "SSKD": lambda state: {"epoch": 240, "state_dict": state, "acc": torch.tensor(0.756)},
    "SSKD, a student": lambda state: {
        "state_dict": {**under("backbone.", state), **under("proj_head.0.", {"weight": torch.ones(2, 2)})},
        "best_acc": 0.7,
    },
    "HSAKD": lambda state: {"net": under("module.backbone.", state), "acc": 80.7, "epoch": 239, "optimizer": {}},
    "HSAKD, a pair": lambda state: {
        "net": {**under("net1.backbone.", state), **under("net2.backbone.", {n: v + 1 for n, v in state.items()})}
    },
    "HSAKD, beside a deeper one": lambda state: {
        "net": {**under("net1.backbone.", trained("resnet14").state_dict()), **under("net2.backbone.", state)}
    },
    "HSAKD, the second of a pair": lambda state: {"net": under("module.net2.backbone.", state)},
    "mdistiller": lambda state: {"model": state},
    "mdistiller, everything": lambda state: {
        "epoch": 240,
        "model": {
            **under("module.teacher.", {name: value + 1 for name, value in state.items()}),
            **under("module.student.", state),
        },
        "best_acc": torch.tensor(75.0),
    },
    "torchvision": lambda state: dict(state),
}


@pytest.mark.parametrize("program", PROGRAMS)
def test_files_of_other_programs(program: str, tmp_path: Path) -> None:
    network = trained()
    path = written(tmp_path, PROGRAMS[program](network.state_dict()))
    assert same(load_teacher(path, "resnet8"), network)
    assert same(load_teacher(str(path), "resnet8", 7), network)


def test_layers_that_other_programs_call_otherwise(tmp_path: Path) -> None:
    network = trained("mobilenetv2")
    state = {name.replace("classifier.", "classifier.0."): value for name, value in network.state_dict().items()}
    assert "classifier.0.bias" in state
    assert same(load_teacher(written(tmp_path, {"model": state}), "MobileNetV2"), network)
    headed = load_teacher(written(tmp_path, {"net": under("backbone.", state)}), "MobileNetV2", stem_stride=1)
    assert same(headed, network) and headed.conv1[0].stride == (1, 1)


def test_a_resnet_with_other_spellings(tmp_path: Path) -> None:
    network = trained("cifarresnet18")
    state = {
        name.replace("downsample", "shortcut").replace("fc.", "linear."): value
        for name, value in network.state_dict().items()
    }
    assert "layer2.0.shortcut.0.weight" in state and "linear.bias" in state
    assert same(load_teacher(written(tmp_path, under("module.", state)), "cifarresnet18"), network)


def test_hsakds_mobilenet_is_hsakds_with_its_heads(tmp_path: Path) -> None:
    """The stride of its first convolution is in no file."""
    network = trained("mobilenetv2_aux").eval()
    images = torch.randn(2, 3, 16, 16)
    path = written(tmp_path, {"net": under("module.", network.state_dict())})
    for name in ("mobilenetv2", "MobileNetV2", "mobilenetv2_aux"):
        with_heads = load_teacher(path, name, heads="auxiliary")
        # Untrained, its logits are small.
        torch.testing.assert_close(with_heads(images), network(images), rtol=1e-5, atol=0)
    assert load_teacher(path, "mobilenetv2", heads="auxiliary", stem_stride=2).backbone.conv1[0].stride == (2, 2)
    # A run of this library says itself which network it holds.
    path = written(tmp_path, checkpoint(network, backbone="mobilenetv2"))
    for given in (None, "mobilenetv2"):
        assert load_teacher(path, given, heads="auxiliary").backbone.conv1[0].stride == (2, 2)


@pytest.mark.parametrize("prefix", ["", "module.", "task.", "task.net."])
@pytest.mark.parametrize("heads", ["auxiliary", "projection"])
def test_heads_come_with_the_network(heads: Any, prefix: str, tmp_path: Path) -> None:
    network = trained("resnet8_aux" if heads == "auxiliary" else "resnet8", heads=heads)
    path = written(tmp_path, {"net": under(prefix, network.state_dict())})
    assert same(load_teacher(path, "resnet8", heads=heads), network)
    assert same(load_teacher(path, "resnet8"), network.get_submodule("backbone"))
    if heads == "auxiliary":
        assert same(load_teacher(path, "resnet8_aux"), network)
        with pytest.raises(CheckpointError, match=r"without its heads, of which proj_head\.0\.weight was .* SSKDHeadT"):
            load_teacher(path, "resnet8_aux", heads="projection")


@pytest.mark.parametrize("prefix", ["", "module.", "backbone."])
def test_heads_that_a_file_lacks(prefix: str, tmp_path: Path) -> None:
    path = written(tmp_path, {"model": under(prefix, trained().state_dict())})
    with pytest.raises(
        CheckpointError, match=r"holds the network without its heads, .* first \(task HSAKDTeacherTask\)"
    ):
        load_teacher(path, "resnet8", heads="auxiliary")
    with pytest.raises(CheckpointError, match=r"of which proj_head\.0\.weight was wanted"):
        load_teacher(path, "resnet8", heads="projection")


def checkpoint(network: nn.Module, **settings: Any) -> dict[str, Any]:
    """As `frskd-fast fit` writes it."""
    return {
        "state_dict": {**under("task.net.", network.state_dict()), "task.teacher.source": torch.zeros(3)},
        "hyper_parameters": {"backbone": "resnet8", "backbone_args": None, "num_classes": 7, **settings},
        "epoch": 3,
    }


def test_the_folder_of_a_run(tmp_path: Path) -> None:
    network = trained("resnet8_aux")
    torch.save(checkpoint(network), tmp_path / "last.ckpt")
    assert same(load_teacher(tmp_path), network.get_submodule("backbone"))
    with_heads = load_teacher(tmp_path, heads="auxiliary")
    assert isinstance(with_heads, AuxiliaryNetwork) and same(with_heads, network)
    torch.save(checkpoint(network, backbone="resnet8_aux"), tmp_path / "last.ckpt")
    assert same(load_teacher(tmp_path), network.get_submodule("backbone"))
    assert same(load_teacher(tmp_path / "last.ckpt", heads="auxiliary"), network)
    (tmp_path / "last.ckpt").rename(tmp_path / "previous.ckpt")
    assert same(load_teacher(tmp_path), network.get_submodule("backbone"))
    with pytest.raises(CheckpointError, match=r"holds no last\.ckpt, so it is no folder of a run, or of one that has"):
        load_teacher(tmp_path.parent)


def test_arguments_of_a_network_are_those_of_its_run_unless_they_are_given(tmp_path: Path) -> None:
    network = trained("mobilenetv2")
    settings = {"backbone": "mobilenetv2", "backbone_args": {"stem_stride": 1}}
    path = written(tmp_path, checkpoint(network, **settings))
    assert load_teacher(path).conv1[0].stride == (1, 1)
    assert load_teacher(path, stem_stride=2).conv1[0].stride == (2, 2)
    assert load_teacher(path, "mobilenetv2").conv1[0].stride == (1, 1)
    assert load_teacher(path, "MobileNetV2").conv1[0].stride == (2, 2)


def test_shards_in_the_folder_of_a_run(tmp_path: Path) -> None:
    import torch.distributed.checkpoint as distributed

    network = trained()
    content = checkpoint(network)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is one process
        distributed.save({"state_dict": content.pop("state_dict")}, checkpoint_id=tmp_path / "last.ckpt")
    torch.save(content, tmp_path / "last.ckpt" / "meta.pt")
    assert same(load_teacher(tmp_path), network) and same(load_teacher(tmp_path / "last.ckpt"), network)


def test_safetensors_that_say_what_they_hold(tmp_path: Path) -> None:
    save_file = pytest.importorskip("safetensors.torch").save_file
    network, path = trained("mobilenetv2"), tmp_path / "student.safetensors"
    about = {"backbone": "mobilenetv2", "num_classes": "7", "backbone_args": json.dumps({"stem_stride": 1})}
    save_file(network.state_dict(), path, about)
    teacher = load_teacher(path)
    assert same(teacher, network) and teacher.conv1[0].stride == (1, 1)
    save_file(network.state_dict(), path)
    assert same(load_teacher(path, "mobilenetv2"), network)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(CheckpointError, match=r"cannot be loaded \(SafetensorError.*It is torn"):
        load_teacher(path, "mobilenetv2")


def test_a_module_is_taken_as_it_is() -> None:
    network = trained().train()
    assert load_teacher(network) is network and network.training
    with pytest.raises(ValueError, match=r"source is a module \(CIFARResNet\), which is used as it is"):
        load_teacher(network, "resnet8")


class Timm(nn.Module):
    """timm's interface in small."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv, self.conv2, self.fc = nn.Conv2d(3, 4, 2, 2), nn.Conv2d(4, 8, 2, 2), nn.Linear(8, num_classes)

    def forward_intermediates(self, x: Tensor, indices: Any = None, output_fmt: str = "NCHW") -> Any:
        maps = [self.conv(x), self.conv2(self.conv(x))]
        return maps[-1], [maps[level] for level in indices or (0, 1)]

    def forward_head(self, x: Tensor) -> Tensor:
        logits: Tensor = self.fc(x.mean((2, 3)))
        return logits


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """A package timm, whose networks have 6 classes; what is returned fills with whether its weights were wanted."""
    pretrained: list[bool] = []

    def create(name: str, num_classes: int = 6, **arguments: Any) -> nn.Module:
        pretrained.append(arguments.pop("pretrained", False))
        assert arguments.keys() <= {"drop_rate"}
        return Timm(num_classes)

    module: Any = types.ModuleType("timm")
    module.__version__, module.is_model, module.create_model = "1.0", lambda name: name == "toy", create
    monkeypatch.setitem(sys.modules, "timm", module)
    return pretrained


def test_weights_of_timm(asked: list[bool]) -> None:
    teacher = load_teacher("timm:toy")
    assert teacher.num_classes == 6 and not teacher.training and asked == [True]
    assert load_teacher("timm:toy", num_classes=6).num_classes == 6
    with pytest.raises(ValueError, match=r"num_classes is 9, but timm:toy was trained for 6 classes"):
        load_teacher("timm:toy", num_classes=9)
    with pytest.raises(ValueError, match=r"give the file of the weights as source and name='timm:toy'"):
        load_teacher("timm:toy", heads="auxiliary")


def test_weights_fine_tuned_with_timm(asked: list[bool], tmp_path: Path) -> None:
    model = Timm(9)
    for content in (model.state_dict(), {"state_dict": under("module.", model.state_dict())}):
        teacher = load_teacher(written(tmp_path, content), "timm:toy")
        assert teacher.num_classes == 9 and torch.equal(teacher.model.fc.weight, model.fc.weight)
    path = written(tmp_path, ProjectionHead(adapt_backbone(model)).state_dict())
    assert torch.equal(load_teacher(path, "timm:toy", heads="projection").backbone.model.conv.weight, model.conv.weight)
    with pytest.raises(CheckpointError, match=r"of which auxiliary_classifier\.block_extractor1"):
        load_teacher(written(tmp_path, model.state_dict()), "timm:toy", heads="auxiliary")
    assert not any(asked)


def test_a_file_does_not_make_timm_load_anything(asked: list[bool], tmp_path: Path) -> None:
    """Neither one from elsewhere nor the run of a network that began with timm's weights."""
    arguments = {
        "pretrained": True,
        "pretrained_cfg": {"url": "u"},
        "checkpoint_path": "p",
        "cache_dir": "c",
        "drop_rate": 0.1,
    }
    content = checkpoint(adapt_backbone(Timm(7)), backbone="timm:toy", backbone_args=arguments)
    path = written(tmp_path, content)
    assert load_teacher(path).num_classes == load_teacher(path, "timm:toy").num_classes == 7
    assert not any(asked)


def test_nothing_is_imported_because_a_file_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "module_of_a_file.py").write_text("from toy_method import ToyNet\n", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    network, name = toy_method.ToyNet(7), "module_of_a_file.ToyNet"
    path = written(tmp_path, checkpoint(network, backbone=name))
    with pytest.raises(CheckpointError, match=f"names {name} as its network"):
        load_teacher(path)
    assert "module_of_a_file" not in sys.modules
    assert same(load_teacher(path, name), network.eval())


def test_the_classes_of_a_network_whose_constructor_reads_numbers(tmp_path: Path) -> None:
    network = Reading(7)
    assert same(load_teacher(written(tmp_path, network.state_dict()), "test_teachers.Reading"), network.eval())


class Reading(toy_method.ToyNet):
    """It cannot be made on the meta device."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        assert torch.ones(1).item() == 1


def test_an_adapted_network_from_its_own_names_and_its_adapters(tmp_path: Path) -> None:
    network, other = (adapt_backbone(Timm(7)) for _ in range(2))
    for content in (network.state_dict(), network.model.state_dict(), under("backbone.", network.state_dict())):
        with torch.no_grad():
            other.model.fc.weight.zero_()
        load_backbone_weights(other, written(tmp_path, content))
        assert torch.equal(other.model.fc.weight, network.model.fc.weight)


REFUSED: dict[str, tuple[Callable[[Path], Any], type[Exception], str]] = {
    "no file": (lambda folder: load_teacher("wrn_40_2"), CheckpointError, "'wrn_40_2', which is neither a file nor"),
    "no name": (
        lambda folder: load_teacher(written(folder, trained().state_dict())),
        CheckpointError,
        "does not say which network it holds; give name a name that",
    ),
    "unknown name": (
        lambda folder: load_teacher(written(folder, trained().state_dict()), "resnet9"),
        ValueError,
        "backbone is 'resnet9', but one of .*did you mean 'resnet",
    ),
    "another network": (
        lambda folder: load_teacher(written(folder, trained().state_dict()), "wrn16x2"),
        CheckpointError,
        r"lacks 51 of the backbone's 68 tensors, block1\.layer\.0\.conv1\.weight, .* is it another network\?",
    ),
    "a deeper network": (
        lambda folder: load_teacher(written(folder, trained("resnet14").state_dict()), "resnet8"),
        CheckpointError,
        r"tensors below the backbone's layers that the backbone has not, such as layer1\.1",
    ),
    "other classes": (
        lambda folder: load_teacher(written(folder, trained().state_dict()), "resnet8", 9),
        CheckpointError,
        r"fc\.weight in .* has shape \(7, 64\), but the backbone's has \(9, 64\); .* another number of classes",
    ),
    "no network": (
        lambda folder: load_teacher(written(folder, {"loss": 3.0}), "resnet8"),
        CheckpointError,
        "holds none of the backbone's weights. It has 1 entries such as loss",
    ),
    "code": (
        lambda folder: load_teacher(written(folder, nn.Linear(2, 2)), "resnet8"),
        CheckpointError,
        "holds Python objects besides tensors",
    ),
    "a call": (
        lambda folder: load_teacher(written(folder, checkpoint(trained(), backbone="fractions.Fraction"))),
        CheckpointError,
        r"names fractions\.Fraction as its network, which runs code .*; if you trust the file, give name the same\.",
    ),
    "a call by a function of this library": (
        lambda folder: load_teacher(written(folder, checkpoint(trained(), backbone="frskd_fast.models.load_teacher"))),
        CheckpointError,
        r"names frskd_fast\.models\.load_teacher as its network",
    ),
    "a download": (
        lambda folder: load_teacher(written(folder, checkpoint(trained(), backbone="timm:hf-hub:someone/net"))),
        CheckpointError,
        "names timm:hf-hub:someone/net as its network, which runs code or is downloaded",
    ),
    "no name of a network": (
        lambda folder: load_teacher(written(folder, checkpoint(trained(), backbone=3))),
        CheckpointError,
        r"has 3 as its backbone with the arguments \{\}, but a name and a mapping were wanted",
    ),
    "no classes": (
        lambda folder: load_teacher(written(folder, trained().state_dict()), "resnet8", 0),
        ValueError,
        "num_classes must be at least 1",
    ),
    "no source": (lambda folder: load_teacher(3), TypeError, "source is a int, but a module, a path or"),  # type: ignore[arg-type]
    "no heads": (
        lambda folder: load_teacher("timm:x", heads="rotation"),  # type: ignore[arg-type]
        ValueError,
        'heads is \'rotation\', but "auxiliary", "projection" or None',
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_a_teacher_is_refused_with_a_sentence(case: str, tmp_path: Path) -> None:
    load, error, sentence = REFUSED[case]
    with pytest.raises(error, match=sentence):
        load(tmp_path)
