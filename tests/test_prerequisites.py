"""A run that a recipe needs is found, or trained first, or named: the two stages of methods with a trained teacher."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("lightning")
pytest.importorskip("jsonargparse")
pytest.importorskip("sklearn")

from lightning.pytorch import Trainer
from toy_method import ToyNet, ToyTask
from training_utils import PLAIN, epochs, small_run, steps, weights

from frskd_fast.models import create_model
from frskd_fast.tasks import FrozenTeacher
from frskd_fast.training.cli import expanded, main
from frskd_fast.training.data import DigitsData
from frskd_fast.training.module import DistillationModule
from frskd_fast.training.prerequisites import split_off
from frskd_fast.training.recipe_files import NEEDED, RecipeError, recipe


class TaughtTask(ToyTask):
    """A method whose teacher comes from a run."""

    def __init__(self, backbone: nn.Module, teacher: str, weight: float = 1.0) -> None:
        super().__init__(backbone, weight=weight)
        network = ToyNet(self.backbone.num_classes)
        state = weights(Path(teacher))
        network.load_state_dict({name.removeprefix("task.backbone."): value for name, value in state.items()})
        self.teacher = FrozenTeacher(network, teacher)
        self.head.requires_grad_(False)


def write(folder: Path, name: str, **settings: Any) -> str:
    """A recipe file of a short run on the bundled images, without a folder of its own."""
    small_run(folder / "small")
    base = json.loads((folder / "small.yaml").read_text(encoding="utf-8"))
    settings = {**base, "trainer": {**base["trainer"], "max_epochs": 2}, "model": {"backbone": "ToyNet"}, **settings}
    settings["data"] = {"init_args": {"batch_size": 25}}
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps({key: value for key, value in settings.items() if key != "run_dir"}), encoding="utf-8")
    return str(path)


@pytest.fixture
def recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, str]:
    """A student's recipe, which names the teacher's, and the teacher's."""
    monkeypatch.chdir(tmp_path)
    teacher = write(tmp_path, "expert", task={"class_path": PLAIN})
    task = {"class_path": "test_prerequisites.TaughtTask", "init_args": {"weight": 2.0}}
    return write(tmp_path, "pupil", task=task, teacher="expert.yaml"), teacher


def test_one_command_trains_the_teacher_and_then_the_student(
    recipes: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    student, teacher = recipes
    assert main(["fit", "--config", student]) == 0
    expert, pupil = Path("runs/expert"), Path("runs/pupil")
    assert len(epochs(expert)) == len(epochs(pupil)) == 2
    assert "needs the teacher of a run by " in capsys.readouterr().out
    before = (expert / "last.ckpt").read_bytes()
    # The same as one after the other by hand, to the bit; the teacher that is there is taken as it is.
    assert main(["fit", "--config", teacher, "--run_dir", "by_hand/expert"]) == 0
    assert steps(Path("by_hand/expert")) == steps(expert)
    given = ["fit", "--config", student, "--task.teacher", "by_hand/expert"]
    assert main([*given, "--run_dir", "by_hand/pupil"]) == 0
    assert steps(Path("by_hand/pupil")) == steps(pupil)
    capsys.readouterr()
    again = ["fit", "--config", student, "--run_dir", "runs/other", "--task.weight", "3", "--seed_everything", "4"]
    assert main([*again, "--no-prerequisites"]) == 0
    assert "The teacher of this run: runs/expert, finished after 2 epochs." in capsys.readouterr().out
    assert (expert / "last.ckpt").read_bytes() == before and steps(Path("runs/other")) != steps(pupil)
    assert main(["validate", "--config", student]) == 0


def test_an_interrupted_teacher_goes_on(recipes: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    student, teacher = recipes
    assert main(["fit", "--config", teacher, "--trainer.max_steps", "3"]) == 0
    # Its settings in the folder are those of the longer run that was stopped.
    config = Path("runs/expert/config.yaml")
    config.write_text(config.read_text(encoding="utf-8").replace("max_steps: 3", "max_steps: -1"), encoding="utf-8")
    assert main(["fit", "--config", student]) == 0
    assert "The run in runs/expert goes on after step 3" in capsys.readouterr().out
    assert len(epochs(Path("runs/expert"))) == len(epochs(Path("runs/pupil"))) == 2


def test_what_has_to_be_run_is_said(recipes: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    student, _ = recipes
    for words, why in (
        (["fit", "--no-prerequisites", "--data.evaluation_batch_size", "20"], "With --no-prerequisites"),
        (["fit", "--trainer.fast_dev_run", "1", "--data.evaluation_batch_size=20"], "A fast_dev_run does not train it"),
        (["validate", "--data.evaluation_batch_size", "20"], "frskd-fast validate trains nothing"),
    ):
        assert main([words[0], "--config", student, *words[1:]]) == 1
        said = capsys.readouterr().err
        assert f"but runs/expert holds no finished one. {why}: run `frskd-fast fit --config " in said
        assert (
            "expert.yaml --run_dir runs/expert --data.evaluation_batch_size" in said
            and "give --task.teacher a path." in said
        )
    # Wrong settings are said before anything is trained.
    with pytest.raises(SystemExit):
        main(["fit", "--config", student, "--task.wait", "3"])
    assert not Path("runs").exists()


def test_weights_of_a_run_start_another_one(recipes: tuple[str, str], tmp_path: Path) -> None:
    """The second of three stages: a probe of what the first has learnt."""
    task = {"class_path": "frskd_fast.tasks.LinearProbeTask"}
    probe = write(tmp_path, "probe", task=task, weights="expert.yaml")
    assert main(["fit", "--config", probe]) == 0
    before, after = weights(Path("runs/expert")), weights(Path("runs/probe"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"task.backbone.fc.weight", "task.backbone.fc.bias"}


@pytest.mark.parametrize(
    "task",
    [
        {"class_path": "frskd_fast.tasks.LinearProbeTask"},
        {"class_path": "frskd_fast.tasks.SSKDHeadTask"},
        {"class_path": "frskd_fast.tasks.HSAKDTeacherTask", "init_args": {"freeze_backbone": True}},
    ],
    ids=lambda task: task["class_path"].rpartition(".")[2],
)
def test_frozen_random_weights_are_refused(task: dict[str, Any], tmp_path: Path) -> None:
    """Those of a backbone without weights, and those of a classifier for other classes."""
    data = DigitsData(as_rgb=True)
    trainer = Trainer(
        fast_dev_run=1, accelerator="cpu", enable_progress_bar=False, enable_model_summary=False, logger=False
    )
    with pytest.raises(
        ValueError, match=r"weights is None, but \w+ freezes parameters of the backbone.*give model.weights"
    ):
        trainer.fit(DistillationModule(10, task, "resnet8"), data)

    for classes in (10, 7):
        torch.save(create_model("resnet8", classes).state_dict(), tmp_path / f"{classes}.pth")
    module = DistillationModule(10, task, "resnet8", weights=str(tmp_path / "10.pth"))
    trainer.fit(module, data)
    # From a checkpoint, which holds the weights, it goes on without the file.
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    trainer.fit(DistillationModule.load_from_checkpoint(tmp_path / "run.ckpt"), data)
    trainer.fit(DistillationModule(10, task, "resnet8"), data, ckpt_path=str(tmp_path / "run.ckpt"))
    if "Probe" in task["class_path"]:  # it trains the classifier
        trainer.fit(DistillationModule(10, task, "resnet8", weights=str(tmp_path / "7.pth")), data)
    else:
        with pytest.raises(ValueError, match=r"7.pth\) are those of a network for other classes.*would stay random"):
            DistillationModule(10, task, "resnet8", weights=str(tmp_path / "7.pth"))


def test_a_network_from_elsewhere_may_bring_its_weights() -> None:
    """Whoever made it knows."""
    task = "frskd_fast.tasks.LinearProbeTask"
    assert DistillationModule(10, task, "resnet8").needs_weights
    assert not DistillationModule(10, task, "training_utils.SmallNet").needs_weights
    assert not DistillationModule(10, "frskd_fast.tasks.ClassificationTask", "resnet8").needs_weights


def test_what_no_term_of_the_loss_reaches_may_stay_random() -> None:
    task = {"class_path": "frskd_fast.tasks.FRSKDSegmentationTask", "init_args": {"alpha": 0.0}}
    module = DistillationModule(4, task, "resnet8")
    assert module.task.unused_parameters() and not module.needs_weights


def split(settings: dict[str, Any], *words: str) -> tuple[dict[str, Any], list[Any]]:
    """The settings with paths in place, and what is needed."""
    result, needed, _ = split_off(["--config", json.dumps(settings), *words], "mine")
    return json.loads(result[1]), needed


def test_what_is_handed_on(tmp_path: Path) -> None:
    """The data's options only to a run on the same data; nothing that says what is trained."""
    same = {"data": recipe("cifar100_resnet18_plain")["data"], "teacher": "cifar100_resnet18_plain"}
    other = {"data": recipe("imagenet_resnet18_plain")["data"], "teacher": "cifar100_resnet18_plain"}
    words = ["--data.root", "D", "--trainer.devices=2", "--trainer.max_epochs", "3", "--optimizer.lr", "1", "--fresh"]
    words += ["--data.batch_size", "4"]
    words += [
        "--data.init_args.workers=1",
        "--seed_everything",
        "3",
        "--run_dir",
        str(tmp_path / "r"),
        "--model.compile",
        "1",
    ]
    settings, (needed,) = split(same, *words)
    assert needed.words == ("--data.root", "D", "--trainer.devices=2", "--data.init_args.workers=1")
    assert needed.folder == tmp_path / "cifar100_resnet18_plain"
    assert settings["task"]["init_args"]["teacher"] == str(needed.folder) and "teacher" not in settings
    assert split(other, *words)[1][0].words == ("--trainer.devices=2",)


def test_what_a_user_gives_comes_first() -> None:
    needing = {"task": "some.Task", "teacher": "cifar100_resnet18_plain", "weights": "cifar100_wrn16x2_plain"}
    settings, needed = split(needing)
    assert settings["task"] == {"class_path": "some.Task", "init_args": {"teacher": "runs/cifar100_resnet18_plain"}}
    assert settings["model"] == {"weights": "runs/cifar100_wrn16x2_plain/last.ckpt"}
    assert [one.kind for one in needed] == ["teacher", "weights"]
    settings, needed = split(needing, "--task.teacher=mine.pth", "--model.weights", "other.pth")
    assert needed == [] and settings == {"task": "some.Task"}
    settings, (expert,) = split({"task": "some.Task", "expert": "cifar100_resnet18_plain"})
    assert settings == {"task": {"class_path": "some.Task", "init_args": {"expert": str(expert.folder)}}}
    own = {**needing, "task": {"class_path": "some.Task", "init_args": {"teacher": "mine.pth"}}, "weights": None}
    assert split(own)[1] == []


def test_another_task_needs_no_teacher(recipes: tuple[str, str]) -> None:
    words, _ = expanded(["--config", recipes[0], "--task", PLAIN])
    assert split_off(words, "mine")[1] == []


def test_circles_and_unknown_recipes_are_sentences(tmp_path: Path) -> None:
    for name, needs in (("one", "two.yaml"), ("two", "one.yaml"), ("three", "nowhere")):
        (tmp_path / f"{name}.yaml").write_text(f"teacher: {needs}\n", encoding="utf-8")
    with pytest.raises(RecipeError, match=r"needs a run of itself first: .*two.yaml -> .*one.yaml -> .*two.yaml"):
        split(recipe(str(tmp_path / "one.yaml")))
    with pytest.raises(RecipeError, match="The recipe 'nowhere' is neither a file nor"):
        split(recipe(str(tmp_path / "three.yaml")))


def shortened(name: str, folder: Path) -> str:
    """A recipe file of two steps by a recipe of the package, and of those that it needs."""
    # The number 1 would be read as 1.0, all batches.
    trainer = {"max_epochs": 1, "limit_train_batches": 2, "limit_val_batches": 2, "check_val_every_n_epoch": 1}
    trainer |= {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    settings: dict[str, Any] = {"base": name, "trainer": trainer, "panels": {"enabled": False}, "tensorboard": False}
    settings["data"] = {"init_args": {"batch_size": 4, "evaluation_batch_size": 4}}
    for kind in NEEDED:
        if recipe(name).get(kind) is not None:
            settings[kind] = Path(shortened(recipe(name)[kind], folder)).name
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps(settings), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(
    ("name", "before"),
    [
        ("digits_kd", ["digits_resnet20_plain"]),
        ("digits_adain", ["digits_resnet20_plain"]),
        ("digits_hsakd", ["digits_hsakd_teacher"]),
        ("digits_sskd", ["digits_resnet20_plain", "digits_sskd_head"]),
        ("digits_collaborative", ["digits_resnet20_plain"]),
    ],
)
def test_stages_on_the_bundled_images(
    name: str, before: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each run takes up what the one before has left; its student validates and can be exported."""
    monkeypatch.chdir(tmp_path)
    words = ["--config", shortened(name, tmp_path)]
    assert main(["fit", *words]) == 0
    assert sorted(path.name for path in Path("runs").iterdir()) == sorted([*before, name])
    for run in before[1:]:  # the head stands on the backbone that was trained before it
        earlier, later = weights(Path("runs") / before[0]), weights(Path("runs") / run)
        assert torch.equal(earlier["task.backbone.conv1.weight"], later["task.net.backbone.conv1.weight"])
    capsys.readouterr()
    assert main(["validate", *words]) == 0 and "finished after 1 epochs." in capsys.readouterr().out
    assert main(["export", "--checkpoint", f"runs/{name}/last.ckpt", "--out", "student.safetensors"]) == 0
