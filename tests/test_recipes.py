"""Every recipe of the package resolves, prints its settings and trains one batch of synthetic files of the right format."""

from __future__ import annotations

import inspect
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lightning")
pytest.importorskip("jsonargparse")
pytest.importorskip("sklearn")

import data_files
import yaml
from training_utils import process

from frskd_fast.models import create_model
from frskd_fast.models.registry import imported
from frskd_fast.training import recipe_files
from frskd_fast.training.class_paths import arguments_in, class_path
from frskd_fast.training.cli import main, run
from frskd_fast.training.module import DistillationModule
from frskd_fast.training.prerequisites import split_off
from frskd_fast.training.recipe_files import HANDED_TO_TASK, RecipeError, merged, recipe, recipe_names, recipe_text

WRITERS = {
    "cifar10": data_files.write_cifar10,
    "cifar100": data_files.write_cifar100,
    "tinyimagenet": data_files.write_tiny_imagenet,
    "cub200": data_files.write_cub200,
    "mit67": data_files.write_mit67,
    "stanford40": data_files.write_stanford40,
    "dogs": data_files.write_dogs,
    "imagenet": data_files.write_image_folder,
    "stl10": data_files.write_stl10,
    "voc": data_files.write_voc,
}
CLASSES = {
    "cifar10": 10,
    "cifar100": 100,
    "tinyimagenet": 200,
    "cub200": 200,
    "mit67": 67,
    "stanford40": 40,
    "dogs": 120,
    "imagenet": 1000,
    "stl10": 10,
    "digits": 10,
    "voc": 21,
    "digit": 11,
}
# What the issue asks for, by name.
WANTED = (
    {f"cifar100_{net}_{method}" for net in ("resnet18", "wrn16x2") for method in (
        "plain", "frskd", "frskd_sla", "frskd_mixup", "frskd_cutmix", "frskd_fit", "frskd_od")}
    | {f"{data}_resnet18_{method}" for data in ("tinyimagenet", "cub200", "mit67", "stanford40", "dogs") for method in (
        "plain", "frskd", "frskd_sla")}
    | {f"imagenet_resnet{depth}_{method}" for depth in (18, 34) for method in ("plain", "frskd")}
    | {"digits", "digits_kd", "digits_sskd", "digits_hsakd", "digits_hsakd_online", "digits_adain", "digits_collaborative"}
    | {f"cifar{classes}_wrn_40_{width}_wrn_16_{width}_collaborative" for classes in (10, 100) for width in (1, 2)}
    | {f"cifar100_{net}_hsakd_online" for net in (
        "wrn_40_2", "wrn_40_1", "resnet56", "resnet32x4", "vgg13", "mobilenetv2", "shufflenetv1", "shufflenetv2")}
    | {f"cifar100_resnet56_resnet20_hsakd_{share}percent" for share in (25, 50, 75)}
    | {"imagenet_resnet34_resnet18_hsakd", "imagenet_resnet34_resnet18_hsakd_joint", "imagenet_resnet18_hsakd_online"}
    | {"cifar10_resnet32_ffl", "cifar100_resnet32_ffl", "digits_ffl"}
    | {f"voc_efficientdet_d{compound}_{method}" for compound in (0, 1) for method in ("plain", "frskd")}
    | {"digit_scenes_plain", "digit_scenes_frskd"}
    | {"stl10_mobilenetv2_hsakd_probe", "tinyimagenet_mobilenetv2_hsakd_probe"}
)  # fmt: skip


# Teacher and student of every published pair, and the names of the networks whose learning rate is 0.01.
SSKD_PAIRS = (
    "wrn_40_2 wrn_16_2, wrn_40_2 wrn_40_1, resnet56 resnet20, resnet32x4 resnet8x4, vgg13 vgg8, vgg13 mobilenetv2, "
    "cifar_resnet50 mobilenetv2, cifar_resnet50 vgg8, resnet32x4 shufflenetv1, resnet32x4 shufflenetv2, wrn_40_2 shufflenetv1"
)
HSAKD_PAIRS = (
    "wrn_40_2 wrn_16_2, wrn_40_2 wrn_40_1, resnet56 resnet20, resnet32x4 resnet8x4, vgg13 mobilenetv2, "
    "cifar_resnet50 mobilenetv2, wrn_40_2 shufflenetv1, resnet32x4 shufflenetv2"
)
SMALL_STEPS = ("mobilenetv2", "shufflenetv1", "shufflenetv2")


def pairs(text: str) -> list[tuple[str, str]]:
    return [(teacher, student) for teacher, student in (pair.split() for pair in text.split(", "))]


def representatives() -> list[str]:
    """Recipes that together have every task, with every set of arguments, and every kind of data; small networks first."""
    found, seen = [], set()
    large = ("imagenet", "resnet50", "vgg13", "resnet32x4")
    for name in sorted(recipe_names(), key=lambda name: (any(word in name for word in large), name)):
        settings = recipe(name)
        arguments = settings["data"].get("init_args", {})
        task = (settings["task"]["class_path"], *settings["task"].get("init_args", {}))
        data = (settings["data"]["class_path"], *(arguments.get(key) for key in ("layout", "crop_each_view")))
        if task not in seen or data not in seen:
            found.append(name)
        seen |= {task, data}
    return found


@pytest.fixture(scope="session")
def roots(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny data set of each format."""
    folder = tmp_path_factory.mktemp("data")
    written = {}
    for name, write in WRITERS.items():
        (folder / name).mkdir()
        written[name] = Path(write(folder / name))
    return written


def untrained(name: str, folder: Path) -> Path:
    """The folder of a run by a recipe that has not learnt anything, as far as a run that needs it looks."""
    settings = recipe(name)
    module = DistillationModule(CLASSES[name.split("_")[0]], settings["task"], **settings["model"])
    (folder / name).mkdir()
    torch.save(
        {"hyper_parameters": dict(module.hparams), "state_dict": module.state_dict()}, folder / name / "last.ckpt"
    )
    return folder / name


def dry_run(name: str, roots: dict[str, Path], folder: Path) -> object:
    data = name.split("_")[0]
    words = ["--config", name, "--trainer.fast_dev_run", "1", "--trainer.accelerator", "cpu"]
    words += ["--data.batch_size", "2", "--data.evaluation_batch_size", "2"]
    words += ["--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"]
    if data in WRITERS:
        words += ["--data.root", str(roots[data]), "--data.workers", "0"]
    settings = recipe(name)
    for kind in HANDED_TO_TASK:
        if settings.get(kind) is not None:
            words += [f"--task.{kind}", str(untrained(settings[kind], folder))]
    if settings["data"]["class_path"].endswith("ImageFolderData") and settings["model"]["backbone"] == "resnet18":
        words += ["--data.image_size", "64"]
    if data == "voc":
        words += ["--data.crop_size", "64"]
    if settings.get("weights") is not None:
        network = create_model(settings["model"]["backbone"], CLASSES[settings["weights"].split("_")[0]])
        torch.save(network.state_dict(), folder / "weights.pth")
        words += ["--model.weights", str(folder / "weights.pth")]
    return run("fit", words)


@pytest.mark.parametrize("name", representatives())
@pytest.mark.filterwarnings("ignore")  # few classes and images are what the synthetic sets are about
def test_recipe_trains_one_batch(name: str, roots: dict[str, Path], tmp_path: Path) -> None:
    """The settings with a batch of 2 and small images, from the reader to the optimiser's step and a validation batch."""
    command_line = dry_run(name, roots, tmp_path)
    assert command_line.trainer.state.finished and command_line.trainer.global_step == 1
    task = recipe(name)["task"]["class_path"].rsplit(".", 1)[-1]
    module = command_line.model
    assert module.hparams.num_classes == CLASSES[name.split("_")[0]]
    assert type(module.task).__name__ == {"build_frskd": "FRSKDTask"}.get(task, task)
    assert 0 <= command_line.trainer.callback_metrics[f"validation/{module.evaluation.score}"] <= 1


@pytest.mark.parametrize("name", representatives())
def test_recipe_prints_its_settings(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as status:
        main(["fit", "--config", name, "--print_config"])
    assert status.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    wanted = recipe(name)
    for part in ("model", "trainer"):
        for key, value in wanted[part].items():
            assert printed[part][key] == value, f"{part}.{key}"
    for part in ("task", "optimizer", "lr_scheduler", "data"):
        assert printed[part]["class_path"] == wanted[part]["class_path"]
        for key, value in wanted[part].get("init_args", {}).items():
            assert printed[part]["init_args"][key] == value, f"{part}.{key}"


@pytest.mark.parametrize("name", recipe_names())
def test_recipe_fits_together(name: str) -> None:
    """Every network can be made, every class takes the arguments, and what is needed has a recipe."""
    settings = recipe(name)
    with torch.device("meta"):
        network = create_model(settings["model"]["backbone"], 10, **settings["model"].get("backbone_args", {}))
    for part in ("task", "data", "optimizer", "lr_scheduler"):
        signature = inspect.signature(imported(class_path(settings[part])))
        takes_more = any(one.kind is one.VAR_KEYWORD for one in signature.parameters.values())
        assert takes_more or arguments_in(settings[part]).keys() <= signature.parameters.keys(), part
    trainer = settings["trainer"]
    assert trainer["max_epochs"] % trainer.get("check_val_every_n_epoch", 1) == 0, (
        "the last epoch would not be validated"
    )
    _, needed, _ = split_off(["--config", json.dumps(settings)], name)
    taken = inspect.signature(imported(class_path(settings["task"]))).parameters.keys() & set(HANDED_TO_TASK)
    assert {one.kind for one in needed} - {"weights"} == taken or recipe_names()[name] == "frskd"
    for one in needed:
        others = recipe(one.recipe)["model"]
        with torch.device("meta"):
            other = create_model(others["backbone"], 10, **others.get("backbone_args", {}))
        # A head for each map: teacher and student are compared head by head, and weights are those of the same network.
        assert len(other.channels) == len(network.channels) or recipe_names()[name] not in ("hsakd", "collaborative")
        assert one.kind != "weights" or others["backbone"] == settings["model"]["backbone"]


def optimizer_of(name: str) -> dict[str, Any]:
    """The arguments; every recipe here trains by SGD with momentum 0.9."""
    settings = recipe(name)["optimizer"]
    arguments = dict(settings["init_args"])
    assert settings["class_path"] == "torch.optim.SGD" and arguments.pop("momentum") == 0.9, name
    arguments.setdefault("nesterov", False)
    return arguments


def step_of(network: str) -> float:
    """The learning rate on CIFAR-100."""
    return 0.01 if network in SMALL_STEPS else 0.05


def schedule_of(name: str) -> tuple[int, list[int]]:
    """Epochs, and after which of them the learning rate falls to a tenth."""
    settings = recipe(name)
    schedule = settings["lr_scheduler"]["init_args"]
    assert schedule["gamma"] == 0.1, name
    return settings["trainer"]["max_epochs"], schedule["milestones"]


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize(("teacher", "student"), pairs(HSAKD_PAIRS))
def test_pairs_of_hsakd(teacher: str, student: str, joint: bool) -> None:
    name = f"cifar100_{teacher}_{student}_hsakd" + "_joint" * joint
    settings = recipe(name)
    assert settings["model"]["backbone"] == student
    assert optimizer_of(name) == {"lr": step_of(student), "weight_decay": 5e-4, "nesterov": True}
    assert schedule_of(name) == (240, [150, 180, 210])
    heads = recipe(settings["teacher"])
    assert heads["model"]["backbone"] == teacher
    assert optimizer_of(settings["teacher"]) == {"lr": 0.05, "weight_decay": 5e-4, "nesterov": True}
    assert schedule_of(settings["teacher"]) == ((240, [150, 180, 210]) if joint else (100, [30, 60, 90]))
    assert heads.get("weights") == (None if joint else f"cifar100_{teacher}_plain")
    assert heads["task"].get("init_args", {}) == ({} if joint else {"freeze_backbone": True})
    for one in (settings, heads):
        check_hsakds_images(one)


def check_hsakds_images(settings: dict[str, Any]) -> None:
    """64 images, of which the trainer makes the four views."""
    data = settings["data"]["init_args"]
    assert (data["batch_size"], data.get("crop_each_view", False)) == (64, False)
    assert (data["mean"], data["std"]) == ([0.5071, 0.4867, 0.4408], [0.2675, 0.2565, 0.2761])


ONLINE = [name for name in recipe_names() if name.startswith("cifar100_") and name.endswith("_hsakd_online")]


@pytest.mark.parametrize("name", ONLINE)
def test_online_pairs_of_hsakd(name: str) -> None:
    settings = recipe(name)
    network = settings["model"]["backbone"]
    assert name == f"cifar100_{network}_hsakd_online" and len(ONLINE) == 8
    assert optimizer_of(name) == {"lr": step_of(network), "weight_decay": 5e-4, "nesterov": True}
    assert schedule_of(name) == (240, [150, 180, 210])
    check_hsakds_images(settings)


@pytest.mark.parametrize("name", [name for name in recipe_names() if name.startswith("imagenet_") and "hsakd" in name])
def test_imagenet_of_hsakd(name: str) -> None:
    assert optimizer_of(name) == {"lr": 0.1, "weight_decay": 1e-4, "nesterov": False}
    assert schedule_of(name) == (100, [30, 60, 90])
    data = recipe(name)["data"]["init_args"]
    assert data["batch_size"] == 256 and not data.get("crop_each_view", False)


@pytest.mark.parametrize("name", [name for name in recipe_names() if name.endswith("_probe")])
def test_linear_probes_of_hsakd(name: str) -> None:
    assert optimizer_of(name) == {"lr": 0.1, "weight_decay": 0.0, "nesterov": True}
    assert schedule_of(name) == (100, [30, 60, 90])
    assert recipe(name)["data"]["init_args"]["batch_size"] == 64


@pytest.mark.parametrize(("teacher", "student"), pairs(SSKD_PAIRS))
def test_pairs_of_sskd(teacher: str, student: str) -> None:
    name = f"cifar100_{teacher}_{student}_sskd"
    settings = recipe(name)
    assert settings["model"] == {"backbone": student}
    assert optimizer_of(name) == {"lr": step_of(student), "weight_decay": 5e-4, "nesterov": False}
    assert schedule_of(name) == (240, [150, 180, 210])
    head = recipe(settings["teacher"])
    assert head["model"] == {"backbone": teacher} and head["weights"] == f"cifar100_{teacher}_plain"
    assert optimizer_of(settings["teacher"]) == {"lr": 0.05, "weight_decay": 5e-4, "nesterov": False}
    assert schedule_of(settings["teacher"]) == (60, [30, 45])
    for network, one in ((teacher, recipe(head["weights"])), (student, recipe(f"cifar100_{student}_plain"))):
        assert one["model"] == {"backbone": network} and one["trainer"]["max_epochs"] == 240
        assert one["optimizer"]["init_args"]["lr"] == step_of(network)
    for one in (settings, head):
        data = one["data"]["init_args"]
        assert data["crop_each_view"] and data["batch_size"] == 64
        assert (data["mean"], data["std"]) == ([0.5071, 0.4866, 0.4409], [0.2675, 0.2565, 0.2761])


def published() -> dict[str, str]:
    """The accuracy of each recipe of a pair, of its teachers and of its student alone, from docs/methods/index.md."""
    text = (Path(__file__).parents[1] / "docs" / "methods" / "index.md").read_text("utf-8")
    found: dict[str, str] = {}
    for row in re.findall(r"^\| (\w+) \| (\w+) \| (\d.*) \|$", text, re.MULTILINE):
        teacher, student, *figures = *row[:2], *row[2].split(" | ")
        pair = f"cifar100_{teacher}_{student}"
        if len(figures) == 3:
            names = [f"cifar100_{teacher}_plain", f"cifar100_{student}_plain", f"{pair}_sskd"]
        else:
            alone = "cifar100_mobilenetv2_stem1_plain" if student == "mobilenetv2" else f"{pair}_hsakd without"
            names = [f"cifar100_{teacher}_hsakd_teacher", f"cifar100_{teacher}_hsakd_joint_teacher", alone]
            names += [f"{pair}_hsakd", f"{pair}_hsakd_joint"]
        for name, figure in zip(names, figures, strict=True):
            assert found.setdefault(name, figure) == figure, name
    (online,) = re.findall(r"^\| online pair, CIFAR-100 \|.*\| (.*) \|$", text, re.MULTILINE)
    for one in online.split(", "):
        network, figure = one.split()
        found[f"cifar100_{network}_hsakd_online"] = figure
    (few,) = re.findall(r"^\| part of the labels, CIFAR-100 \|.*\| ([\d., ]+) with", text, re.MULTILINE)
    for share, figure in zip((25, 50, 75), few.split(", "), strict=True):
        found[f"cifar100_resnet56_resnet20_hsakd_{share}percent"] = figure
    (stl10, tinyimagenet) = re.findall(
        r"^\| linear probe \|.*\| STL-10 ([\d.]+), TinyImageNet ([\d.]+) \|$", text, re.M
    )[0]
    return {
        **found,
        "stl10_mobilenetv2_hsakd_probe": stl10,
        "tinyimagenet_mobilenetv2_hsakd_probe": tinyimagenet,
    }


def test_headers_have_the_published_accuracies() -> None:
    tables = published()
    assert len(tables) > 60
    for name, figure in tables.items():
        recipe_name, without, _ = name.partition(" without")
        header = "".join(re.findall(r"^#(.*)$", recipe_text(recipe_name)[0], re.MULTILINE))
        figures = re.findall(r"(\d\d\.\d\d) %", header.partition("Should reach: ")[2])
        assert figures[1 if without else 0] == figure, name


@pytest.mark.parametrize("classes", [10, 100])
def test_settings_of_ffl(classes: int) -> None:
    settings = recipe(f"cifar{classes}_resnet32_ffl")
    assert settings["model"] == {"backbone": "frskd_fast.models.FFLResNet", "backbone_args": {"depth": 32}}
    assert settings["optimizer"]["init_args"] == {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4, "nesterov": True}
    assert (settings["trainer"]["max_epochs"], settings["lr_scheduler"]["init_args"]["milestones"]) == (300, [150, 225])
    data = settings["data"]["init_args"]
    assert (data["classes"], data["batch_size"], data["padding_mode"]) == (classes, 128, "reflect")
    for name, wanted in (("mean", (129.3, 124.1, 112.4)), ("std", (68.2, 65.4, 70.4))):
        assert data[name] == pytest.approx([value / 255 for value in wanted], abs=1e-6)


@pytest.mark.parametrize(("teacher", "student"), pairs(SSKD_PAIRS))
def test_pairs_of_adain(teacher: str, student: str) -> None:
    settings, alone = recipe(f"cifar100_{teacher}_{student}_adain"), recipe(f"cifar100_{student}_plain")
    assert settings["model"] == {"backbone": student} and settings["teacher"] == f"cifar100_{teacher}_plain"
    assert settings["task"]["init_args"] == {"image_shape": [3, 32, 32]}
    assert settings["optimizer"]["init_args"]["lr"] == (0.01 if student in SMALL_STEPS else 0.05)
    assert {**settings, **dict.fromkeys(("task", "teacher"))} == {**alone, **dict.fromkeys(("task", "teacher"))}


@pytest.mark.parametrize("width", [1, 2])
@pytest.mark.parametrize("classes", [10, 100])
def test_pairs_of_collaborative_teaching(classes: int, width: int) -> None:
    name = f"cifar{classes}_wrn_40_{width}"
    settings, expert = recipe(f"{name}_wrn_16_{width}_collaborative"), recipe(f"{name}_collaborative_expert")
    assert settings["expert"] == f"{name}_collaborative_expert" and settings["model"] == {"backbone": f"wrn_16_{width}"}
    assert expert["model"] == {"backbone": f"wrn_40_{width}"}
    wanted = {"scratch": f"wrn_40_{width}", "beta": 1e3, "gamma": 0.03, "attention_on": "student", "share_stem": True}
    assert settings["task"]["init_args"] == wanted
    for one in (settings, expert):
        data, trainer = one["data"]["init_args"], one["trainer"]
        assert one["optimizer"]["init_args"] == {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4}
        assert one["lr_scheduler"]["init_args"] == {"milestones": [59, 119, 159], "gamma": 0.2}
        assert (data["classes"], data["batch_size"], data["padding_mode"]) == (classes, 128, "symmetric")
        assert trainer["max_epochs"] == 200
    if width == 1:
        released = recipe(f"{name}_wrn_16_1_collaborative_released")["task"]["init_args"]
        assert released == {**wanted, "attention_on": "scratch", "batch_size": 128}


@pytest.mark.parametrize("compound", [0, 1])
def test_settings_of_voc(compound: int) -> None:
    """Those of the released code: the rate of epoch e is 0.01 * 0.1^[e >= 40], 32 images to a step, values clipped."""
    alone, distilled = (recipe(f"voc_efficientdet_d{compound}_{method}") for method in ("plain", "frskd"))
    assert {**distilled, "task": None} == {**alone, "task": None}
    wanted = {"alpha": 1.0, "beta": 50.0, "temperature": 1.0, "warmup_epochs": 40, "ramp_shape": "anneal"}
    assert distilled["task"]["init_args"] == wanted and alone["task"]["init_args"] == {**wanted, "alpha": 0.0}
    assert alone["model"] == {"backbone": f"efficientdet_seg_d{compound}"}
    assert optimizer_of(f"voc_efficientdet_d{compound}_plain") == {"lr": 0.01, "weight_decay": 5e-4, "nesterov": False}
    assert schedule_of(f"voc_efficientdet_d{compound}_plain") == (60, [40])
    trainer, data = alone["trainer"], alone["data"]["init_args"]
    assert data["batch_size"] * trainer["accumulate_grad_batches"] == 32
    assert (trainer["gradient_clip_val"], trainer["gradient_clip_algorithm"]) == (2.0, "value")


def test_every_experiment_of_the_papers_has_its_recipe() -> None:
    assert set(recipe_names()) >= WANTED


@pytest.mark.parametrize("name", recipe_names())
def test_header_names_source_and_target(name: str) -> None:
    text = recipe_text(name)[0]
    header = re.match(r"(?:#.*\n)+", text)
    assert header is not None
    assert "# Source: " in header[0] and "# Should reach: " in header[0]
    # A figure is either confirmed or said not to be.
    assert not re.search(r"\d\d\.\d\d %", header[0]) or "confirmed" in header[0]


@pytest.mark.parametrize(
    ("name", "part", "expected"),
    [
        ("cifar100_resnet18_frskd", "task", {"alpha": 2.0, "beta": 100.0, "temperature": 4.0, "distill": "att"}),
        (
            "cifar100_resnet18_frskd_sla",
            "task",
            {"auxiliary": "sla", "auxiliary_weight": 1.0, "alpha": 2.0, "beta": 100.0},
        ),
        ("cifar100_wrn16x2_frskd", "model", {"backbone": "wrn16x2"}),
        ("cifar100_wrn16x2_frskd", "lr_scheduler", {"milestones": [100, 150], "gamma": 0.1}),
        ("cifar100_resnet18_plain", "optimizer", {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4}),
    ],
)
def test_constants_of_the_paper(name: str, part: str, expected: dict[str, object]) -> None:
    settings = recipe(name)
    arguments = settings[part].get("init_args", settings[part])
    assert {key: arguments[key] for key in expected} == expected
    assert settings["optimizer"]["class_path"] == "torch.optim.SGD"
    assert settings["lr_scheduler"]["class_path"].endswith(".multistep")
    assert settings["trainer"]["max_epochs"] == 200 and settings["data"]["init_args"]["batch_size"] == 128


def test_a_recipe_of_the_user_builds_on_one_of_the_package(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(
        "base: cifar100_resnet18_frskd\ntask:\n  init_args:\n    beta: 50.0\n", encoding="utf-8"
    )
    (tmp_path / "more.yaml").write_text("base: mine.yaml\ntrainer:\n  max_epochs: 3\n", encoding="utf-8")
    settings = recipe(str(tmp_path / "more.yaml"))
    assert settings["task"]["init_args"]["beta"] == 50.0 and settings["task"]["init_args"]["alpha"] == 2.0
    assert settings["trainer"]["max_epochs"] == 3 and "base" not in settings


def test_another_class_drops_the_arguments_of_the_old_one() -> None:
    base = {"data": {"class_path": "A", "init_args": {"root": "x"}}}
    assert merged(base, {"data": {"class_path": "B"}}) == {"data": {"class_path": "B"}}
    assert merged(base, {"data": {"init_args": {"y": 1}}}) == {
        "data": {"class_path": "A", "init_args": {"root": "x", "y": 1}}
    }


def test_mistakes_in_recipes_are_sentences(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "one.yaml").write_text("base: two.yaml\n", encoding="utf-8")
    (tmp_path / "two.yaml").write_text("base: one.yaml\n", encoding="utf-8")
    with pytest.raises(RecipeError, match="built on it"):
        recipe(str(tmp_path / "one.yaml"))
    (tmp_path / "list.yaml").write_text("- 1\n", encoding="utf-8")
    with pytest.raises(RecipeError, match="a mapping of settings was wanted"):
        recipe(str(tmp_path / "list.yaml"))
    assert main(["fit", "--config", "cifar1000"]) == 1
    methods = ", ".join(sorted(set(recipe_names().values())))
    said = capsys.readouterr().err
    assert f"neither a file nor one of the package's; `frskd-fast recipes METHOD` lists those of {methods}." in said
    assert main(["recipes", "digts"]) == 1
    assert capsys.readouterr().err.rpartition(" Did you mean ")[2].startswith("'digits'")
    assert main(["recipes", "zzz"]) == 1
    assert "Did you mean" not in capsys.readouterr().err


def test_list_and_show(capsys: pytest.CaptureFixture[str]) -> None:
    """How many each method has, those of one method, and one recipe."""
    names = recipe_names()
    assert main(["recipes"]) == 0
    *lines, _, _ = capsys.readouterr().out.splitlines()
    assert {line.split()[0]: int(line.split()[1]) for line in lines} == Counter(names.values())
    found = {}
    for method in dict.fromkeys(names.values()):
        assert main(["recipes", method]) == 0
        for line in capsys.readouterr().out.splitlines():
            name, summary = line.split(maxsplit=1)
            assert len(summary) > 10
            found[name] = method
    assert found == names and {"frskd", "plain"} <= set(found.values())
    assert found["cifar100_resnet18_plain"] == "plain" and found["digits"] == "frskd"
    assert main(["recipes", "cifar100_wrn16x2_frskd_sla"]) == 0
    assert yaml.safe_load(capsys.readouterr().out) == recipe_files.recipe("cifar100_wrn16x2_frskd_sla")


def test_a_reader_that_leaves_ends_the_list_quietly() -> None:
    listing = process(["recipes", "frskd"])
    listing.stdout.close()
    assert listing.stderr.read() == "" and listing.wait(timeout=60) == 0
