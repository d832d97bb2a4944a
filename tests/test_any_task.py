"""The trainer knows no method: a task from outside trains, resumes and exports; so does any optimiser and any schedule."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("lightning")
pytest.importorskip("jsonargparse")
pytest.importorskip("sklearn")
pytest.importorskip("safetensors")

import yaml
from safetensors.torch import load_file
from toy_method import ToyNet, ToyTask
from training_utils import PLAIN, SCHEDULES, epochs, same_weights, small_run, steps, weights

import frskd_fast.losses
import frskd_fast.tasks
import frskd_fast.training
from frskd_fast.mixing import rotate4
from frskd_fast.models import wrn16x2
from frskd_fast.tasks import Student, rotation_accuracies
from frskd_fast.training.class_paths import build
from frskd_fast.training.cli import expanded, main, run
from frskd_fast.training.data import DigitsData
from frskd_fast.training.export import load_student
from frskd_fast.training.module import DistillationModule
from frskd_fast.training.panels import draw_attention
from frskd_fast.training.recipe_files import recipe, recipe_names

SOURCES = sorted(Path(frskd_fast.training.__file__).parent.rglob("*.py"))
DOCUMENT = Path(__file__).parents[1] / "docs" / "training.md"


class TurnedTask(ToyTask):
    """A method that learns from rotated images."""

    views = "rotations"

    def forward(self, images: Tensor, targets: Any = None) -> dict[str, Tensor]:
        if self.training:
            assert len(images) == 4 * len(targets)
            assert torch.equal(images[1::4], images[::4].rot90(1, (2, 3)))
            images = images[::4]
        return super().forward(images, targets)


class TwinTask(ToyTask):
    """A method whose student is another network than the one it is built with; it trains both alike."""

    def __init__(self, backbone: nn.Module, width: int = 3) -> None:
        super().__init__(backbone)
        self.twin = ToyNet(self.backbone.num_classes, width)

    def forward(self, images: Tensor, targets: Any = None) -> dict[str, Tensor]:
        logits = self.twin(images)[1]
        if targets is None or not self.training:
            return {"output": logits}
        parts = super().forward(images, targets)
        return {**parts, "loss": parts["loss"] + nn.functional.cross_entropy(logits, targets), "output": logits}

    def parameter_groups(self) -> list[dict[str, Any]]:
        return [*super().parameter_groups(), {"params": list(self.twin.parameters())}]

    def student(self) -> Student:
        return Student(self.twin, self.channels_last)

    def maps(self, images: Tensor) -> dict[str, list[Tensor]]:
        return {**super().maps(images), "twin": self.twin(images)[0]}


def small_recipe(folder: Path, **settings: Any) -> list[str]:
    """Words of a short `fit` by a YAML file whose base is that of `small_run`, with settings of its own."""
    small_run(folder)
    path = folder.parent / f"{folder.name}-own.yaml"
    path.write_text(json.dumps({"base": f"{folder.name}.yaml", **settings}), encoding="utf-8")
    return ["fit", "--config", str(path), "--data.mixup", "0"]


def test_a_method_from_outside_trains_resumes_and_exports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    told: list[tuple[int, int | None]] = []
    original = ToyTask.start_epoch

    def watched(self: ToyTask, epoch: int, epochs: int | None) -> None:
        told.append((epoch, epochs))
        original(self, epoch, epochs)

    monkeypatch.setattr(ToyTask, "start_epoch", watched)
    settings: dict[str, Any] = {
        "task": {"class_path": "toy_method.ToyTask", "init_args": {"weight": 3.0, "head_weight_decay": 0.5}},
        "model": {"backbone": "ToyNet", "backbone_args": {"width": 5}},
    }
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert main(small_recipe(whole, **settings)) == 0
    assert told == [(epoch, 4) for epoch in range(4)]
    words = small_recipe(stopped, **settings)
    assert main([*words, "--trainer.max_steps", "6"]) == 0  # within the second epoch
    told.clear()
    assert main(words) == 0
    assert told == [(1, 4), (2, 4), (3, 4)], "also the epoch that a resumed run goes on with"
    assert steps(stopped) == steps(whole) and epochs(stopped) == epochs(whole)
    assert same_weights(weights(stopped), weights(whole)) and weights(whole)["task.ramp"] == 1
    assert set(steps(whole)[0]) == {"step", "epoch", "loss", "ce_student", "ce_teacher", "hint"}
    assert {"train/accuracy", "train/teacher_accuracy"} <= set(epochs(whole)[0])
    groups = torch.load(whole / "last.ckpt", weights_only=True)["optimizer_states"][0]["param_groups"]
    assert [group["weight_decay"] for group in groups] == [5e-3, 0.5]

    assert main([*words, "--task.weight", "4"]) == 1
    assert "task.init_args.weight was 3.0 and is 4.0" in capsys.readouterr().err
    out = tmp_path / "student.safetensors"
    assert main(["export", "--checkpoint", str(whole / "last.ckpt"), "--out", str(out)]) == 0
    assert load_file(out).keys() == ToyNet(10, width=5).state_dict().keys()
    images = torch.randn(2, 3, 16, 16)
    module = DistillationModule.load_from_checkpoint(whole / "last.ckpt", map_location="cpu", trust=True).eval()
    assert torch.equal(load_student(whole / "last.ckpt").student(images), module(images))


@pytest.mark.parametrize("suffix", [".safetensors", ".pt2"])
def test_the_student_of_a_task_is_what_is_exported(
    suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where it is another network than the one that `model.backbone` names."""
    settings = {
        "task": {"class_path": "test_any_task.TwinTask", "init_args": {"width": 6}},
        "model": {"backbone": "ToyNet"},
        "panels": {"enabled": True},
    }
    assert main([*small_recipe(tmp_path / "run", **settings), "--trainer.max_epochs", "2"]) == 0
    checkpoint, out = tmp_path / "run" / "last.ckpt", tmp_path / f"student{suffix}"
    assert "--out student.safetensors --trust" in capsys.readouterr().out
    module = DistillationModule.load_from_checkpoint(checkpoint, map_location="cpu", trust=True).eval()
    images = torch.randn(3, 3, 16, 16)
    expected = module(images)
    assert torch.equal(load_student(checkpoint, trust=True).student(images), expected)
    words = ["export", "--checkpoint", str(checkpoint), "--out", str(out)]
    assert main(words) == 1 and not out.exists()
    said = capsys.readouterr().err
    assert (
        "student is made by its task, test_any_task.TwinTask, so code that the file names would run; give --trust"
        in said
    )
    assert main([*words, "--trust"]) == 0
    if suffix == ".pt2":
        torch.testing.assert_close(torch.export.load(out).module()(images), expected)
    else:
        network = ToyNet(10, width=6)
        network.load_state_dict(load_file(out))
        assert torch.equal(network.eval()(images)[1], expected)
    named = load_student(checkpoint, backbone="ToyNet").student
    assert torch.equal(named(images), module.task.backbone(images)[1]), "the weights alone"


def test_panels_show_the_networks_that_a_task_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    matplotlib_figure = pytest.importorskip("matplotlib.figure")
    titles: list[str] = []
    save = matplotlib_figure.Figure.savefig

    def watched(figure: Any, *arguments: Any, **more: Any) -> None:
        titles.extend(axes.get_title() for axes in figure.axes)
        save(figure, *arguments, **more)

    monkeypatch.setattr(matplotlib_figure.Figure, "savefig", watched)
    for task, names in ((ToyTask(ToyNet()), ["student"]), (TwinTask(ToyNet()), ["student", "twin"])):
        titles.clear()
        assert draw_attention(task, torch.randn(1, 3, 16, 16), tmp_path / "attention.png") is not None
        assert titles == ["image", *(f"{name} {level}" for name in names for level in (1, 2))]


def test_a_task_gets_the_views_that_it_asks_for(tmp_path: Path) -> None:
    turned, upright = tmp_path / "turned", tmp_path / "upright"
    for folder, name in ((turned, "test_any_task.TurnedTask"), (upright, "toy_method.ToyTask")):
        settings: dict[str, Any] = {"task": {"class_path": name}, "model": {"backbone": "ToyNet"}}
        assert main([*small_recipe(folder, **settings), "--trainer.max_epochs", "2"]) == 0
    assert steps(turned) == steps(upright) and epochs(turned) == epochs(upright)


def test_views_that_the_data_crops_apart_are_not_turned_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without a shift they are those that the trainer turns."""
    runs = {}
    for crop_each_view in (False, True):
        folder = runs[crop_each_view] = tmp_path / str(crop_each_view)
        data = {"init_args": {"largest_shift": 0, "crop_each_view": crop_each_view}}
        turned: dict[str, Any] = {"task": {"class_path": "test_any_task.TurnedTask"}, "model": {"backbone": "ToyNet"}}
        assert main([*small_recipe(folder, data=data, **turned), "--trainer.max_epochs", "1"]) == 0
    assert steps(runs[True]) == steps(runs[False])
    words = small_recipe(tmp_path / "upright", task=PLAIN, data={"init_args": {"crop_each_view": True}})
    assert main(words) == 1
    assert "but ClassificationTask takes plain images; set it to false." in capsys.readouterr().err


def test_no_source_of_the_trainer_names_a_method_a_loss_or_a_task() -> None:
    """But for docstrings, which may say where a number comes from."""
    roots = {frskd_fast.losses, frskd_fast.tasks}
    names = {name for root in roots for name in root.__all__} - {"FrozenTeacher", "Student", "Task"}
    assert {"FRSKDLoss", "ClassificationTask", "build_frskd"} <= names
    backbone = wrn16x2(num_classes=10)
    tasks = [frskd_fast.tasks.build_frskd(backbone, "fit", "sla"), frskd_fast.tasks.ClassificationTask(backbone)]
    # Modules of a method, but for those that belong to the protocol or are called as a number of the loss is.
    names |= {name for task in tasks for name, _ in task.named_children()} - {"backbone", "loss"}
    assert "self_teacher" in names
    methods = set(recipe_names().values())
    assert {"frskd", "plain"} <= methods
    pattern = re.compile(rf"\b({'|'.join(sorted(names))})\b|\b({'|'.join(sorted(methods))})\b", re.IGNORECASE)
    assert len(SOURCES) > 20
    for path in SOURCES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node):
                node.body[0] = ast.Pass()
        code = ast.unparse(tree).replace("frskd-fast", "")
        found = pattern.search(code)
        assert found is None, f"{path.name} names {found and found[0]}"


def examples() -> dict[str, str]:
    """The YAML files of docs/training.md that build on the bundled images, by name."""
    blocks = [block.split("```")[0] for block in DOCUMENT.read_text(encoding="utf-8").split("```yaml\n")[1:]]
    named = {block.split(":")[0].removeprefix("# "): block for block in blocks}
    return {name: text for name, text in named.items() if yaml.safe_load(text)["base"] == "digits"}


@pytest.mark.parametrize("name", examples())
@pytest.mark.filterwarnings("error:.*[Ss]erializ")
def test_examples_of_the_guide_train(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each, interrupted and continued, ends where the uninterrupted run does."""
    monkeypatch.chdir(tmp_path)
    Path(name).write_text(examples()[name], encoding="utf-8")
    words = ["fit", "--config", name, "--model.backbone", "training_utils.SmallNet", "--data.batch_size", "25"]
    words += ["--trainer.max_epochs", "4", "--trainer.log_every_n_steps", "1", "--trainer.check_val_every_n_epoch", "1"]
    words += ["--checkpoint.every_n_epochs", "1", "--trainer.accelerator", "cpu", "--panels.enabled", "false"]
    words += ["--trainer.enable_progress_bar", "false", "--tensorboard", "false"]
    assert main([*words, "--run_dir", "whole"]) == 0
    # Lightning's StochasticWeightAveraging goes on exactly once it has begun to average.
    assert main([*words, "--run_dir", "stopped", "--trainer.max_steps", "13"]) == 0
    assert main([*words, "--run_dir", "stopped"]) == 0
    assert steps(Path("stopped")) == steps(Path("whole")) and len(steps(Path("whole"))) >= 4
    assert same_weights(weights(Path("stopped")), weights(Path("whole")))


def test_the_guide_shows_every_kind_of_example() -> None:
    shown = {name: yaml.safe_load(text) for name, text in examples().items()}
    callbacks = {
        entry["class_path"].rsplit(".", 1)[-1]
        for settings in shown.values()
        for entry in settings.get("trainer", {}).get("callbacks", [])
    }
    assert callbacks == {"EMAWeightAveraging", "StochasticWeightAveraging", "EarlyStopping"}
    assert any(settings.get("optimizer", {}).get("class_path") == "torch.optim.AdamW" for settings in shown.values())


def test_an_averaged_student_is_what_is_validated_and_exported(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    averaging = {"class_path": "lightning.pytorch.callbacks.EMAWeightAveraging", "init_args": {"decay": 0.9}}
    command_line = run("fit", small_recipe(folder, task=PLAIN, trainer={"callbacks": [averaging]})[1:])
    checkpoint = torch.load(folder / "last.ckpt", weights_only=True)
    averaged, current = checkpoint["state_dict"], checkpoint["current_model_state"]
    assert not same_weights(averaged, current)
    assert same_weights(averaged, {name: value.cpu() for name, value in command_line.model.state_dict().items()})
    student = load_student(folder / "last.ckpt", trust=True).student.state_dict()
    assert same_weights(student, {name.removeprefix("task."): value for name, value in averaged.items()})
    validated = run("validate", small_recipe(folder, task=PLAIN)[1:]).trainer.callback_metrics["validation/accuracy"]
    assert float(validated) == pytest.approx(float(epochs(folder)[-1]["validation/accuracy"]))


def test_a_run_that_was_stopped_early_is_finished(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stopping = {"class_path": "lightning.pytorch.callbacks.EarlyStopping", "init_args": {"monitor": "validation/loss"}}
    stopping["init_args"] |= {"patience": 1, "min_delta": 100.0}
    words = small_recipe(tmp_path / "run", task=PLAIN, trainer={"callbacks": [stopping]})
    assert main(words) == 0 and len(epochs(tmp_path / "run")) == 2
    capsys.readouterr()
    assert main(words) == 0 and len(epochs(tmp_path / "run")) == 2
    assert "is finished: 2 epochs, 8 steps. Early stopping ended it; --fresh" in capsys.readouterr().out


def test_another_class_on_the_command_line_drops_the_recipes_arguments() -> None:
    """AdamW with the learning rate of SGD would be a trap; the same class under its short name keeps them."""
    for word, kept in (("AdamW", False), ("SGD", True), ("torch.optim.SGD", True), ("null", True)):
        settings = json.loads(expanded(["--optimizer", word])[0][1])
        assert ("init_args" in settings["optimizer"]) == kept, word
    assert expanded(["--task=mine.Task", "--task.beta", "3"])[0][2:] == ["--task", "mine.Task", "--task.beta", "3"]


def test_schedules_by_steps_and_by_plateaus(tmp_path: Path) -> None:
    rate = {"class_path": "torch.optim.lr_scheduler.ExponentialLR", "init_args": {"gamma": 0.5}}
    by_steps = small_recipe(tmp_path / "steps", task=PLAIN, lr_scheduler=rate, model={"lr_interval": "step"})
    assert main([*by_steps, "--trainer.max_epochs", "2"]) == 0
    assert [float(row["learning_rate"]) for row in epochs(tmp_path / "steps")] == [0.05 / 2**3, 0.05 / 2**7]
    plateau = {"class_path": "torch.optim.lr_scheduler.ReduceLROnPlateau"}
    plateau["init_args"] = {"mode": "max", "patience": 0, "threshold": 100.0}  # type: ignore[assignment]
    monitored = {"lr_monitor": "validation/accuracy"}
    assert main(small_recipe(tmp_path / "plateau", task=PLAIN, lr_scheduler=plateau, model=monitored)) == 0
    rates = [float(row["learning_rate"]) for row in epochs(tmp_path / "plateau")]
    assert rates == pytest.approx([0.05, 0.05, 0.005, 0.0005])


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"model": {"beta": 50}}, "arguments are --task.beta and the like (in a YAML file task.class_path and"),
        ({"model": {"method": "plain"}}, "model.method is no setting of the model. The method is --task, and its"),
        ({"model": {"learning_rate": 1}}, "weight decay are --optimizer.lr, --optimizer.momentum and"),
    ],
)
def test_settings_of_earlier_versions_are_named(
    settings: dict[str, Any], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(small_recipe(tmp_path / "run", **settings)) == 1
    assert sentence in capsys.readouterr().err
    ((key, value),) = settings["model"].items()
    for words in ([f"--model.{key}", str(value)], [f"--model.{key}={value}"]):
        assert main(["fit", "--run_dir", str(tmp_path / "run"), *words]) == 1
        assert sentence in capsys.readouterr().err


def test_a_run_of_an_earlier_version_is_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its config.yaml had the method's arguments under `model`."""
    folder = tmp_path / "run"
    words = small_run(folder, task=PLAIN, trainer__max_epochs=1)
    assert main(words) == 0
    earlier = {"seed_everything": 10, "model": {"method": "plain", "schedule": "cosine"}, "trainer": {"max_epochs": 1}}
    (folder / "config.yaml").write_text(yaml.safe_dump(earlier), encoding="utf-8")
    before = (folder / "last.ckpt").read_bytes()
    assert main(words) == 1
    error = capsys.readouterr().err
    assert "holds a run of an earlier version of frskd_fast" in error and "--fresh to begin anew" in error
    assert (folder / "last.ckpt").read_bytes() == before


def test_settings_build_what_they_contain() -> None:
    inner = {"class_path": "fractions.Fraction", "init_args": {"numerator": 3}}
    assert build({"class_path": "builtins.dict", "init_args": None}) == {}
    made = build({"class_path": "builtins.dict", "init_args": {"one": inner, "many": [inner, 1]}})
    assert made == {"one": 3, "many": [3, 1]} and type(made["one"]).__name__ == "Fraction"
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    assert build(f"{SCHEDULES}.cosine", optimizer, max_epochs=7).T_max == 7
    own = {"class_path": f"{SCHEDULES}.cosine", "init_args": {"max_epochs": 3}}
    assert build(own, optimizer, max_epochs=7).T_max == 3
    assert build("torch.optim.lr_scheduler.ConstantLR", optimizer, max_epochs=7).factor == pytest.approx(1 / 3)


def test_recipes_name_their_parts_by_class() -> None:
    for name in recipe_names():
        settings = recipe(name)
        assert {"class_path"} <= settings["task"].keys() & settings["optimizer"].keys() & settings["data"].keys()


class MeasuringTask(ToyTask):
    """Measures how many of the rotated images it takes for what they are, from the passes that give its output."""

    def evaluate(self, images: Tensor, targets: Tensor) -> dict[str, Tensor]:
        assert not self.training and not torch.is_grad_enabled()
        output = self(rotate4(images))["output"]
        return {"output": output[::4], **rotation_accuracies(output, [output.repeat(1, 4)], targets)}


def test_a_task_may_measure_more_than_accuracy(tmp_path: Path) -> None:
    """Means over images, also where the last batch is a smaller one."""
    plain, more = tmp_path / "plain", tmp_path / "more"
    settings: dict[str, Any] = {"model": {"backbone": "ToyNet"}, "data": {"init_args": {"evaluation_batch_size": 170}}}
    for folder, task in ((plain, "toy_method.ToyTask"), (more, "test_any_task.MeasuringTask")):
        words = small_recipe(folder, task={"class_path": task}, **settings)
        assert main([*words, "--trainer.max_epochs", "1"]) == 0
    names = {"rotation_class_accuracy", "rotation_class_accuracy_1", "joint_accuracy_1"}
    (before,), (row,) = epochs(plain), epochs(more)
    assert {name: row[name] for name in before} == before
    assert row.keys() - before.keys() == {f"validation/{name}" for name in names}
    module = DistillationModule.load_from_checkpoint(more / "last.ckpt", map_location="cpu", trust=True).eval()
    data = DigitsData(as_rgb=True, evaluate_on="test", evaluation_batch_size=2000)
    images, targets = data.on_after_batch_transfer(next(iter(data.test_dataloader())))
    classes = module(rotate4(images)).argmax(1).view(-1, 4)
    expected = (classes == targets[:, None]).double().mean()
    assert float(row["validation/rotation_class_accuracy"]) == pytest.approx(float(expected))
