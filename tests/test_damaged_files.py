"""Damaged files, files of another kind and paths that cannot be are sentences of the command line, not tracebacks."""

from __future__ import annotations

import errno
import itertools
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lightning")
pytest.importorskip("jsonargparse")
pytest.importorskip("sklearn")

from training_utils import PLAIN, TESTS, small_run

from frskd_fast.models import CheckpointError
from frskd_fast.models.checkpoints import STATE, load_file
from frskd_fast.training import panels
from frskd_fast.training.checkpoints import find_checkpoint, problem_with
from frskd_fast.training.cli import main
from frskd_fast.training.export import ExportError, check_export
from frskd_fast.training.module import DistillationModule

WITHOUT_EXTRA = """\
import sys

sys.modules[sys.argv[1]] = None
from frskd_fast.training.cli import main

sys.exit(main(sys.argv[2:]))
"""


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of which five of eight steps are done."""
    folder = tmp_path_factory.mktemp("damaged") / "run"
    assert main(words(folder, trainer__max_steps=5)) == 0
    return folder


def words(folder: Path, **settings: Any) -> list[str]:
    return small_run(folder, task=PLAIN, trainer__max_epochs=2, **settings)


def refused(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    """What the command line says, in one sentence or a few."""
    capsys.readouterr()
    assert main(arguments) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"frskd-fast {arguments[0]}: ") and "Traceback" not in said
    return said


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"a: [1\nb: 2", "cannot be read as settings in YAML: while parsing a flow sequence"),
        (b"a:\n\t- b", "cannot be read as settings in YAML: while scanning for the next token"),
        (b"a: !!python/object:os.system x", "could not determine a constructor for the tag"),
        (b"base: digits\nx: 2020-01-01", "Object of type date is not JSON serializable"),
        (b"base: digits\nx: !!set {a}", "Object of type set is not JSON serializable"),
        (b"base: digits\nx: &a [*a]", "Circular reference detected"),
        (b"[" * 5000, "maximum recursion depth exceeded"),
        (b"\xff\xfe\x00a", "cannot be read ('utf-8' codec can't decode byte 0xff"),
    ],
)
def test_a_recipe_that_is_no_yaml(
    tmp_path: Path, content: bytes, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    for command in (["fit", "--config", str(path)], ["recipes", str(path)]):
        said = refused(capsys, command)
        assert sentence in said and str(path) in said and said.count("\n") == 1


def test_a_name_too_long_for_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert "is neither a file nor one of the package's" in refused(capsys, ["fit", "--config", "x" * 5000])


@pytest.mark.parametrize("seed", [-1, 2**32, 2**40])
def test_a_seed_that_numpy_does_not_take(tmp_path: Path, seed: int, capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(capsys, words(tmp_path / "run", seed_everything=seed))
    assert f"--seed_everything is {seed}, but a whole number from 0 to 4294967295 was wanted." in said


@pytest.mark.parametrize("below", ["", "run", "runs/run"])
def test_a_file_in_the_place_of_the_runs_folder(tmp_path: Path, below: str, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    for stage in ("fit", "validate"):
        said = refused(capsys, [stage, *words(tmp_path / "x", run_dir=file / below)[1:]])
        assert f"but {file} is a file; give a folder" in said
    assert file.read_text() == "mine"


def test_a_folder_in_which_nothing_can_be_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Simulated, because the superuser may write anywhere."""

    def forbidden(path: Any, *arguments: Any, **settings: Any) -> Any:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr("frskd_fast.training.beginning.write_atomically", forbidden)
    monkeypatch.setattr("frskd_fast.training.lock.RunLock._taken", forbidden)
    said = refused(capsys, words(tmp_path / "x", run_dir=tmp_path / "closed" / "run"))
    assert "config.yaml could not be written (Permission denied). Give --run_dir another folder." in said


def _refusal(error: type[Exception], call: Callable[[Path], Any], path: Path) -> str:
    try:
        call(path)
    except error as refusal:
        return str(refusal)
    return ""


def test_flipped_bits_in_the_directory_of_an_archive(tmp_path: Path) -> None:
    """Each is said or does no harm: an entry may seem compressed, encrypted, or of another name."""
    path = tmp_path / "file.pt2"
    torch.save({STATE: {}, "state_dict": {"weight": torch.ones(3)}}, path)
    whole = path.read_bytes()
    said: dict[str, list[str]] = {"problem_with": [], "load_file": [], "check_export": []}
    first = whole.index(b"PK\1\2")
    places = [*range(first, whole.index(b"PK\1\2", first + 4)), *range(whole.index(b"PK\6\6"), len(whole))]
    for place, bit in itertools.product(places, range(8)):
        flipped = bytearray(whole)
        flipped[place] ^= 1 << bit
        path.write_bytes(flipped)
        said["problem_with"].append(problem_with(path) or "")
        said["load_file"].append(_refusal(CheckpointError, load_file, path))
        said["check_export"].append(_refusal(ExportError, check_export, path))
    for what in ("problem_with", "check_export"):
        for kind in ("is encrypted", "Error -3 while decompressing", "BadZipFile"):
            assert any(kind in sentence for sentence in said[what]), (what, kind)
    assert any("is damaged: it is torn" in sentence for sentence in said["load_file"])


def test_a_run_with_a_flipped_bit_goes_on_from_the_checkpoint_before(interrupted: Path, tmp_path: Path) -> None:
    content = (interrupted / "last.ckpt").read_bytes()
    (tmp_path / "previous.ckpt").write_bytes(content)
    flags = content.index(b"PK\1\2") + 8
    (tmp_path / "last.ckpt").write_bytes(content[:flags] + bytes([content[flags] ^ 1]) + content[flags + 1 :])
    found = find_checkpoint(tmp_path)
    assert found is not None and found.path.name == "previous.ckpt" and "is encrypted" in found.passed_over[0]


def _change(**entries: Any) -> Callable[[Path, Path], Any]:
    def write(run: Path, path: Path) -> None:
        content = {**torch.load(run / "last.ckpt", weights_only=True), **entries}
        torch.save({key: value for key, value in content.items() if value is not None}, path)

    return write


OTHERS: dict[str, tuple[Callable[[Path, Path], Any], str]] = {
    "dictionary": (lambda run, path: torch.save({"a": torch.zeros(2)}, path), "it has no 'pytorch-lightning_version'"),
    "list": (lambda run, path: torch.save([1], path), "it has no 'pytorch-lightning_version'"),
    "tensor": (lambda run, path: torch.save(torch.zeros(2), path), "it has no 'pytorch-lightning_version'"),
    "torn": (lambda run, path: path.write_bytes((run / "last.ckpt").read_bytes()[:5000]), "it is torn or no file of PyTorch"),
    "text": (lambda run, path: path.write_text("hello"), "it is torn or no file of PyTorch"),
    "nothing": (lambda run, path: path.touch(), "it is empty"),
    "missing": (lambda run, path: None, "it does not exist"),
    "folder": (lambda run, path: path.mkdir(), "it is a folder without .metadata"),
    "weights": (_change(state_dict=None), "it has no 'state_dict'"),
    "weights alone": (_change(loops=None), "it has no 'loops'"),
    "another network": (_change(state_dict={"x": torch.zeros(2)}), "does not fit the settings of this run (RuntimeError"),
    "another optimizer": (_change(optimizer_states=[{"a": 1}]), "does not fit the settings of this run (KeyError"),
}  # fmt: skip


@pytest.mark.parametrize("what", OTHERS)
def test_ckpt_path_of_something_else(
    interrupted: Path, tmp_path: Path, what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write, sentence = OTHERS[what]
    path = tmp_path / "other.ckpt"
    write(interrupted, path)
    said = refused(capsys, words(tmp_path / "run", ckpt_path=path))
    assert sentence in said and str(path) in said and not (tmp_path / "run").exists()
    if what not in ("weights alone", "another optimizer"):  # which do not matter here
        assert sentence in refused(capsys, ["validate", *words(tmp_path / "run", ckpt_path=path)[1:]])


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA"), MemoryError(), RuntimeError("can't allocate memory")]
)
def test_memory_that_runs_out_while_restoring_is_no_misfit(
    interrupted: Path, tmp_path: Path, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(DistillationModule, "load_state_dict", full)
    with pytest.raises(type(error)):
        main(words(tmp_path / "run", ckpt_path=interrupted / "last.ckpt"))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.yaml", b"task: [1"),
        ("config.yaml", b"- 1\n"),
        ("config.yaml", b"\xff\xfe"),
        ("config.yaml", b""),
        ("config.yaml", b"task: !!python/name:os.system\n"),
        ("config.yaml", b"task: x\ntrainer: 4\n"),
        ("config.yaml", b"task: x\ntrainer: {max_epochs: many}\n"),
        ("steps.csv", b"\xff\xfe\n"),
        ("steps.csv", b"a,b\n1,2\n"),
        ("steps.csv", b"step,loss\nx,3\n"),
        ("steps.csv", b"step,loss\n\x00,3\n"),
        ("epochs.csv", b"epoch,loss\nx,3\n"),
        ("epochs.csv", b"loss\n3\n"),
    ],
)
def test_a_damaged_file_of_a_run(
    interrupted: Path, tmp_path: Path, name: str, content: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is not gone on with, and nothing in the folder changes."""
    folder = tmp_path / "run"
    shutil.copytree(interrupted, folder)
    (folder / name).write_bytes(content)
    before = (folder / "last.ckpt").read_bytes()
    said = refused(capsys, words(folder))
    assert f"{folder / name}" in said and "is damaged (" in said
    assert (folder / name).read_bytes() == content and (folder / "last.ckpt").read_bytes() == before
    if name == "epochs.csv" and panels.pyplot() is not None:
        assert "is damaged (" in refused(capsys, ["panels", "--run_dir", str(folder)])


def test_a_number_that_is_none_in_what_panels_draw(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "epochs.csv").write_text("epoch,train/loss\n0,much\n")
    assert "train/loss is 'much' in it" in refused(capsys, ["panels", "--run_dir", str(tmp_path)])


@pytest.mark.parametrize("place", ["below a file", "a folder"])
def test_an_export_to_where_no_file_can_be(
    interrupted: Path, tmp_path: Path, place: str, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("safetensors")
    (tmp_path / "file").touch()
    (tmp_path / "folder.safetensors").mkdir()
    out = tmp_path / {"below a file": "file/student.safetensors", "a folder": "folder.safetensors"}[place]
    command = ["export", "--checkpoint", str(interrupted / "last.ckpt"), "--out", str(out), "--trust"]
    assert f"--out is {out}, which could not be written" in refused(capsys, command)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder.safetensors"]


@pytest.mark.parametrize("module", ["yaml", "lightning", "jsonargparse", "torchmetrics"])
def test_the_command_line_without_its_extra(module: str) -> None:
    environment = {**os.environ, "PYTHONPATH": str(TESTS.parent)}
    command = [sys.executable, "-c", WITHOUT_EXTRA, module, "fit", "--config", "digits"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and "pip install 'frskd_fast[train]'." in done.stderr
    assert done.stderr.startswith("frskd-fast fit: ") and done.stderr.count("\n") == 1
