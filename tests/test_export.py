"""The student alone: written, read back, compared; foreign checkpoints; refusals."""

from __future__ import annotations

import argparse
import warnings
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("lightning")
pytest.importorskip("jsonargparse")
pytest.importorskip("safetensors")

import safetensors
from lightning.pytorch import Trainer
from safetensors.torch import load_file, save, save_file
from training_utils import DISTILLING, PLAIN, same_weights

from frskd_fast.models import CheckpointError, cifarresnet18, resnet34, wrn16x2
from frskd_fast.models.checkpoints import backbone_weights
from frskd_fast.training import export
from frskd_fast.training.cli import main
from frskd_fast.training.export import ExportError, bound, load_student, write_student
from frskd_fast.training.module import DistillationModule


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `frskd-fast fit` writes it, of a module whose statistics are not those of a fresh one."""
    torch.manual_seed(1)
    module = DistillationModule(7, DISTILLING, "wrn16x2")
    module.task(torch.randn(8, 3, 16, 16), torch.arange(8) % 7)["loss"].backward()
    path = tmp_path_factory.mktemp("export") / "last.ckpt"
    images = {"size": [16, 16], "channels": 3, "mean": [0.1, 0.2, 0.3], "std": [1.0, 1.0, 1.0]}
    torch.save(
        {
            "state_dict": module.state_dict(),
            "hyper_parameters": dict(module.hparams),
            "frskd_fast": {"seed": 1, "images": images, "channels_last": True},
            "epoch": 3,
        },
        path,
    )
    return path


def logits(path: Path, images: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return load_student(path).student(images)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt2", ".onnx"])
def test_exported_student_gives_the_same_logits(
    checkpoint: Path, tmp_path: Path, suffix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if suffix == ".onnx":
        pytest.importorskip("onnx")
        pytest.importorskip("onnxscript")
    out = tmp_path / f"student{suffix}"
    assert export.main(["--checkpoint", str(checkpoint), "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "largest difference of logits" in printed and "(N, 3, 16, 16), 7 classes" in printed
    images = torch.randn(5, 3, 16, 16)  # another batch size than any that the export used
    expected = logits(checkpoint, images)
    if suffix == ".safetensors":
        network = wrn16x2(num_classes=7)
        network.load_state_dict(load_file(out))  # under the original's own names
        with torch.no_grad():
            actual = network.eval()(images)[1]
        with safetensors.safe_open(out, "pt") as file:
            metadata = file.metadata()
        assert metadata["backbone"] == "wrn16x2" and '"mean": [0.1, 0.2, 0.3]' in metadata["input"]
    elif suffix == ".pt2":
        actual = torch.export.load(out).module()(images)
    else:
        import onnx.reference

        session = onnx.reference.ReferenceEvaluator(str(out))
        actual = torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
    network = load_student(checkpoint).student
    assert float((actual.detach() - expected).abs().max()) <= bound(network, expected)
    assert not list(tmp_path.glob(".partial*"))


class MapsOfOneSize(nn.Module):
    """images -> maps (N, 3, 16, 16), by a layer that has the size of the images built in."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(256, 256)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        maps: torch.Tensor = self.layer(images.flatten(2)).reshape(-1, 3, 16, 16)
        return maps


def test_it_is_said_why_height_and_width_of_maps_are_fixed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    loaded = export.Export(MapsOfOneSize(), "mine", {}, 3, 3, (16, 16), (), (), "maps")  # type: ignore[arg-type]
    monkeypatch.setattr(export, "load_student", lambda *_, **__: loaded)
    out = tmp_path / "student.pt2"
    assert export.main(["--checkpoint", "any", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "images (N, 3, 16, 16)" in printed and "Height and width are fixed, because" in printed
    assert "RuntimeError: " in printed
    images = torch.randn(5, 3, 16, 16)
    torch.testing.assert_close(torch.export.load(out).module()(images), loaded.student(images))


@pytest.mark.parametrize("suffix", [".safetensors", ".pt2", ".onnx"])
def test_flipped_bits_of_an_export_are_found(
    checkpoint: Path, tmp_path: Path, suffix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """In every tensor, in a copy of the file each."""
    if suffix == ".onnx":
        pytest.importorskip("onnx")
        pytest.importorskip("onnxscript")
    loaded, out, copy = load_student(checkpoint), tmp_path / f"student{suffix}", tmp_path / f"copy{suffix}"
    write_student(loaded, out)
    assert main(["export", "--check", str(out)]) == 0
    content, flipped = out.read_bytes(), 0
    for name, value in loaded.student.backbone.state_dict().items():
        place = content.find(value.contiguous().numpy().tobytes()) if value.numel() > 100 else -1
        if place < 0:
            continue  # too short to be found, or an optimisation of the graph made another of it
        copy.write_bytes(content[: place + 7] + bytes([content[place + 7] ^ 1]) + content[place + 8 :])
        flipped += 1
        assert main(["export", "--check", str(copy)]) == 1, name
        if suffix == ".safetensors":
            with pytest.raises(ExportError, match="its content is not that of its checksum"):
                load_student(copy)
    assert flipped >= (1 if suffix == ".onnx" else 10)
    said = capsys.readouterr()
    assert said.err.count("is not as it was written") == flipped and "is as it was written." in said.out
    copy.write_bytes(content[:-90])
    assert main(["export", "--check", str(copy)]) == 1


def test_a_flipped_tensor_of_a_checkpoint_is_found(checkpoint: Path, tmp_path: Path) -> None:
    content = bytearray(checkpoint.read_bytes())
    weight = torch.load(checkpoint, weights_only=True)["state_dict"]["task.backbone.fc.weight"]
    content[content.index(weight.numpy().tobytes()) + 7] ^= 1
    (tmp_path / "last.ckpt").write_bytes(content)
    with pytest.raises(ExportError, match=r"last\.ckpt is damaged: its entry .* has changed since it was written"):
        load_student(tmp_path / "last.ckpt")


def test_a_wrong_export_is_noticed_and_not_left_behind(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights that are off by one part in ten thousand are more than rounding."""

    def slightly_wrong(tensors: dict[str, torch.Tensor], metadata: Any) -> bytes:
        return save({**tensors, "fc.weight": tensors["fc.weight"] * 1.0001}, metadata)

    monkeypatch.setattr("safetensors.torch.save", slightly_wrong)
    with pytest.raises(ExportError, match="more than rounding explains"):
        write_student(load_student(checkpoint), tmp_path / "student.safetensors")
    assert not list(tmp_path.iterdir())


WRAPPINGS = {
    "plain": lambda state: state,
    "module. prefix": lambda state: {f"module.{name}": value for name, value in state.items()},
    "state_dict": lambda state: {"state_dict": state, "epoch": 3},
    "net": lambda state: {"net": {f"module.{name}": value for name, value in state.items()}, "acc": 1.5},
    "model": lambda state: {"model": state, "optimizer": {"param_groups": []}},
    "compiled": lambda state: {"model": {f"_orig_mod.{name}": value for name, value in state.items()}},
    "task": lambda state: {
        **{f"backbone.{name}": value for name, value in state.items()},
        "self_teacher.fc.weight": torch.zeros(9, 8),
    },
}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_state_dicts_of_other_programs(wrapping: str, tmp_path: Path) -> None:
    network = wrn16x2(num_classes=6).eval()
    torch.save(WRAPPINGS[wrapping](network.state_dict()), tmp_path / "other.pth")
    loaded = load_student(tmp_path / "other.pth", backbone="wrn16x2")
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert loaded.num_classes == 6 and loaded.size == (32, 32)
        torch.testing.assert_close(loaded.student(images), network(images)[1], rtol=0, atol=0)


def test_safetensors_are_read_too(tmp_path: Path) -> None:
    network = wrn16x2(num_classes=6)
    save_file(network.state_dict(), tmp_path / "other.safetensors")
    loaded = load_student(tmp_path / "other.safetensors", backbone="wrn16x2", size=16)
    assert torch.equal(loaded.student.backbone.fc.weight, network.fc.weight)


@pytest.mark.parametrize(
    ("content", "arguments", "message"),
    [
        (lambda: {"fc.weight": torch.zeros(5, 512)}, {}, "give --backbone a name"),
        (lambda: wrn16x2(5).state_dict(), {"backbone": "cifarresnet18"}, "has shape|lacks"),
        (lambda: wrn16x2(5).state_dict(), {"backbone": "wrn16x2", "num_classes": 6}, "another number of classes"),
        (lambda: {"x": 3}, {"backbone": "wrn16x2", "num_classes": 6}, "none of the backbone's weights"),
        (lambda: wrn16x2(5).state_dict(), {"backbone": "wrn16x3"}, "but one of .*cifarresnet18"),
        (
            lambda: resnet34(5).state_dict(),
            {"backbone": "resnet18"},
            r"96 tensors .* such as layer1\.2\.conv1\.weight",
        ),
        (
            lambda: {"state_dict": wrn16x2(5).state_dict(), "frskd_fast": {"student": ["a"]}},
            {"backbone": "wrn16x2"},
            r"kind of student by \['a'\], but the import path of a class was wanted",
        ),
        (lambda: [torch.zeros(2)], {"backbone": "wrn16x2"}, "holds a list"),
        (lambda: {"args": argparse.Namespace(a=1)}, {"backbone": "wrn16x2"}, "Python objects besides tensors"),
    ],
)
def test_refusals_are_sentences(content: Any, arguments: dict[str, Any], message: str, tmp_path: Path) -> None:
    torch.save(content(), tmp_path / "other.pth")
    with pytest.raises(ExportError, match=message) as error:
        load_student(tmp_path / "other.pth", **arguments)
    assert str(error.value)[0].isupper() or str(error.value).startswith(("fc.", "conv", "backbone"))


def test_missing_file_and_unknown_format(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert export.main(["--checkpoint", "no.ckpt", "--out", "x.pt2"]) == 1
    assert "no.ckpt does not exist" in capsys.readouterr().err
    assert export.main(["--checkpoint", str(checkpoint), "--out", "student.bin"]) == 1
    assert "a name ending in .safetensors, .pt2, .onnx was wanted" in capsys.readouterr().err


def test_the_backbone_is_found_among_the_self_teacher_and_other_prefixes() -> None:
    wanted = ["conv1.weight", "fc.weight"]
    content = {
        "task.self_teacher.fc.weight": torch.zeros(1),
        "task.backbone.conv1.weight": torch.ones(1),
        "task.backbone.fc.weight": torch.ones(2),
    }
    found = backbone_weights(content, wanted)
    assert sorted(found) == wanted and found["fc.weight"].numel() == 2


def test_weights_to_start_from_leave_out_another_classifier(tmp_path: Path) -> None:
    source = cifarresnet18(num_classes=5)
    torch.save(source.state_dict(), tmp_path / "weights.pth")
    module = DistillationModule(3, PLAIN, "cifarresnet18", weights=str(tmp_path / "weights.pth"))
    assert torch.equal(module.backbone.conv1.weight, source.conv1.weight)
    assert module.backbone.fc.weight.shape[0] == 3
    assert not torch.equal(module.backbone.fc.weight, source.fc.weight[:3])


def test_weights_to_start_from_leave_out_nothing_but_the_classifier(tmp_path: Path) -> None:
    """A convolution and a BatchNorm of another width are another network, though they differ in their first size alone."""
    weights = {**wrn16x2(5).state_dict(), "conv1.weight": torch.zeros(8, 3, 3, 3)}
    torch.save(weights, tmp_path / "weights.pth")
    with pytest.raises(CheckpointError, match=r"conv1\.weight .* has shape \(8, 3, 3, 3\)"):
        DistillationModule(3, PLAIN, "wrn16x2", weights=str(tmp_path / "weights.pth"))


def test_a_module_comes_back_without_the_file_it_started_from(tmp_path: Path) -> None:
    file = tmp_path / "weights.pth"
    torch.save(wrn16x2(3).state_dict(), file)
    trainer = Trainer(logger=False, accelerator="cpu", enable_progress_bar=False, enable_model_summary=False)
    trainer.strategy.connect(DistillationModule(3, PLAIN, "wrn16x2", weights=str(file)))
    trainer.save_checkpoint(tmp_path / "last.ckpt", weights_only=True)
    file.unlink()
    again = DistillationModule.load_from_checkpoint(tmp_path / "last.ckpt", map_location="cpu")
    assert torch.equal(again.backbone.conv1.weight, trainer.lightning_module.backbone.conv1.weight)


@pytest.mark.parametrize(
    "settings",
    [
        {"task": {"class_path": DISTILLING, "init_args": {"distill": "fit"}}},
        {"task": {"class_path": DISTILLING, "init_args": {"distill": "od"}}},
        {"task": {"class_path": DISTILLING, "init_args": {"auxiliary": "sla"}}},
        {"task": {"class_path": DISTILLING, "init_args": {"self_teacher": "BiFPN", "num_channels": 16}}},
        {"task": PLAIN},
        {"task": {"class_path": PLAIN, "init_args": {"channels_last": False}}},
        {"backbone": "training_utils.Adapted"},
    ],
)
def test_students_of_every_variant(tmp_path: Path, settings: dict[str, Any]) -> None:
    """The loss's adapters and heads and the self-teacher stay behind; an adapted network goes under its own names."""
    module = DistillationModule(**{"num_classes": 7, "task": DISTILLING, "backbone": "wrn16x2", **settings})
    path = tmp_path / "last.ckpt"
    content = {"state_dict": module.state_dict(), "hyper_parameters": dict(module.hparams)}
    module.on_save_checkpoint(content)
    torch.save(content, path)
    loaded = load_student(path, size=16, backbone=module.hparams.backbone)
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(loaded.student(images), module.eval()(images))
    if "." in module.hparams.backbone:
        assert load_student(path, size=16, trust=True).num_classes == 7
        with pytest.raises(ExportError, match="if you trust the file, give --backbone the same"):
            load_student(path, size=16)
    write_student(loaded, tmp_path / "student.safetensors")
    foreign = load_student(tmp_path / "student.safetensors", backbone=module.hparams.backbone, num_classes=7, size=16)
    assert same_weights(foreign.student.state_dict(), loaded.student.state_dict())


@pytest.mark.parametrize("torn", [".metadata", "meta.pt", "__0_0.distcp"])
def test_shards_are_read_as_a_file_is(checkpoint: Path, tmp_path: Path, torn: str) -> None:
    """A folder as Lightning's FSDP2 leaves it."""
    import torch.distributed.checkpoint as distributed

    content = torch.load(checkpoint, weights_only=True)
    folder = tmp_path / "shards.ckpt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is one process
        distributed.save({"state_dict": content.pop("state_dict")}, checkpoint_id=folder)
    torch.save(content, folder / "meta.pt")
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(logits(folder, images), logits(checkpoint, images))
    (folder / torn).write_bytes(b"torn")
    with pytest.raises(ExportError, match=r"shards\.ckpt cannot be loaded"):
        load_student(folder)
    (folder / ".metadata").unlink()
    with pytest.raises(ExportError, match="no folder of shards"):
        load_student(folder)


def test_a_file_that_torch_refuses_without_a_word(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in (("data.pkl", b""), ("version", b"3\n"), ("byteorder", b"little")):
            archive.writestr(f"archive/{name}", content)
    with pytest.raises(ExportError, match=r"cannot be loaded \(EOFError\)"):
        load_student(path)
