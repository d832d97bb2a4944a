"""Kill, torn file, full disk: a run goes on bit for bit, or says in a sentence why it does not."""

from __future__ import annotations

import errno
import os
import re
import shutil
import signal
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lightning")
pytest.importorskip("jsonargparse")
pytest.importorskip("sklearn")

from training_utils import PLAIN, SCHEDULES, epochs, process, same_weights, small_run, steps, weights

from frskd_fast.training import checkpoints, panels
from frskd_fast.training import lock as lock_file
from frskd_fast.training.checkpoints import find_checkpoint, problem_with, write_atomically
from frskd_fast.training.cli import main
from frskd_fast.training.lock import RunLock
from frskd_fast.training.module import DistillationModule
from frskd_fast.training.records import Records


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("reference") / "run"
    assert main(small_run(folder)) == 0
    return folder


@pytest.fixture
def begun(reference: Path, tmp_path: Path) -> Path:
    """A copy of that run; `last.ckpt` is its end, `previous.ckpt` three steps or an epoch earlier."""
    folder = tmp_path / "run"
    shutil.copytree(reference, folder)
    return folder


def kill_after(words: list[str], folder: Path, row: int) -> None:
    """Start the command in a process of its own and SIGKILL it as soon as `steps.csv` has so many rows."""
    running = process(words)
    try:
        wait_for_row(running, folder, row)
    finally:
        running.send_signal(signal.SIGKILL)
        running.communicate()
    assert running.returncode == -signal.SIGKILL


def wait_for_row(running: Any, folder: Path, row: int) -> None:
    """Wait until `steps.csv` of the process has so many rows."""
    file = folder / "steps.csv"
    deadline = time.monotonic() + 120
    while not file.is_file() or file.read_bytes().count(b"\n") <= row:
        assert running.poll() is None, running.communicate()
        assert time.monotonic() < deadline, "the run does not get on"
        time.sleep(0.002)


def test_a_run_killed_twice_continues_bit_for_bit(
    reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "killed"
    words = small_run(folder, trainer__callbacks="training_utils.Slow")
    kill_after(words, folder, 6)  # within the second epoch
    assert find_checkpoint(folder) is not None and len(steps(folder)) < len(steps(reference))
    kill_after(words, folder, 10)
    assert main(words) == 0
    assert "goes on after" in capsys.readouterr().out
    assert steps(folder) == steps(reference)
    assert epochs(folder) == epochs(reference)
    assert same_weights(weights(folder), weights(reference))
    last, wanted = (torch.load(f / "last.ckpt", weights_only=True) for f in (folder, reference))
    assert last["lr_schedulers"] == wanted["lr_schedulers"]
    for name, state in wanted["optimizer_states"][0]["state"].items():
        assert torch.equal(last["optimizer_states"][0]["state"][name]["momentum_buffer"], state["momentum_buffer"])


@pytest.mark.parametrize("moment", ["before the checkpoint", "after it"])
@pytest.mark.parametrize("step", [6, 8])
def test_sigterm_saves_and_the_run_goes_on(
    reference: Path, tmp_path: Path, moment: str, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a cluster that takes the node back sends it. In an epoch's last step the validation is still to come, which a
    restart from there would leave out: the run then goes back to its last checkpoint."""
    # Callbacks' hooks, the checkpoint's last, come before the module's.
    owner = Records if moment == "before the checkpoint" else DistillationModule
    original = owner.on_train_batch_end

    def told(self: Any, *arguments: Any) -> None:
        original(self, *arguments)
        trainer = arguments[0] if owner is Records else self.trainer
        if trainer.global_step == step:
            os.kill(os.getpid(), signal.SIGTERM)

    folder = tmp_path / "taken"
    words = small_run(folder, checkpoint__every_n_steps=0)
    with monkeypatch.context() as patch:
        patch.setattr(owner, "on_train_batch_end", told)
        with pytest.raises(SystemExit) as status:
            main(words)
    assert status.value.code == 128 + signal.SIGTERM
    found = find_checkpoint(folder)
    assert found is not None and found.progress.steps == (4 if step == 8 else step)
    assert main(words) == 0
    assert steps(folder) == steps(reference) and epochs(folder) == epochs(reference)
    assert same_weights(weights(folder), weights(reference))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_the_whole_group_saves_and_the_run_goes_on(
    number: signal.Signals, reference: Path, tmp_path: Path
) -> None:
    """As Ctrl-C and clusters send it. It reaches the workers, too, which must not die of it before the step has ended."""
    folder = tmp_path / "interrupted"
    words = small_run(folder, trainer__callbacks="training_utils.Slow", data__workers=1, checkpoint__every_n_steps=0)
    running = process(words, group=True)
    try:
        wait_for_row(running, folder, 5)
        os.killpg(running.pid, number)
        out, error = running.communicate(timeout=60)
    finally:
        running.kill()
    assert running.returncode == 128 + number, out + error
    assert f"Stopped by {number.name} after " in out and "Traceback" not in error
    found = find_checkpoint(folder)
    assert found is not None and found.progress.steps == len(steps(folder)) in (5, 6, 7)
    assert main(small_run(folder)) == 0
    assert steps(folder) == steps(reference) and same_weights(weights(folder), weights(reference))


@pytest.mark.parametrize("validation", [1, 0])
def test_panels_that_a_kill_prevented_are_drawn_at_the_next_start(
    tmp_path: Path, validation: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run is finished then, even where they cannot be drawn, and what is drawn is whole or not there."""
    pytest.importorskip("matplotlib")
    folder = tmp_path / "run"
    words = small_run(folder, panels__enabled="true", trainer__max_epochs=1, trainer__limit_val_batches=validation)

    def drawing(error: BaseException) -> tuple[int, str]:
        def fails(*_: Any) -> None:
            raise error

        with monkeypatch.context() as patch:
            patch.setattr(panels, "_write", fails)
            return main(words), capsys.readouterr().out

    with pytest.raises(SystemExit):
        drawing(KeyboardInterrupt())
    assert not list(folder.glob("*.png"))
    status, out = drawing(FileNotFoundError("no such images"))
    assert status == 0 and "Its panels cannot be drawn (FileNotFoundError: no such images)" in out
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "is finished" in out and "they are drawn now" in out and "cannot be drawn" not in out
    drawn = {path.name for path in folder.glob("*.png")}
    assert drawn == ({"attention.png", "curves.png"} if validation else {"curves.png"})
    (folder / "curves.png").unlink()  # by somebody who does not want it
    assert main(words) == 0
    assert "they are drawn now" not in capsys.readouterr().out


@pytest.mark.parametrize("hook", ["on_train_batch_end", "on_sanity_check_end"])
def test_a_second_interrupt_or_one_before_training_stops_at_once(
    tmp_path: Path, hook: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def told(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        if hook == "on_train_batch_end":
            assert not capsys.readouterr().out
            os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("the signal had no effect")

    before = signal.getsignal(signal.SIGINT)
    folder = tmp_path / "run"
    monkeypatch.setattr(Records, hook, told)
    with pytest.raises(SystemExit) as status:
        main(small_run(folder, trainer__num_sanity_val_steps=1))
    assert status.value.code == 128 + signal.SIGINT
    assert "Stopped at once; " in capsys.readouterr().out
    assert folder.exists() == (hook == "on_train_batch_end") and find_checkpoint(folder) is None
    assert signal.getsignal(signal.SIGINT) == before


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({"trainer__max_epochs": 2}, [3, 4, 7, 8]),
        # Lightning resumes the loop in another way where the number of steps is limited.
        ({"trainer__max_epochs": 9, "trainer__max_steps": 10}, [3, 4, 7, 8, 10]),
        (
            {"trainer__max_epochs": 2, "trainer__val_check_interval": 2, "checkpoint__every_n_steps": 1},
            [1, 3, 4, 5, 7, 8],
        ),
    ],
    ids=["epochs", "steps", "validation within epochs"],
)
def test_every_checkpoint_within_and_between_epochs_leads_to_the_same_end(
    settings: dict[str, int], wanted: list[int], tmp_path: Path
) -> None:
    """Restarts from each step at which a checkpoint was written, the last of an epoch included."""
    saved = tmp_path / "saved"
    saved.mkdir()

    def keep(folder: Path, keep_best: bool = False) -> None:
        incoming = folder / checkpoints.INCOMING
        shutil.copyfile(incoming, saved / f"{len(list(saved.iterdir())):03d}.ckpt")
        original(folder, keep_best)

    original = checkpoints.rotate
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoints, "rotate", keep)
        first = tmp_path / "first"
        assert main(small_run(first, **settings, lr_scheduler="null")) == 0
    states = sorted(saved.iterdir())
    reached = [torch.load(state, weights_only=True)["global_step"] for state in states]
    assert reached == wanted
    for state, step in zip(states[:-1], reached, strict=False):
        folder = tmp_path / f"from{step}"
        shutil.copytree(first, folder)
        (folder / "previous.ckpt").unlink()
        shutil.copyfile(state, folder / "last.ckpt")
        assert main(small_run(folder, **settings, lr_scheduler="null")) == 0
        assert steps(folder) == steps(first), step
        assert epochs(folder) == epochs(first), step
        assert same_weights(weights(folder), weights(first)), step


@pytest.mark.parametrize("damage", ["torn", "empty", "one bit"])
def test_a_damaged_checkpoint_is_passed_over(
    begun: Path, reference: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    last = begun / "last.ckpt"
    content = bytearray(last.read_bytes())
    if damage == "torn":
        content = content[: 2 * len(content) // 3]
    elif damage == "empty":
        content = bytearray()
    else:
        content[len(content) // 2] ^= 1  # within the data of a tensor
    last.write_bytes(content)
    assert main(small_run(begun)) == 0
    out = capsys.readouterr().out
    assert f"{last} is passed over: it" in out or f"{last} is passed over: its entry" in out
    assert "from previous.ckpt" in out
    assert steps(begun) == steps(reference) and epochs(begun) == epochs(reference)
    assert same_weights(weights(begun), weights(reference))


def test_no_usable_checkpoint_is_an_error_not_a_new_run(begun: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("last.ckpt", "previous.ckpt"):
        (begun / name).write_bytes(b"not a checkpoint")
    assert main(small_run(begun)) == 1
    error = capsys.readouterr().err
    assert "last.ckpt is passed over" in error and "--fresh to start anew" in error
    assert (begun / "steps.csv").is_file()


def test_a_finished_run_says_so_and_stays_as_it_is(begun: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (begun / "last.ckpt").read_bytes()
    assert main(small_run(begun)) == 0
    assert "is finished: 4 epochs, 16 steps" in capsys.readouterr().out
    assert (begun / "last.ckpt").read_bytes() == before


def test_other_settings_in_the_same_folder_are_refused(begun: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(small_run(begun, task__beta=3.0)) == 1
    assert "task.init_args.beta was 100.0 and is 3.0" in capsys.readouterr().err
    assert main(small_run(begun, seed_everything=11)) == 1
    assert "seed_everything was 10 and is 11" in capsys.readouterr().err


def test_a_cosine_is_not_prolonged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """PyTorch's schedule, taken up after its end, would rise again."""
    folder = tmp_path / "run"
    settings = {"lr_scheduler": f"{SCHEDULES}.cosine", "task": PLAIN}
    assert main(small_run(folder, **settings, trainer__max_epochs=1)) == 0
    assert main(small_run(folder, **settings, trainer__max_epochs=2)) == 1
    error = capsys.readouterr().err
    assert "schedules.cosine over 1 epochs, but trainer.max_epochs is 2" in error and "--fresh to begin anew" in error
    assert len(epochs(folder)) == 1
    assert main(small_run(folder, **settings, trainer__max_epochs=1)) == 0
    out = capsys.readouterr().out
    assert "is finished: 1 epochs" in out and "max_epochs with a larger number" not in out


def test_a_cosine_is_not_shortened(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    settings = {"lr_scheduler": f"{SCHEDULES}.cosine", "task": PLAIN, "trainer__max_steps": 8}
    assert main(small_run(folder, **settings, trainer__max_epochs=3)) == 0
    assert main(small_run(folder, **settings, trainer__max_epochs=1)) == 1
    assert "schedules.cosine over 3 epochs, but trainer.max_epochs is 1" in capsys.readouterr().err


def test_fresh_moves_the_old_run_aside(begun: Path, reference: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*small_run(begun, task__beta=3.0, trainer__max_epochs=1), "--fresh"]
    assert main(words) == 0
    old = begun.with_name("run.old-1")
    assert f"is now in {old}" in capsys.readouterr().out
    assert steps(old) == steps(reference)
    assert len(steps(begun)) == 4 and steps(begun) != steps(old)[:4]


def test_a_full_disk_stops_neither_training_nor_harms_checkpoints(
    begun: Path, reference: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first writes after the restart fail; later ones succeed, and the run ends as if nothing had been."""
    shutil.copyfile(begun / "previous.ckpt", begun / "last.ckpt")
    before = (begun / "last.ckpt").read_bytes()
    failed: list[Path] = []

    def full(path: Any, content: Any) -> None:
        if Path(path).name == checkpoints.INCOMING and len(failed) < 1:
            failed.append(Path(path))
            assert (begun / "last.ckpt").read_bytes() == before
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write_atomically(path, content)

    with (
        pytest.MonkeyPatch.context() as patch,
        pytest.warns(UserWarning, match="No space left on device.*training goes"),
    ):
        patch.setattr(checkpoints, "write_atomically", full)
        assert main(small_run(begun, trainer__max_epochs=5)) == 0
    assert failed
    assert len(steps(begun)) == 20 and steps(begun)[:16] == steps(reference)
    assert problem_with(begun / "last.ckpt") is None


def test_a_limit_on_file_sizes_as_a_full_disk(begun: Path) -> None:
    """A real failure of the system's write(2), in a process of its own."""
    before = {name: (begun / name).read_bytes() for name in ("last.ckpt", "previous.ckpt")}
    limit = len(before["last.ckpt"]) // 2
    done = process(small_run(begun, trainer__max_epochs=5), limit=limit)
    _, error = done.communicate(timeout=120)
    assert done.returncode == 1, error
    warning, end = error.rsplit("frskd-fast fit: ", 1)
    assert warning.count("could not be written") == 1
    assert "earlier checkpoints are as they were" in warning.replace("\n", " ")
    assert end.startswith(
        "The training ended after 20 steps. Its last checkpoint could not be written (OSError: [Errno 27]"
    )
    assert f"{begun} holds last.ckpt of step 16. Make room on the disk; the same command goes on from there." in end
    assert {name: (begun / name).read_bytes() for name in before} == before
    assert len(steps(begun)) == 20
    assert not list(begun.glob(".*partial")) and not (begun / "incoming.ckpt").exists()


def test_a_start_on_a_full_disk_is_a_sentence(begun: Path) -> None:
    shutil.rmtree(begun)
    done = process(small_run(begun), limit=10)
    _, error = done.communicate(timeout=120)
    assert done.returncode == 1
    assert re.search(r"could not be written \(File too large\). Make room on the disk; the same command tries", error)
    assert "Traceback" not in error


def test_two_commands_do_not_train_in_one_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    lock = RunLock(folder)
    assert main(small_run(folder, trainer__max_epochs=1)) == 1
    assert f"Process {os.getpid()} on " in capsys.readouterr().err
    assert not folder.exists()
    lock.release()
    assert main(small_run(folder, trainer__max_epochs=1)) == 0
    assert not lock.path.exists()


def test_a_worker_that_is_left_over_holds_no_lock(tmp_path: Path) -> None:
    lock = RunLock(tmp_path / "run")
    (to_end, end), (has_begun, begin) = os.pipe(), os.pipe()
    worker = os.fork()
    if worker == 0:
        os.write(begin, b".")
        os.read(to_end, 1)
        os._exit(0)
    os.read(has_begun, 1)
    assert lock._descriptor is not None
    lock_file._held.discard(lock._descriptor)
    os.close(lock._descriptor)  # as its process ends, without release()
    RunLock(tmp_path / "run").release()
    os.write(end, b".")
    os.waitpid(worker, 0)
    for descriptor in (to_end, end, has_begun, begin):
        os.close(descriptor)


def test_where_no_lock_can_be_written_a_run_has_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    lock = RunLock(Path("."))
    assert lock.path == tmp_path.with_name(f".{tmp_path.name}.lock")
    lock.release()
    (tmp_path / "file").touch()
    RunLock(tmp_path / "file" / "run").release()


def test_the_lock_of_a_killed_process_is_taken_over(
    begun: Path, reference: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = small_run(begun, trainer__max_epochs=50, trainer__callbacks="training_utils.Slow")
    kill_after(words, begun, 18)
    assert RunLock(begun.with_name("other")).taken_over is None
    shutil.copyfile(reference / "last.ckpt", begun / "last.ckpt")
    assert main(small_run(begun, trainer__max_epochs=5)) == 0
    assert "did not come to its end" in capsys.readouterr().out


def test_a_full_disk_ends_the_events_and_not_the_training(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    done = process(small_run(folder, tensorboard="true", task=PLAIN), limit=3000)
    out, error = done.communicate(timeout=120)
    assert "The training ended after 16 steps." in error, out + error
    assert error.count("TensorBoard's events could not be written ([Errno") == 1
    (events,) = (folder / "tensorboard").glob("events.out.*")
    assert events.stat().st_size == 3000, "the limit was met"


def test_atomic_write_leaves_old_content_when_the_disk_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="full"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old" and [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_a_checkpoint_that_cannot_be_loaded_is_named(tmp_path: Path) -> None:
    """Whole by its checksums, but refused by torch.load without a word; and a folder of shards without its end."""
    with zipfile.ZipFile(tmp_path / "last.ckpt", "w") as archive:
        for name, content in (("data.pkl", b""), ("version", b"3\n"), ("byteorder", b"little")):
            archive.writestr(f"archive/{name}", content)
    shards = tmp_path / "previous.ckpt"
    shards.mkdir()
    (shards / ".metadata").write_bytes(b"")
    sentences = r"it cannot be loaded \(EOFError\)\. .* it is a folder without meta\.pt\. No checkpoint"
    with pytest.raises(RuntimeError, match=sentences):
        find_checkpoint(tmp_path)
    (shards / "meta.pt").write_bytes(b"torn")
    with pytest.raises(RuntimeError, match=r"previous\.ckpt is passed over: it cannot be loaded"):
        find_checkpoint(tmp_path)


def test_checkpoints_load_without_running_code(reference: Path) -> None:
    for name in ("last.ckpt", "previous.ckpt"):
        content = torch.load(reference / name, weights_only=True)
        assert content["hyper_parameters"]["backbone"] == "training_utils.SmallNet"
        assert {"state_dict", "optimizer_states", "lr_schedulers", "loops", "callbacks"} <= set(content)
