"""Nothing that a file names runs unless the user says so: modules of the working folder, pickles among shards."""

from __future__ import annotations

import os
import pickle
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lightning")
pytest.importorskip("jsonargparse")
pytest.importorskip("sklearn")

from lightning.pytorch import Trainer
from lightning.pytorch.core.saving import CHECKPOINT_PAST_HPARAMS_KEYS
from torch.distributed.checkpoint import metadata as kinds
from training_utils import PLAIN, small_run

from frskd_fast.models import CheckpointError, FFLResNet, load_teacher, wrn16x2
from frskd_fast.models.checkpoints import load_file
from frskd_fast.models.registry import imported
from frskd_fast.training.class_paths import PARTS, unknown_names
from frskd_fast.training.cli import main
from frskd_fast.training.export import load_student
from frskd_fast.training.module import DistillationModule
from frskd_fast.training.recipe_files import recipe, recipe_names

EVIL = """\
from pathlib import Path

Path("harm.txt").write_text("imported")

from frskd_fast.models import wrn16x2 as Net
from frskd_fast.tasks import ClassificationTask as Task
from frskd_fast.training.schedules import multistep
from torch.optim import SGD
"""


class Payload:
    """Leaves a file when it is unpickled."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.system, ("echo harm > harm.txt",)


@pytest.fixture
def working(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder that imports come from, as under `python -m`, with a module that leaves a file."""
    folder = tmp_path / "working"
    folder.mkdir()
    (folder / "evil.py").write_text(EVIL, encoding="utf-8")
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, "evil", raising=False)
    return folder


def harmed(working: Path) -> bool:
    return (working / "harm.txt").exists()


def saved(path: Path, network: str = "wrn16x2", arguments: dict[str, Any] | None = None, **settings: Any) -> Path:
    """A checkpoint of the trainer that names what evil.py has."""
    module = DistillationModule(10, PLAIN, network, arguments)
    trainer = Trainer(logger=False, accelerator="cpu", enable_progress_bar=False, enable_model_summary=False)
    trainer.strategy.connect(module)
    trainer.save_checkpoint(path, weights_only=True)
    content = torch.load(path, weights_only=True)
    content["hyper_parameters"].update(settings)
    content["frskd_fast"].update(settings.pop("state", {}))
    torch.save(content, path)
    return path


NAMES: dict[str, dict[str, Any]] = {
    "no name": {"backbone": "evil.x/1"},
    "teacher's network": {
        "task": {"class_path": PLAIN, "init_args": {"teacher": "a.ckpt", "teacher_name": "evil.Net"}}
    },
    "function of the package": {"task": "frskd_fast.training.cli.main"},
    "what the package imports": {"task": "frskd_fast.tasks.base.functools.partial"},
    "backbone": {"backbone": "evil.Net"},
    "task": {"task": "evil.Task", "state": {"own_student": True}},
    "argument": {"task": {"class_path": PLAIN, "init_args": {"memory": {"class_path": "evil.Task"}}}},
    "optimizer": {"optimizer": {"class_path": "evil.SGD", "init_args": {"lr": 0.1}}},
    "schedule": {"lr_scheduler": {"class_path": "evil.multistep", "init_args": {"milestones": [1]}}},
    "student": {"state": {"student": "evil.Net"}},
}


@pytest.mark.parametrize("what", NAMES)
def test_a_checkpoint_does_not_decide_what_is_imported(
    working: Path, what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = saved(working / "last.ckpt", **NAMES[what])
    status = main(["export", "--checkpoint", str(path), "--out", "student.safetensors"])
    assert (status == 1) == (what in ("backbone", "task", "no name")) and not harmed(working)
    if status:
        assert "if you trust the file" in capsys.readouterr().err
    if what in ("backbone", "no name"):
        with pytest.raises(CheckpointError, match="if you trust the file"):
            load_teacher(path)
    if what != "student":  # which is no setting of the module
        with pytest.raises(CheckpointError, match="give trust=True if you trust the file"):
            DistillationModule.load_from_checkpoint(path)
    assert not harmed(working)
    words = small_run(working / "run", model__backbone="wrn16x2", model__weights=path, trainer__fast_dev_run=1)
    assert main(words) == 0
    assert not harmed(working)
    if what in ("backbone", "task"):
        assert main(["export", "--checkpoint", str(path), "--out", "student.safetensors", "--trust"]) == 0
        assert harmed(working)


def test_recipes_need_no_trust() -> None:
    for name in recipe_names():
        settings = recipe(name)
        parts = [settings.get(part) for part in PARTS]
        assert (name, list(unknown_names([settings.get("model"), parts]))) == (name, [])


def test_a_network_of_the_package_needs_no_trust(working: Path) -> None:
    path = saved(working / "last.ckpt", "frskd_fast.models.FFLResNet", {"depth": 8})
    module = DistillationModule.load_from_checkpoint(path)
    networks = (module.backbone, load_student(path).student.backbone, load_teacher(path))
    assert {type(network) for network in networks} == {FFLResNet}


def test_load_from_checkpoint_takes_names_from_the_caller(working: Path) -> None:
    path = saved(working / "last.ckpt", backbone="evil.Net")
    with pytest.raises(CheckpointError, match=r"names evil\.Net, which .* trust=True"):
        DistillationModule.load_from_checkpoint(path)
    assert not harmed(working)
    with path.open("rb") as file, pytest.raises(CheckpointError, match="in a file alone"):
        DistillationModule.load_from_checkpoint(file)
    assert not harmed(working)
    for given in ({"backbone": "evil.Net"}, {"trust": True}):
        assert DistillationModule.load_from_checkpoint(path, **given).hparams.backbone == "evil.Net"
    assert harmed(working)


@pytest.mark.parametrize("key", [*CHECKPOINT_PAST_HPARAMS_KEYS, DistillationModule.CHECKPOINT_HYPER_PARAMS_TYPE])
def test_settings_under_the_keys_of_old_checkpoints_import_nothing(working: Path, key: str) -> None:
    path = saved(working / "last.ckpt")
    content = torch.load(path, weights_only=True)
    assert key not in content
    content[key] = {"backbone": content["hyper_parameters"].pop("backbone").replace("wrn16x2", "evil.Net")}
    torch.save(content, path)
    with pytest.raises(CheckpointError, match=f"has settings under '{key}', .* trust=True"):
        DistillationModule.load_from_checkpoint(path)
    assert not harmed(working)


def test_the_name_in_an_exported_file_is_not_imported(working: Path) -> None:
    save = pytest.importorskip("safetensors.torch").save_file
    about = {"backbone": "evil.Net", "num_classes": "10"}
    save(wrn16x2(num_classes=10).state_dict(), "student.safetensors", about)
    assert main(["export", "--checkpoint", "student.safetensors", "--out", "again.safetensors"]) == 1
    with pytest.raises(CheckpointError, match=r"names evil\.Net"):
        load_teacher("student.safetensors")
    assert not harmed(working)


@pytest.mark.parametrize("place", [".metadata", "a value", "meta.pt"])
def test_shards_run_nothing(working: Path, place: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder as FSDP leaves it, with a payload in its list of shards, among its values, or beside them."""
    import torch.distributed.checkpoint as distributed

    content = torch.load(saved(working / "last.ckpt"), weights_only=True)
    folder = working / "shards.ckpt"
    values = {"state_dict": content.pop("state_dict"), "more": {"value": Payload() if place == "a value" else 3}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is one process
        distributed.save(values, checkpoint_id=folder)
    torch.save({**content, **({"more": Payload()} if place == "meta.pt" else {})}, folder / "meta.pt")
    if place == ".metadata":
        (folder / place).write_bytes(pickle.dumps(Payload()))
    words = small_run(working / "run", model__backbone="wrn16x2", model__weights=folder, trainer__fast_dev_run=1)
    wanted = 0 if place == "a value" else 1
    assert main(["export", "--checkpoint", str(folder), "--out", "student.safetensors"]) == wanted
    assert main(words) == wanted
    assert not harmed(working)
    if place == ".metadata":
        assert capsys.readouterr().err.count("asks for posix.system, which the list of shards does not need") == 2
    if wanted:
        with pytest.raises(CheckpointError):
            load_teacher(folder)
    assert not harmed(working)


@pytest.mark.parametrize(
    "name", ["pathlib PosixPath", "torch Size", "torch.serialization _get_layout", f"{kinds.__name__} Metadata"]
)
def test_the_list_of_shards_sets_attributes_of_nothing_it_names(tmp_path: Path, name: str) -> None:
    """Neither of classes and functions of the running process by a state, nor by one for slots."""
    place = ".".join(name.split())
    named = Path if "Path" in place else imported(place)
    for state in (b"}\x8c\x07harmfulK\x01s", b"(N}\x8c\x07harmfulK\x01st"):
        (tmp_path / ".metadata").write_bytes(b"\x80\x04c%b\n%bb." % (name.replace(" ", "\n").encode(), state))
        with pytest.raises(CheckpointError, match="sets attributes of what is no part of the list of shards"):
            load_file(tmp_path)
        assert not hasattr(named, "harmful")
