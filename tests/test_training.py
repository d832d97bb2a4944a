"""The Lightning module, what a run writes down and shows, and the command line's stages."""

from __future__ import annotations

import io
import math
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("lightning")
pytest.importorskip("jsonargparse")
pytest.importorskip("sklearn")

import lightning.pytorch as pl
from data_files import write_image_folder
from torchmetrics.classification import MulticlassAccuracy
from training_utils import DISTILLING, PLAIN, SCHEDULES, SmallNet, epochs, small_run, steps, weights

from frskd_fast.models import create_model
from frskd_fast.native import logits as native_logits
from frskd_fast.reference.logits import check_label_range
from frskd_fast.training import checkpoints, panels, schedules
from frskd_fast.training.cli import main, run
from frskd_fast.training.data import DigitsData, ImageFolderData, ImageLoader
from frskd_fast.training.errors import sentence_of
from frskd_fast.training.evaluation import fraction_correct
from frskd_fast.training.metrics import MeanOfParts
from frskd_fast.training.module import DistillationModule, step_seed
from frskd_fast.training.progress import ProgressBar
from frskd_fast.training.records import Predictions, Records, Throughput
from frskd_fast.training.tables import Table, read_table


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with everything on: TensorBoard, panels, the bar."""
    folder = tmp_path_factory.mktemp("training") / "run"
    words = small_run(
        folder,
        panels__enabled="true",
        tensorboard="true",
        trainer__enable_progress_bar="true",
        trainer__max_epochs=2,
        checkpoint__keep_best="true",
        lr_scheduler__warmup_epochs=1,
    )
    assert main(words) == 0
    return folder


def test_a_run_leaves_what_it_promises(trained: Path) -> None:
    wanted = {"last.ckpt", "previous.ckpt", "best.ckpt", "steps.csv", "epochs.csv", "config.yaml", "tensorboard"}
    assert wanted <= {path.name for path in trained.iterdir()}
    assert list((trained / "tensorboard").glob("events.out.*"))
    for name in ("curves.png", "attention.png"):
        assert (trained / name).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_records_hold_each_part_of_the_loss(trained: Path) -> None:
    rows = steps(trained)
    assert [row["step"] for row in rows] == [str(step) for step in range(8)]
    for row in rows:
        parts = {name: float(row[name]) for name in ("loss", "ce_student", "ce_teacher", "kd", "feature")}
        expected = parts["ce_student"] + parts["ce_teacher"] + 2 * parts["kd"] + 100 * parts["feature"]
        assert parts["loss"] == pytest.approx(expected, rel=1e-5)
    table = read_table(trained / "epochs.csv")[1]
    assert len(table) == 2
    for number, row in enumerate(table):
        within = [float(line["loss"]) for line in rows if line["epoch"] == str(number)]
        assert float(row["train/loss"]) == pytest.approx(sum(within) / len(within), rel=1e-6), "equal batches"
        assert float(row["images_per_second"]) > 0 and float(row["seconds"]) > 0
        assert 0 <= float(row["validation/accuracy"]) <= float(row["validation/accuracy_top5"]) <= 1
        assert float(row["validation/loss"]) > 0
    assert [float(row["learning_rate"]) for row in table] == [0.025, 0.05], "a warm-up of one epoch"


def test_validate_test_and_predict_use_the_runs_checkpoint(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = small_run(trained, lr_scheduler__warmup_epochs=1)[1:]
    validated = run("validate", words).trainer.callback_metrics["validation/accuracy"]
    assert float(validated) == pytest.approx(float(read_table(trained / "epochs.csv")[1][-1]["validation/accuracy"]))
    tested = run("test", words).trainer.callback_metrics["test/accuracy"]
    assert float(tested) == float(validated), "this recipe validates on the test images"
    assert main(["predict", *words]) == 0
    assert "Weights: " in capsys.readouterr().out
    columns, rows = read_table(trained / "predictions.csv")
    assert columns == ["image", "class", "probability"] and [int(row["image"]) for row in rows] == list(
        range(len(rows))
    )
    data = DigitsData(as_rgb=True)
    targets = data.reader("test").labels.tolist()  # type: ignore[union-attr]
    correct = sum(int(row["class"]) == target for row, target in zip(rows, targets, strict=True)) / len(rows)
    assert correct == pytest.approx(float(tested), abs=1e-6)


def test_without_a_checkpoint_the_other_stages_say_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", *small_run(tmp_path / "run")[1:]]) == 1
    assert "holds no checkpoint; train first, or give --ckpt_path a file" in capsys.readouterr().err


def test_best_checkpoint_is_that_of_the_highest_accuracy(trained: Path) -> None:
    accuracies = [float(row["validation/accuracy"]) for row in epochs(trained)]
    best = torch.load(trained / "best.ckpt", weights_only=True)
    assert best["epoch"] == accuracies.index(max(accuracies))
    assert best["callbacks"]["RunCheckpoint"]["best"] == pytest.approx(max(accuracies))


def test_best_checkpoint_holds_the_weights_that_were_validated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though checkpoints are due at other times; and one that the disk refuses is not taken for the best."""
    folder = tmp_path / "run"
    accuracies = iter([0.2, 0.6, 0.5, 0.7])
    monkeypatch.setattr(
        MulticlassAccuracy, "compute", lambda self: torch.tensor(next(accuracies) if self.top_k == 1 else 1.0)
    )
    original = checkpoints.write_atomically

    def full(path: Any, content: Any) -> None:
        records = folder / "epochs.csv"
        if Path(path).name == checkpoints.INCOMING and records.is_file() and len(epochs(folder)) == 4:
            raise OSError(28, "No space left on device")
        original(path, content)

    monkeypatch.setattr(checkpoints, "write_atomically", full)
    settings = {"checkpoint__every_n_epochs": 3, "checkpoint__every_n_steps": 1, "checkpoint__keep_best": "true"}
    settings["trainer__num_sanity_val_steps"] = 0
    with pytest.warns(UserWarning, match="No space left"):
        assert main(small_run(folder, task=PLAIN, **settings)) == 1, "the last epoch is lost"
    best = torch.load(folder / "best.ckpt", weights_only=True)
    assert (best["epoch"], best["global_step"]) == (1, 8)
    assert best["callbacks"]["RunCheckpoint"]["best"] == pytest.approx(0.6)
    last = torch.load(folder / "last.ckpt", weights_only=True)
    assert last["global_step"] == 15 and last["callbacks"]["RunCheckpoint"]["best"] == pytest.approx(0.6)


@pytest.mark.parametrize("rank", [0, 1])
def test_predictions_count_images_in_the_data_set(tmp_path: Path, rank: int) -> None:
    """Row r of rank k is image 2 r + k; the ones that could not be decoded have no row."""
    write_image_folder(tmp_path, classes=2, images=4)
    for number in (1, 2):
        (tmp_path / "val" / "class_0" / f"{number}.jpg").write_bytes(b"torn")
    data = ImageFolderData(str(tmp_path), image_size=16, workers=0, batch_size=3, on_corrupt="skip")
    loader = ImageLoader(data.make_reader("test"), batch_size=3, seed=0, share=lambda: (rank, 2))
    with pytest.warns(UserWarning, match="1 of 8 images could not be decoded"):
        batches = [
            {"class": batch.targets, "probability": torch.ones(len(batch.targets), dtype=torch.float64)}
            for batch in loader
        ]
    trainer = SimpleNamespace(
        predict_dataloaders=loader, global_rank=rank, world_size=2, default_root_dir=tmp_path, is_global_zero=rank == 0
    )
    Predictions().write_on_epoch_end(trainer, None, batches, [])  # type: ignore[arg-type]
    rows = read_table(tmp_path / f"predictions-{rank}.csv")[1]
    assert [(row["image"], row["class"]) for row in rows] == [
        [("0", "0"), ("4", "1"), ("6", "1")], [("1", "0"), ("3", "0"), ("5", "1"), ("7", "1")][1:],
    ][rank]  # fmt: skip


def test_the_module_can_be_taken_up_by_a_program(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = DistillationModule.load_from_checkpoint(trained / "last.ckpt", map_location="cpu")
    state = weights(trained)
    assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())
    assert module.eval()(torch.zeros(2, 3, 16, 16)).shape == (2, 10)


def test_progress_bar_shows_rate_and_parts(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(small_run(tmp_path / "run", trainer__enable_progress_bar="true", trainer__max_epochs=1)) == 0
    shown = "".join(capsys.readouterr())
    for text in ("images/s=", "loss=", "ce_student=", "ce_teacher=", "kd=", "feature="):
        assert text in shown


def test_plain_method_with_label_smoothing_and_bfloat16(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    words = small_run(folder, task=PLAIN, task__label_smoothing=0.1, trainer__precision="bf16-mixed")
    assert main([*words, "--trainer.max_epochs", "1"]) == 0
    rows = steps(folder)
    assert set(rows[0]) == {"step", "epoch", "loss", "ce_student"}
    assert all(math.isfinite(float(row["loss"])) for row in rows)


@pytest.mark.parametrize(
    "settings", [{"distill": "fit", "beta": 1.0}, {"distill": "od", "beta": 1e-4}, {"auxiliary": "sla"}]
)
def test_variants_train_from_the_command_line(tmp_path: Path, settings: dict[str, Any]) -> None:
    folder = tmp_path / "run"
    words = small_run(folder, data__mixup=0.0, **{f"task__{name}": value for name, value in settings.items()})
    assert main([*words, "--trainer.max_epochs", "1"]) == 0
    assert all(math.isfinite(float(value)) for row in steps(folder) for value in row.values())
    names = set(weights(folder))
    assert any(name.startswith("task.loss.") for name in names), "the loss's own parameters train and are saved"


def test_accumulated_gradients_resume_within_an_epoch(tmp_path: Path) -> None:
    """Two mixed batches a step, made by workers; stopped after the first step of an epoch and started again: as if it had
    not stopped, and as without workers."""
    settings = {"trainer__accumulate_grad_batches": 2, "trainer__max_epochs": 2, "checkpoint__every_n_steps": 1}
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert main(small_run(whole, **settings)) == 0
    settings["data__workers"] = 2
    assert main([*small_run(stopped, **settings), "--trainer.max_steps", "3"]) == 0
    assert torch.load(stopped / "last.ckpt", weights_only=True)["global_step"] == 3
    assert main(small_run(stopped, **settings)) == 0
    assert steps(stopped) == steps(whole) and len(steps(whole)) == 8
    for row in steps(whole):  # the loss of a batch, not its share in the step's
        parts = {name: float(row[name]) for name in ("ce_student", "ce_teacher", "kd", "feature")}
        expected = parts["ce_student"] + parts["ce_teacher"] + 2 * parts["kd"] + 100 * parts["feature"]
        assert float(row["loss"]) == pytest.approx(expected, rel=1e-5)
    assert epochs(stopped) == epochs(whole)
    assert checkpoints.find_checkpoint(stopped).progress == checkpoints.Progress(2, 4)  # type: ignore[union-attr]


def test_missing_data_is_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["fit", "--config", "cifar100_wrn16x2_plain", "--data.root", str(tmp_path / "nowhere")]
    assert main([*words, "--run_dir", str(tmp_path / "run"), "--trainer.accelerator", "cpu"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("frskd-fast fit: ") and str(tmp_path / "nowhere") in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("classes", ["null", "2"])
@pytest.mark.parametrize("part", ["train", "val"])
def test_an_incomplete_image_folder_is_a_sentence(
    tmp_path: Path, part: str, classes: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whether its classes are counted before the model is built, or its files are listed when training is set up."""
    write_image_folder(tmp_path / "data", classes=2, images=1)
    shutil.rmtree(tmp_path / "data" / part)
    words = small_run(tmp_path / "run", data="ImageFolderData", tensorboard="true", data__root=tmp_path / "data")
    assert main([*words, "--data.image_size", "16", "--data.classes", classes]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"frskd-fast fit: {tmp_path / 'data'}") and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_the_example_of_a_folder_of_ones_own_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The recipe that docs/data.md shows, on 32-pixel images of two classes."""
    document = (Path(__file__).parents[1] / "docs" / "data.md").read_text(encoding="utf-8")
    (recipe,) = (block.split("```")[0] for block in document.split("```yaml\n")[1:] if "# flowers.yaml" in block)
    monkeypatch.chdir(tmp_path)
    Path("flowers.yaml").write_text(recipe, encoding="utf-8")
    write_image_folder(tmp_path / "flowers", classes=2, images=2)
    words = ["--config", "flowers.yaml", "--data.image_size", "32", "--trainer.max_epochs", "1", "--data.workers", "0"]
    words += ["--model.backbone", "training_utils.SmallNet", "--trainer.accelerator", "cpu"]
    assert main(["fit", *words]) == 0
    assert main(["validate", *words]) == 0
    assert len(epochs(Path("runs/flowers"))) == 1


def test_errors_within_training_keep_their_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*_: Any) -> None:
        raise ValueError("a batch that the task does not take")

    monkeypatch.setattr(DistillationModule, "training_step", wrong)
    with pytest.raises(ValueError, match="a batch that the task"):
        main(small_run(tmp_path / "run"))
    assert (tmp_path / "run" / "config.yaml").is_file()


def test_a_run_without_a_validation_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = small_run(tmp_path / "run", trainer__max_epochs=1, trainer__check_val_every_n_epoch=2)
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "No validation took place (trainer.check_val_every_n_epoch is 2); frskd-fast validate" in out
    assert "Validation accuracy" not in out


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--model.backbone", "vgg"], "backbone is 'vgg', but one of"),
        (["--model.backbone", "builtins.dict"], "backbone gave a dict, but a torch.nn.Module was wanted"),
        (["--model.backbone", "timm:no_such_network"], "timm"),
        (["--data.batch_size", "0"], "batch_size is 0, but it must be at least 1."),
        (["--trainer.strategy", "no_such"], "You selected an invalid strategy name: `strategy='no_such'`"),
        (
            ["--lr_scheduler", f"{SCHEDULES}.cosine", "--trainer.max_epochs", "0"],
            "max_epochs is 0, but a cosine ends with",
        ),
        (["--model.weights", "no.pth"], "The checkpoint no.pth does not exist."),
        (["--data.mixup", "0.2", "--data.cutmix", "1"], "mixup is 0.2 and cutmix is 1.0"),
        (["--checkpoint.every_n_epochs", "0"], "every_n_epochs 0, but 0 or more and 1 or more"),
        (["--seed_everything", "true"], "--seed_everything is True, but a whole number was wanted"),
    ],
)
def test_wrong_settings_on_the_command_line_are_sentences(
    words: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*small_run(tmp_path / "run", data__mixup=0.0), *words]) == 1
    error = capsys.readouterr().err
    assert sentence in error and error.startswith("frskd-fast fit: ") and "Traceback" not in error


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_gpu_that_is_not_there_is_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*small_run(tmp_path / "run"), "--trainer.accelerator", "gpu"]) == 1
    assert "give --trainer.accelerator cpu or auto" in capsys.readouterr().err


def test_an_error_of_other_code_is_named_with_its_place() -> None:
    try:
        raise ValueError("Call to compute_fn of link 'a' failed: widths are odd") from outside()
    except ValueError as error:
        sentence = sentence_of(error)
    assert sentence.startswith(f"widths are odd (ValueError in {__file__}, line ")


def outside() -> ValueError:
    try:
        raise ValueError("widths are odd")
    except ValueError as error:
        return error


def test_usage_and_unknown_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0 and main([]) == 2
    out = capsys.readouterr().out
    assert all(command in out for command in ("fit", "validate", "test", "predict", "export", "panels", "recipes"))
    assert main(["train"]) == 2
    assert "'train' is no command" in capsys.readouterr().err


def test_panels_without_matplotlib_are_one_sentence(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(panels, "pyplot", lambda: None)
    assert main(small_run(tmp_path / "run", panels__enabled="true", trainer__max_epochs=1)) == 0
    assert capsys.readouterr().out.count("No panels were drawn, because matplotlib cannot be imported") == 1
    assert main(["panels", "--run_dir", str(trained)]) == 1
    assert "matplotlib cannot be imported" in capsys.readouterr().err


def test_panels_can_be_drawn_again(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Any] = []
    plots = panels.pyplot()
    assert plots is not None
    monkeypatch.setattr(plots, "close", drawn.append)
    (trained / "curves.png").unlink()
    assert main(["panels", "--run_dir", str(trained)]) == 0
    assert (trained / "curves.png").stat().st_size > 1000
    assert main(["panels", "--run_dir", str(trained / "tensorboard")]) == 1
    (figure,) = drawn
    assert figure.get_suptitle() == "run"
    for axes in figure.axes:
        assert all(line.get_marker() == "o" for line in axes.lines), "two points"
        assert all(float(tick).is_integer() for tick in axes.get_xticks())
    names = {text.get_text() for axes in figure.axes[:2] for text in axes.get_legend().get_texts()}
    assert {"student accuracy, training", "teacher accuracy, training", "student cross-entropy"} <= names
    monkeypatch.undo()
    plots.close(figure)


def test_recipes_and_export_do_not_wait_for_lightning() -> None:
    program = (
        "import sys\nfrom frskd_fast.training.cli import main\nmain(['recipes'])\n"
        "main(['export', '--checkpoint', 'no', '--out', 'no'])\n"
        "sys.exit(any(name.startswith(('lightning', 'torchmetrics')) for name in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


class NoReading:
    """Inside, reading a number from a tensor is an error."""

    METHODS = ("item", "tolist", "__float__", "__int__", "__bool__", "cpu", "numpy")

    def __enter__(self) -> None:
        self.saved = {name: getattr(torch.Tensor, name) for name in self.METHODS}
        for name in self.METHODS:
            setattr(torch.Tensor, name, self.refuse(name, self.saved[name]))

    def __exit__(self, *_: object) -> None:
        for name, method in self.saved.items():
            setattr(torch.Tensor, name, method)

    @staticmethod
    def refuse(name: str, original: Any) -> Any:
        def method(*arguments: Any, **more: Any) -> Any:
            # On a CPU alone operations look at their labels, to name one that is out of range.
            if sys._getframe(1).f_code in (check_label_range.__code__, native_logits.forward.__code__):
                return original(*arguments, **more)
            raise AssertionError(f"a step called {name} of a tensor, for which a GPU would have to be waited for")

        return method


class ReadingOnlyWhenLogging(Records):
    """Between a batch's start and its end nothing may be read, the records' own reading every N steps excepted."""

    def __init__(self) -> None:
        super().__init__()
        self.reads = 0

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        self.guard = NoReading()
        self.guard.__enter__()

    def on_exception(self, *_: Any) -> None:
        self.guard.__exit__()

    def on_train_batch_end(self, trainer: Any, *arguments: Any) -> None:
        due = trainer.fit_loop.total_batch_idx % trainer.log_every_n_steps == 0
        if due:
            self.guard.__exit__()
            self.reads += 1
        super().on_train_batch_end(trainer, *arguments)
        if not due:
            self.guard.__exit__()


@pytest.mark.filterwarnings("ignore")
def test_a_step_reads_nothing_from_the_device_but_every_n_steps(tmp_path: Path) -> None:
    records = ReadingOnlyWhenLogging()
    trainer = pl.Trainer(
        max_epochs=2, log_every_n_steps=4, default_root_dir=tmp_path, accelerator="cpu", logger=False,
        callbacks=[records, ProgressBar(every_n_steps=100)], enable_checkpointing=False, enable_model_summary=False,
    )  # fmt: skip
    # Hooks of the CPU optimiser aside, what the task, the module and the callbacks do in a step.
    module = DistillationModule(10, PLAIN, "training_utils.SmallNet", optimizer="torch.optim.SGD")
    module.optimizer_step = lambda epoch, index, optimizer, closure: closure()  # type: ignore[method-assign]
    trainer.fit(module, DigitsData(as_rgb=True, batch_size=20, evaluate_on="test"))
    assert records.reads == 3  # of 10 steps: the first, the fifth, the ninth
    assert len(steps(tmp_path)) == 3


def test_compile_reaches_the_task(monkeypatch: pytest.MonkeyPatch) -> None:
    from frskd_fast.tasks import FRSKDTask

    called = []
    monkeypatch.setattr(FRSKDTask, "compile", lambda self, *args, **kwargs: called.append(self))
    module = DistillationModule(10, DISTILLING, "wrn16x2", compile=True)
    assert called == [module.task]


def test_random_numbers_of_a_step_depend_on_seed_epoch_batch_and_process() -> None:
    seeds = {
        step_seed(*numbers) for numbers in ((10, 0, 0, 0), (11, 0, 0, 0), (10, 1, 0, 0), (10, 0, 1, 0), (10, 0, 0, 1))
    }
    assert len(seeds) == 5 and all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.parametrize("warmup", [0, 3])
@pytest.mark.parametrize("schedule", ["multistep", "cosine", "constant"])
def test_schedules_follow_their_formulas(schedule: str, warmup: int) -> None:
    total, milestones = 12, [5, 9]
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.2)
    if schedule == "cosine":
        scheduler = schedules.cosine(optimizer, total, warmup)
    else:
        scheduler = schedules.multistep(optimizer, milestones if schedule == "multistep" else [], 0.1, warmup)
    for epoch in range(total):
        if epoch < warmup:
            expected = 0.2 * (epoch + 1) / (warmup + 1)
        elif schedule == "multistep":
            expected = 0.2 * 0.1 ** sum(milestone <= epoch for milestone in milestones)
        elif schedule == "cosine":
            expected = 0.2 * (1 + math.cos(math.pi * (epoch - warmup) / (total - warmup))) / 2
        else:
            expected = 0.2
        assert optimizer.param_groups[0]["lr"] == pytest.approx(expected, abs=1e-12), epoch
        optimizer.step()
        scheduler.step()
        torch.save(scheduler.state_dict(), buffer := io.BytesIO())
        buffer.seek(0)
        torch.load(buffer, weights_only=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"task": "no_such_package.Task"}, r"'no_such_package\.Task' cannot be imported"),
        ({"task": {"class_path": DISTILLING, "init_args": {"distill": "kd"}}}, "distill is 'kd', but 'att'"),
        ({"backbone": "vgg"}, "backbone is 'vgg', but one of .*cifar_resnet50"),
    ],
)
def test_wrong_settings_are_sentences(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises((ImportError, ValueError), match=message):
        DistillationModule(**{"num_classes": 10, "task": PLAIN, "backbone": "wrn16x2", **arguments})


def test_a_warm_up_of_less_than_nothing_is_a_sentence() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.2)
    with pytest.raises(ValueError, match="warmup_epochs is -1, but 0 or more was wanted"):
        schedules.multistep(optimizer, warmup_epochs=-1)


def test_backbones_by_import_path() -> None:
    assert isinstance(create_model("training_utils.SmallNet", 4), SmallNet)
    with pytest.raises(ImportError, match=r"'no_such_package\.Net' cannot be imported"):
        create_model("no_such_package.Net", 4)
    with pytest.raises(TypeError, match=r"a torch\.nn\.Module was wanted"):
        create_model("builtins.dict", 4)


def test_mean_of_parts_weighs_by_images_and_survives_saving() -> None:
    mean, reference = MeanOfParts(["loss", "kd"]), torch.zeros(2, dtype=torch.float64)
    for count in (3, 5, 1):
        parts = torch.rand(2)
        mean.update(list(parts), count)
        reference += parts.double() * count
    restored = MeanOfParts.restored(mean.saved())
    for metric in (mean, restored):
        assert metric.means() == dict(zip(["loss", "kd"], (reference / 9).tolist(), strict=True))
    restored.update([torch.tensor(1.0), torch.tensor(1.0)], 1)
    assert mean.means()["loss"] == reference[0].item() / 9, "a copy"


def test_fraction_correct_of_mixed_labels() -> None:
    logits = torch.eye(4)
    first, second = torch.tensor([0, 1, 2, 0]), torch.tensor([0, 0, 0, 3])
    assert fraction_correct(logits, first).item() == 0.75
    assert fraction_correct(logits, (first, second, 0.25)).item() == pytest.approx(0.25 * 0.75 + 0.75 * 0.5)


@pytest.fixture
def table(tmp_path: Path) -> Iterator[Table]:
    table = Table(tmp_path / "table.csv", "step", 0)
    for step in range(4):
        table.append({"step": step, "loss": 0.1 * step})
    yield table


def test_table_takes_new_columns_and_keeps_old_rows(table: Table) -> None:
    table.append({"step": 4, "loss": 0.5, "kd": 1e-20})
    columns, rows = read_table(table.path)
    assert columns == ["step", "loss", "kd"] and len(rows) == 5
    assert rows[0] == {"step": "0", "loss": "0.0", "kd": ""} and float(rows[4]["kd"]) == 1e-20
    assert float(rows[3]["loss"]) == 0.1 * 3, "every digit is written"


def test_table_mends_a_torn_line_and_drops_rows_to_be_repeated(table: Table) -> None:
    with open(table.path, "a", encoding="utf-8") as file:
        file.write("4,0.")
    again = Table(table.path, "step", keep_below=3)
    again.append({"step": 3, "loss": 7.0})
    assert [(row["step"], row["loss"]) for row in read_table(table.path)[1]] == [
        ("0", "0.0"), ("1", "0.1"), ("2", "0.2"), ("3", "7.0"),
    ]  # fmt: skip
    assert not Table(table.path, "step", keep_below=0).path.exists()


def test_table_keeps_rows_that_a_full_disk_refuses(table: Table, monkeypatch: pytest.MonkeyPatch) -> None:
    before = table.path.read_bytes()

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.warns(UserWarning, match="No space left") as warned:
        patch.setattr("builtins.open", full)
        table.append({"step": 4, "loss": 0.4})
        table.append({"step": 5, "loss": 0.5})
    assert len(warned) == 1 and table.path.read_bytes() == before
    table.append({"step": 6, "loss": 0.6})
    assert [row["step"] for row in read_table(table.path)[1]] == ["0", "1", "2", "3", "4", "5", "6"]


def test_throughput_leaves_pauses_out(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 2.0, 10.0, 11.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    rate = Throughput()
    rate.start()  # 0
    rate.add(20)  # 2
    rate.pause()
    rate.start()  # 10
    rate.add(10)  # 11
    assert rate.images == 30 and rate.seconds == 3.0 and rate.images_per_second == 10.0
