"""The trainer on a task that predicts maps: metrics, panels, accumulated steps, resuming, export and masks as files."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

pytest.importorskip("lightning")
pytest.importorskip("jsonargparse")
pytest.importorskip("sklearn")
pytest.importorskip("PIL")

from PIL import Image
from torch import Tensor, nn
from training_utils import epochs, same_weights, steps, weights

from frskd_fast.training import panels
from frskd_fast.training.cli import main, run
from frskd_fast.training.errors import Refusal
from frskd_fast.training.export import load_student
from frskd_fast.training.masks import MaskFolder, palette
from frskd_fast.training.module import DistillationModule
from frskd_fast.training.tables import read_table

CLASSES = 11


class ToyMapsNet(nn.Module):
    """A feature map of stride 4 and one of stride 8, a second pair made of them, and a head on each."""

    def __init__(self, num_classes: int, dropout: float = 0.2) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.first = nn.Sequential(nn.Conv2d(3, 8, 5, 4, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(dropout))
        self.second = nn.Sequential(nn.Conv2d(8, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU())
        self.refine = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())
        self.student_head, self.teacher_head = nn.Conv2d(8, num_classes, 1), nn.Conv2d(8, num_classes, 1)

    def student_maps(self, images: Tensor) -> Tensor:
        maps: Tensor = self.student_head(self.first(images))
        return maps

    def forward(self, images: Tensor) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor]:
        first = self.first(images)
        student = [first, self.second(first)]
        teacher = [self.refine(feature) for feature in student]
        return student, teacher, self.student_head(first), self.teacher_head(teacher[0])


def maps_run(folder: Path, **overrides: Any) -> list[str]:
    """Words of a `fit` of four batches of two scenes an epoch, three to a step, distilling from the second epoch on."""
    settings = {
        "model": {"backbone": "test_map_training.ToyMapsNet"},
        "task": {"init_args": {"warmup_epochs": 1}},
        "data": {
            "init_args": {
                "training_scenes": 8,
                "evaluation_scenes": 6,
                "crop_size": 32,
                "short_side": [24, 48],
                "batch_size": 2,
            }
        },
        "trainer": {
            "max_epochs": 2,
            "accumulate_grad_batches": 3,
            "log_every_n_steps": 1,
            "check_val_every_n_epoch": 1,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "accelerator": "cpu",
        },
        "checkpoint": {"every_n_steps": 1, "keep_best": True},
        "run_dir": str(folder),
        "tensorboard": False,
    }
    recipe = folder.parent / f"{folder.name}.yaml"
    recipe.write_text(json.dumps({"base": "digit_scenes_frskd", **settings}), encoding="utf-8")
    words = ["fit", "--config", str(recipe)]
    for name, value in overrides.items():
        words += [f"--{name.replace('__', '.')}", str(value)]
    return words


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("maps") / "run"
    assert main(maps_run(folder)) == 0
    return folder


def test_a_run_records_and_draws_what_maps_are_about(trained: Path) -> None:
    names = ["background", *(f"digit_{digit}" for digit in range(10))]
    for row in epochs(trained):
        assert {"train/pixel_accuracy", "train/teacher_pixel_accuracy", "train/kd", "train/attention"} <= set(row)
        iou = [float(row[f"validation/iou_{name}"]) for name in names]
        assert float(row["validation/miou"]) == pytest.approx(numpy.nanmean(iou))
        assert 0 <= float(row["validation/pixel_accuracy"]) <= 1 and float(row["validation/loss"]) > 0
    best = torch.load(trained / "best.ckpt", weights_only=True)
    scores = [float(row["validation/miou"]) for row in epochs(trained)]
    assert best["epoch"] == scores.index(max(scores))
    for name in ("curves.png", "maps.png"):
        assert (trained / name).stat().st_size > 1000
    assert not (trained / "attention.png").exists()
    columns, _ = read_table(trained / "epochs.csv")
    assert not {"validation/accuracy", "train/accuracy"} & set(columns)


def test_panels_show_image_mask_both_predictions_and_attention(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plots = panels.pyplot()
    if plots is None:
        pytest.skip("matplotlib is not installed")
    drawn: list[Any] = []
    monkeypatch.setattr(plots, "close", drawn.append)
    task = DistillationModule.load_from_checkpoint(trained / "last.ckpt", map_location="cpu", trust=True).task
    masks = torch.tensor([0, 3, 255]).reshape(3, 1, 1).expand(3, 32, 32)
    assert panels.draw_attention(task, torch.randn(3, 3, 32, 32), trained.parent / "drawn.png", masks=masks)
    (figure,) = drawn
    titles = [axes.get_title() for axes in figure.axes[: len(figure.axes) // 3]]
    assert titles == ["image", "mask", "student", "self-teacher", *(f"{name} {level}" for name in ("student", "self-teacher")
                                                                 for level in (1, 2))]  # fmt: skip
    shown = [figure.axes[row * len(titles) + 1].images[0].get_array()[0, 0] * 255 for row in range(3)]
    assert numpy.allclose(shown, palette()[[0, 3, 255]])
    monkeypatch.undo()
    plots.close(figure)


def test_an_incomplete_group_of_batches_is_a_step_and_a_run_goes_on_from_within_an_epoch(
    trained: Path, tmp_path: Path
) -> None:
    """Four batches, three to a step: two steps an epoch, the second of one batch. A checkpoint is never of half a step."""
    assert [row["step"] for row in steps(trained)] == ["0", "0", "0", "1", "2", "2", "2", "3"]
    stopped = tmp_path / "stopped"
    assert main([*maps_run(stopped), "--trainer.max_steps", "3"]) == 0
    assert torch.load(stopped / "last.ckpt", weights_only=True)["global_step"] == 3
    assert main(maps_run(stopped)) == 0
    assert steps(stopped) == steps(trained) and epochs(stopped) == epochs(trained)
    assert same_weights(weights(stopped), weights(trained))


def test_export_takes_images_of_any_size(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With the upsampling. The task is not built for it; only the network's import path takes --trust."""
    student = load_student(trained / "last.ckpt", trust=True).student
    out = tmp_path / "student.pt2"
    assert main(["export", "--checkpoint", str(trained / "last.ckpt"), "--out", str(out), "--trust"]) == 0
    assert "(N, 3, H, W), 11 classes" in capsys.readouterr().out
    images = torch.randn(5, 3, 72, 40)
    with torch.no_grad():
        expected = student(images)
        assert expected.shape == (5, CLASSES, 72, 40)
        torch.testing.assert_close(torch.export.load(out).module()(images), expected)
    module = DistillationModule.load_from_checkpoint(trained / "last.ckpt", map_location="cpu", trust=True).eval()
    assert not module.has_own_student and torch.equal(module(images), expected)


def test_masks_of_the_data_and_of_a_folder(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("predict", maps_run(trained)[1:])
    assert "in place of" not in capsys.readouterr().out
    (trained / "predictions" / "900000.png").touch()
    run("predict", maps_run(trained)[1:])
    assert f"Predictions: {trained / 'predictions'}, in place of the masks that were there" in capsys.readouterr().out
    files = sorted((trained / "predictions").iterdir())
    assert [file.name for file in files] == [f"{number:06d}.png" for number in range(6)]
    command_line = run("test", maps_run(trained)[1:])
    loader, data = command_line.datamodule.test_dataloader(), command_line.datamodule
    targets = torch.cat([data.on_after_batch_transfer(batch)[1] for batch in loader])
    masks = [Image.open(file) for file in files]
    assert {mask.mode for mask in masks} == {"P"}
    predicted = torch.from_numpy(numpy.stack([numpy.array(mask) for mask in masks])).long()
    accuracy = command_line.trainer.callback_metrics["test/pixel_accuracy"]
    assert (predicted == targets).double().mean().item() == pytest.approx(float(accuracy), abs=1e-6)

    images = tmp_path / "images"
    images.mkdir()
    generator = numpy.random.default_rng(0)
    for name, shape in (("wide.png", (40, 90)), ("tall.jpg", (77, 33)), ("grey.png", (32, 32))):
        pixels = generator.integers(0, 255, (*shape, 3), numpy.uint8)
        Image.fromarray(pixels).convert("L" if name == "grey.png" else "RGB").save(images / name)
    (images / "notes.txt").write_text("no image", encoding="utf-8")
    out = tmp_path / "masks"
    words = ["predict", "--images", str(images), "--checkpoint", str(trained / "last.ckpt"), "--trust", "--out"]
    assert main([*words, str(out), "--batch_size", "2"]) == 0
    made = {file.name: Image.open(file) for file in out.iterdir()}
    assert {name: mask.size for name, mask in made.items()} == {
        "wide.png": (90, 40), "tall.png": (33, 77), "grey.png": (32, 32)
    }  # fmt: skip
    assert made["grey.png"].getpalette()[3:6] == [128, 0, 0]
    grey = numpy.array(Image.open(images / "grey.png").convert("RGB"), numpy.float32) / 255
    with torch.no_grad():  # of the network's own size, so nothing is resized
        student = load_student(trained / "last.ckpt", trust=True).student
        maps = student((torch.from_numpy(grey).permute(2, 0, 1)[None] - 0.5) / 0.25)
    assert numpy.array_equal(numpy.array(made["grey.png"]), maps.argmax(1)[0].numpy())


def test_a_folder_of_other_files_is_not_replaced(tmp_path: Path) -> None:
    masks = MaskFolder(tmp_path / "predictions", CLASSES)
    masks.folder.mkdir()
    (masks.folder / "notes.txt").touch()
    with pytest.raises(
        Refusal, match=r"notes.txt is no mask, but masks replace what is in .*predictions; move it away"
    ):
        masks.begin()
    assert [file.name for file in tmp_path.rglob("*")] == ["predictions", "notes.txt"]


def test_a_bad_image_and_other_mistakes_leave_nothing(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(images: Path, out: Path, sentence: str) -> None:
        words = ["--images", str(images), "--checkpoint", str(trained / "last.ckpt"), "--trust", "--out", str(out)]
        before = sorted(tmp_path.rglob("*"))
        assert main(["predict", *words, "--batch_size", "1"]) == 1
        assert sentence in capsys.readouterr().err and sorted(tmp_path.rglob("*")) == before

    images, out = tmp_path / "images", tmp_path / "out"
    refused(images, out, f"--images is {images}, which is no folder")
    images.mkdir()
    refused(images, out, "which holds no file that ends in .bmp")
    Image.new("RGB", (20, 20)).save(images / "a.png")
    (images / "b.png").write_bytes((images / "a.png").read_bytes()[:40])
    refused(images, out, f"{images / 'b.png'} could not be decoded")
    Image.fromarray(numpy.full((20, 20), 40_000, numpy.uint16)).save(images / "b.png")
    refused(images, out, f"{images / 'b.png'} is an image of mode I;16, but one byte for each colour was wanted")
    (images / "b.png").rename(images / "a.jpg")
    refused(images, out, "would have one mask, a.png")
    refused(images, images, f"--out is {images}, which is there already")
    (images / "a.jpg").unlink()
    Image.new("I;16", (20, 20)).save(images / "c.png")
    refused(images, out, f"{images / 'c.png'} is an image of mode I;16, but one byte for each colour was wanted")
    os.mkfifo(images / "d.png")
    refused(images, out, f"{images / 'd.png'} has the name of an image but is no regular file")


def test_a_student_of_classes_has_no_masks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module = DistillationModule(7, "frskd_fast.tasks.ClassificationTask", "wrn16x2")
    content = {"state_dict": module.state_dict(), "hyper_parameters": dict(module.hparams)}
    torch.save(content, tmp_path / "last.ckpt")
    words = ["--images", str(tmp_path), "--checkpoint", str(tmp_path / "last.ckpt"), "--out", str(tmp_path / "out")]
    assert main(["predict", *words]) == 1
    assert "(wrn16x2) says one class for each image" in capsys.readouterr().err
