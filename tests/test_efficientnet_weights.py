"""ImageNet's weights of EfficientNet out of the files of efficientnet-pytorch and timm."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from frskd_fast.models import CheckpointError, EfficientDetSeg, create_model, load_backbone_weights
from frskd_fast.models.checkpoints import classes_in

State = dict[str, Tensor]

# Our name, efficientnet-pytorch's and timm's, for B0: the stem, the block without an expansion, and one of each other stage.
NAMES_B0 = (
    ("layer0.0.weight", "_conv_stem.weight", "conv_stem.weight"),
    ("layer0.1.running_var", "_bn0.running_var", "bn1.running_var"),
    ("layer1.0._depthwise_conv.weight", "_blocks.0._depthwise_conv.weight", "blocks.0.0.conv_dw.weight"),
    ("layer1.0._bn1.weight", "_blocks.0._bn1.weight", "blocks.0.0.bn1.weight"),
    ("layer1.0._se_reduce.bias", "_blocks.0._se_reduce.bias", "blocks.0.0.se.conv_reduce.bias"),
    ("layer1.0._project_conv.weight", "_blocks.0._project_conv.weight", "blocks.0.0.conv_pw.weight"),
    ("layer1.0._bn2.bias", "_blocks.0._bn2.bias", "blocks.0.0.bn2.bias"),
    ("layer1.1._expand_conv.weight", "_blocks.1._expand_conv.weight", "blocks.1.0.conv_pw.weight"),
    ("layer1.1._bn0.weight", "_blocks.1._bn0.weight", "blocks.1.0.bn1.weight"),
    ("layer2.0._depthwise_conv.weight", "_blocks.2._depthwise_conv.weight", "blocks.1.1.conv_dw.weight"),
    ("layer2.1._bn1.running_mean", "_blocks.3._bn1.running_mean", "blocks.2.0.bn2.running_mean"),
    ("layer3.1._se_expand.weight", "_blocks.5._se_expand.weight", "blocks.3.0.se.conv_expand.weight"),
    ("layer4.2._bn2.num_batches_tracked", "_blocks.8._bn2.num_batches_tracked", "blocks.4.0.bn3.num_batches_tracked"),
    ("layer4.5._project_conv.weight", "_blocks.11._project_conv.weight", "blocks.5.0.conv_pwl.weight"),
    ("layer5.3._bn2.weight", "_blocks.15._bn2.weight", "blocks.6.0.bn3.weight"),
)
# B2 has two blocks in its first stage, 23 in all.
NAMES_B2 = (
    ("layer1.1._depthwise_conv.weight", "_blocks.1._depthwise_conv.weight", "blocks.0.1.conv_dw.weight"),
    ("layer1.2._expand_conv.weight", "_blocks.2._expand_conv.weight", "blocks.1.0.conv_pw.weight"),
    ("layer4.0._bn0.weight", "_blocks.9._bn0.weight", "blocks.3.1.bn1.weight"),
    ("layer5.4._depthwise_conv.weight", "_blocks.16._depthwise_conv.weight", "blocks.5.0.conv_dw.weight"),
    ("layer5.10._project_conv.weight", "_blocks.22._project_conv.weight", "blocks.6.1.conv_pwl.weight"),
)
# What the files have besides.
CLASSIFIERS = (
    ("_conv_head.weight", "_bn1.weight", "_fc.weight"),
    ("conv_head.weight", "bn2.weight", "classifier.weight"),
)
# How the state dict comes.
WRAPPINGS: dict[str, Callable[[State], object]] = {
    "bare": lambda state: state,
    "DataParallel": lambda state: {"state_dict": {f"module.{name}": value for name, value in state.items()}},
}


def network(compound: int = 0) -> EfficientDetSeg:
    torch.manual_seed(compound)
    return EfficientDetSeg(compound, num_classes=3)


def file_of(source: EfficientDetSeg, form: int) -> State:
    """The backbone of `source` under the names of another program, with a classifier."""
    state = source.state_dict()
    names = source.names_of_part[form]
    assert set(names) == {name for name in state if name.startswith("layer")}
    return {names[name]: state[name] for name in names} | {name: torch.ones(4, 4) for name in CLASSIFIERS[form]}


@pytest.mark.parametrize(("compound", "table"), [(0, NAMES_B0), (2, NAMES_B2)])
def test_the_names_are_those_of_the_programs(compound: int, table: tuple[tuple[str, str, str], ...]) -> None:
    with torch.device("meta"):
        package, timm = EfficientDetSeg(compound).names_of_part
    assert [(ours, package[ours], timm[ours]) for ours, _, _ in table] == list(table)
    assert len(set(package.values())) == len(set(timm.values())) == len(package) == len(timm)


@pytest.mark.parametrize("form", [0, 1])
@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_the_backbone_comes_from_the_file_and_the_rest_stays(form: int, wrapping: str, tmp_path: Path) -> None:
    source, target = network(), EfficientDetSeg(num_classes=5)
    for parameter in source.buffers():
        parameter.add_(3)
    before = {name: value.clone() for name, value in target.state_dict().items()}
    state = {k: v for k, v in file_of(source, form).items() if form or "num_batches_tracked" not in k}  # older PyTorch
    torch.save(WRAPPINGS[wrapping](state), tmp_path / "efficientnet.pth")
    load_backbone_weights(target, tmp_path / "efficientnet.pth")
    for name, value in target.state_dict().items():
        from_file = name.startswith("layer") and (form or "num_batches_tracked" not in name)
        assert torch.equal(value, (source.state_dict() if from_file else before)[name]), name


def test_a_file_of_the_backbone_says_nothing_of_classes() -> None:
    assert classes_in(file_of(network(), 1), network()) is None


def test_a_whole_network_loads_as_ever(tmp_path: Path) -> None:
    source, target = network(), EfficientDetSeg(num_classes=3)
    torch.save(source.state_dict(), tmp_path / "network.pth")
    load_backbone_weights(target, tmp_path / "network.pth")
    assert all(torch.equal(value, source.state_dict()[name]) for name, value in target.state_dict().items())


@pytest.mark.parametrize("form", [0, 1])
def test_wrong_files(form: int, tmp_path: Path) -> None:
    path = tmp_path / "wrong.pth"

    def refusal(content: object, target: EfficientDetSeg) -> str:
        torch.save(content, path)
        before = {name: value.clone() for name, value in target.state_dict().items()}
        with pytest.raises(CheckpointError) as refused:
            load_backbone_weights(target, path)
        assert all(torch.equal(value, before[name]) for name, value in target.state_dict().items())
        assert str(path) in str(refused.value)
        return str(refused.value)

    d0, d1, d2 = (network(compound) for compound in range(3))
    b0, b1, b2 = (file_of(source, form) for source in (d0, d1, d2))
    for content, target in ((b1, d0), (b0, d1), (create_model("resnet8").state_dict(), d0)):
        assert "another network" in refusal(content, target)
    assert "has shape (48, " in refusal(b2, d1)
    del b0[d0.names_of_part[form]["layer5.3._bn2.weight"]]
    assert "lacks 1 of the backbone's 352 tensors, layer5.3._bn2.weight among" in refusal(b0, d0)
    assert "holds none of the backbone's weights" in refusal({"loss": torch.ones(2)}, d0)
