"""`frskd-fast`: fit, validate, test, predict, export, panels and recipes."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import recipe_files
from .recipe_files import CONFIG, RecipeError

if TYPE_CHECKING:
    from jsonargparse import Namespace
    from lightning.pytorch import Trainer
    from lightning.pytorch.cli import LightningCLI

    from .callbacks import Beginning

STAGES = ("fit", "validate", "test", "predict")
USAGE = """\
usage: frskd-fast COMMAND [options]

  fit --config RECIPE       train; a run that was interrupted goes on where its last checkpoint is
  validate --config RECIPE  accuracy of the run's student on the validation images
  test --config RECIPE      the same on the test images
  predict --config RECIPE   class of each test image, into predictions.csv
  export --checkpoint FILE --out FILE
                            the student alone: .safetensors, .pt2 (torch.export) or .onnx, verified
  panels --run_dir FOLDER   draw the curves of a run again
  recipes [RECIPE]          list the recipes of the package, or print one with its base filled in

RECIPE is a name from `frskd-fast recipes` or a YAML file; without --config it is digits. Every setting can be overridden:

  frskd-fast fit --config cifar100_resnet18_frskd --data.root DATA --trainer.max_epochs 100 --model.beta 50
  frskd-fast fit --config digits --print_config      the settings, resolved
  frskd-fast fit --help                              all of them
"""
DEFAULT_RECIPE = "digits"
# What constructors and readers raise of wrong settings, and how errors begin that hold another one.
MISTAKES = (ValueError, TypeError, ImportError)
WRAPPED = ("Call to compute_fn of link", "Does not validate against any of the Union subtypes")
# Settings of the data that change how fast batches come, not which.
HARMLESS_DATA = ("root", "workers", "pin_memory", "persistent_workers", "evaluation_batch_size")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status.

    Args:
        arguments: the words after `frskd-fast`; None takes those of the process.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0 if words else 2
    command, rest = words[0], words[1:]
    try:
        if command == "recipes":
            return _recipes(rest)
        if command == "export":
            from . import export

            return export.main(rest)
        if command == "panels":
            return _panels(rest)
        if command in STAGES:
            run(command, rest)
            return 0
    except (Refusal, RecipeError) as error:
        print(f"frskd-fast {command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"frskd-fast {command}: stopped.", file=sys.stderr)
        return 128 + signal.SIGINT
    print(f"frskd-fast: {command!r} is no command.\n\n{USAGE}", end="", file=sys.stderr)
    return 2


class Refusal(Exception):
    """Why a command does not do what was asked, as a sentence with what to do."""


def _recipes(words: Sequence[str]) -> int:
    if words and words[0] in ("-h", "--help"):
        print("usage: frskd-fast recipes [RECIPE]")
        return 0
    if words:
        import yaml

        print(yaml.safe_dump(recipe_files.recipe(words[0]), sort_keys=False), end="")
        return 0
    names = recipe_files.recipe_names()
    width = max(len(name) for name in names)
    for name in names:
        print(f"{name.ljust(width)}  {recipe_files.summary(name)}")
    return 0


def _panels(words: Sequence[str]) -> int:
    import argparse

    parser = argparse.ArgumentParser(prog="frskd-fast panels", description="Draw the curves of a run again.")
    parser.add_argument("--run_dir", required=True, help="the run's folder")
    folder = parser.parse_args(words).run_dir
    from . import panels

    if panels.pyplot() is None:
        raise Refusal("matplotlib cannot be imported; pip install 'frskd_fast[plot]'.")
    path = panels.draw_curves(folder)
    if path is None:
        raise Refusal(f"{folder} holds no epochs.csv with an epoch in it; give the folder of a run.")
    print(f"Panel: {path}")
    return 0


def expanded(words: Sequence[str]) -> tuple[list[str], str]:
    """The words with recipes replaced by their settings, and the name for the run's folder.

    Args:
        words: of the command line; `--config NAME`, `--config=NAME` and `-c NAME` are looked for. Without one the default
            recipe is put first.

    Example:
        >>> words, name = expanded(["--config", "cifar100_resnet18_plain", "--model.momentum", "0.8"])
        >>> name, words[0], words[2:]
        ('cifar100_resnet18_plain', '--config', ['--model.momentum', '0.8'])
    """
    result: list[str] = []
    names: list[str] = []
    rest = iter(words)
    for word in rest:
        flag, equals, value = word.partition("=")
        if flag not in ("--config", "-c"):
            result.append(word)
            continue
        if not equals:
            value = next(rest, "")
        if not value:
            raise Refusal("--config needs the name of a recipe or a YAML file; `frskd-fast recipes` lists the names.")
        result += ["--config", json.dumps(recipe_files.recipe(value))]
        names.append(Path(value).name.removesuffix(".yaml"))
    if not names:
        result = ["--config", json.dumps(recipe_files.recipe(DEFAULT_RECIPE)), *result]
        names = [DEFAULT_RECIPE]
    return result, names[0]


def run(stage: str, words: Sequence[str]) -> LightningCLI:
    """Run one of Lightning's stages; returns the `LightningCLI` with `.trainer`, `.model` and `.datamodule`.

    Args:
        stage: "fit", "validate", "test" or "predict".
        words: what follows on the command line.

    Raises:
        Refusal: as a sentence, when the run's folder and the settings do not fit together.
    """
    arguments, name = expanded(words)
    try:
        cli_class = _cli_class()
    except ImportError as error:
        raise Refusal(f"{error.name} cannot be imported; pip install 'frskd_fast[train]'.") from error
    _quieten()
    from .data import DataFileError

    try:
        command_line: LightningCLI = cli_class(name, [stage, *arguments])
        return command_line
    except DataFileError as error:
        raise Refusal(str(error)) from error


def _quieten() -> None:
    """Leave out Lightning's hints about itself; its warnings stay, but for three that do not apply here."""
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric.utilities.seed").setLevel(logging.WARNING)
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # of Lightning's calls, not ours
    for message in (
        r".*isinstance\(treespec, LeafSpec\)` is deprecated.*",  # Lightning's own
        r".*Couldn't infer the batch indices.*",  # predictions come in the order of the data
        r".*recommended to use `self.log.*sync_dist=True.*",  # what is logged has been reduced
        # Of 1 x 1 kernels, whose two layouts are one and the same memory.
        r"Grad strides do not match bucket view strides[\s\S]*grad\.sizes\(\) = \[\d+, \d+, 1, 1\]",
        r".*does not have many workers.*",  # our readers say themselves where workers help
        r".*number of training batches .* is smaller than the logging interval.*",
        r".*lr_scheduler\.step\(\)` before `optimizer\.step\(\)`.*",  # a resumed schedule
    ):
        warnings.filterwarnings("ignore", message=message)


def _cli_class() -> Any:
    import torch
    from lightning.fabric.utilities.exceptions import MisconfigurationException
    from lightning.pytorch.callbacks import ModelSummary
    from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
    from lightning.pytorch.utilities import rank_zero_only
    from lightning.pytorch.utilities.exceptions import SIGTERMException

    from .callbacks import Beginning, Events, Predictions, ProgressBar, Records
    from .checkpoints import AtomicCheckpointIO, RunCheckpoint, find_checkpoint
    from .data import ImageData
    from .export import ExportError
    from .module import DistillationModule
    from .panels import Panels

    mistakes = (*MISTAKES, FileNotFoundError, MisconfigurationException)

    @rank_zero_only
    def say(text: str) -> None:
        print(text, flush=True)

    class FRSKDCommandLine(LightningCLI):
        """Lightning's command line with a folder for each run, resuming, and loggers."""

        def __init__(self, name: str, arguments: Sequence[str]) -> None:
            self.run_name = name
            self.stage = arguments[0]
            super().__init__(
                DistillationModule,
                ImageData,
                subclass_mode_data=True,
                save_config_callback=None,
                seed_everything_default=10,
                auto_configure_optimizers=False,
                load_from_checkpoint_support=False,
                args=list(arguments),
            )

        def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
            """The stage that was asked for: each takes its time to set up."""
            return {self.stage: LightningCLI.subcommands()[self.stage]}

        def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
            parser.add_argument(
                "--run_dir",
                type=str | None,
                default=None,
                help="Folder of the run: checkpoints, records, panels. null is runs/RECIPE.",
            )
            parser.add_argument(
                "--fresh",
                type=bool,
                default=False,
                help="Begin anew; what the run's folder holds is moved to a folder beside it.",
                nargs="?",
                const=True,
            )
            parser.add_argument(
                "--tensorboard",
                type=bool | None,
                default=None,
                help="Write TensorBoard events; null does so where tensorboard can be imported.",
            )
            parser.add_argument("--wandb", type=str | None, default=None, help="Weights & Biases: name of the project.")
            parser.add_lightning_class_args(RunCheckpoint, "checkpoint")
            parser.add_lightning_class_args(ProgressBar, "progress")
            parser.add_lightning_class_args(Panels, "panels")
            parser.link_arguments("data", "model.num_classes", compute_fn=_classes_of, apply_on="instantiate")
            parser.link_arguments("seed_everything", "data.init_args.seed", compute_fn=int)

        def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
            # Lightning's own warns that sys.argv is not what it parses.
            self.config = parser.parse_args(args)
            seed = self.config[self.stage]["seed_everything"]
            if isinstance(seed, bool):
                raise Refusal(
                    f"--seed_everything is {seed}, but a whole number was wanted: images and augmentation follow from it, "
                    "and a run that goes on needs the same again."
                )

        def instantiate_classes(self) -> None:
            """What a constructor says of its arguments is for the user; a traceback would hide it."""
            try:
                super().instantiate_classes()
            except (*mistakes, ExportError) as error:
                raise Refusal(sentence_of(error)) from error

        def _parse_ckpt_path(self) -> None:
            """Settings come from the recipe, not from the checkpoint."""

        @property
        def folder(self) -> Path:
            return Path(self._get(self.config, "run_dir") or Path("runs") / self.run_name)

        def instantiate_trainer(self, **kwargs: Any) -> Trainer:
            settings: Namespace = self._get(self.config_init, "trainer")
            kwargs["default_root_dir"] = str(self.folder)
            plugins = settings.get("plugins") or []
            kwargs["plugins"] = [AtomicCheckpointIO(), *(plugins if isinstance(plugins, list) else [plugins])]
            if settings.get("logger") in (None, True):
                kwargs["logger"] = self.loggers()
            if settings.get("enable_progress_bar") is False:
                # Lightning refuses a bar beside this switch.
                self._parser(self.subcommand).callback_keys.remove("progress")
            callbacks = settings.get("callbacks") or []
            callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
            self.beginning = Beginning()
            own: list[Any] = [self.beginning, Records(), Predictions()]
            if settings.get("enable_model_summary") is not False and not settings.get("fast_dev_run"):
                own.append(ModelSummary(max_depth=2))  # the networks within the task
            kwargs["callbacks"] = [*own, *callbacks]
            processes = int(os.environ["WORLD_SIZE"]) if "TORCHELASTIC_RUN_ID" in os.environ else None
            if processes is not None and settings.get("num_nodes") == 1:
                # Their number changes where torchrun may start with fewer nodes again.
                kwargs["num_nodes"] = int(os.environ["GROUP_WORLD_SIZE"])
            try:
                trainer: Trainer = super().instantiate_trainer(**kwargs)
            except MisconfigurationException as error:
                names = ("accelerator", "devices", "strategy", "precision")
                listed = ", ".join(f"trainer.{name} {settings.get(name)}" for name in names)
                without = settings.get("accelerator") in ("gpu", "cuda") and not torch.cuda.is_available()
                cpu = " PyTorch finds no GPU here; give --trainer.accelerator cpu or auto." if without else ""
                raise Refusal(f"The trainer cannot be set up with {listed}: {sentence_of(error)}{cpu}") from error
            if processes not in (None, trainer.num_nodes * trainer.num_devices):
                # Lightning would train the whole set in each, or leave the images of missing ones out.
                raise Refusal(
                    f"torchrun started {processes} processes on {os.environ['GROUP_WORLD_SIZE']} nodes, but the settings say "
                    f"{trainer.num_devices} on {trainer.num_nodes}; give --trainer.devices the number on a node."
                )
            return trainer

        def loggers(self) -> list[Any]:
            """TensorBoard and Weights & Biases, as asked for; CSV files are written without a logger."""
            result: list[Any] = []
            if self.subcommand != "fit" or self._get(self.config, "trainer").get("fast_dev_run"):
                return result
            tensorboard = self._get(self.config, "tensorboard")
            if tensorboard is not False:
                try:
                    import torch.utils.tensorboard  # noqa: F401

                    result.append(Events(self.folder, name="", version="tensorboard"))
                except ImportError as error:
                    if tensorboard:
                        raise Refusal(f"--tensorboard true, but it cannot be imported ({error}).") from error
            project = self._get(self.config, "wandb")
            if project:
                try:
                    from lightning.pytorch.loggers import WandbLogger

                    result.append(WandbLogger(name=self.folder.name, project=project, save_dir=self.folder))
                except ImportError as error:
                    raise Refusal(f"--wandb {project}, but wandb cannot be imported; pip install wandb.") from error
            return result

        def settings(self) -> dict[str, Any]:
            """All settings of the run, as plain values."""
            import yaml

            parser = self._parser(self.subcommand)
            text = parser.dump(self.config[str(self.subcommand)], skip_unset=False, format="yaml")
            settings: dict[str, Any] = yaml.safe_load(text)
            return settings

        def fit(self, **kwargs: Any) -> None:
            """Train, from the run's last checkpoint where there is one."""
            import yaml

            folder, trainer = self.folder, self.trainer
            if trainer.fast_dev_run:  # type: ignore[attr-defined]
                self.begin(trainer.fit, **kwargs)
                return
            settings = self.settings()
            if self._get(self.config, "fresh"):
                moved = set_aside(folder) if trainer.global_rank == 0 else None
                if moved is not None:
                    say(f"What was in {folder} is now in {moved}.")
            elif kwargs.get("ckpt_path") is None:
                try:
                    found = find_checkpoint(folder)
                except RuntimeError as error:
                    raise Refusal(str(error)) from error
                if found is not None:
                    for sentence in found.passed_over:
                        say(sentence)
                    _check_settings(folder, settings)
                    _check_length(folder, settings)
                    epochs = trainer.max_epochs
                    steps = trainer.max_steps
                    if (epochs is not None and 0 <= epochs <= found.progress.epochs) or (
                        0 <= steps <= found.progress.steps
                    ):
                        longer = "--trainer.max_epochs with a larger number goes on, --fresh begins anew."
                        if settings["model"]["schedule"] == "cosine":
                            longer = (
                                "Its length is part of the cosine schedule; --fresh or another --run_dir begins anew."
                            )
                        say(
                            f"The run in {folder} is finished: {found.progress.epochs} epochs, {found.progress.steps} steps. "
                            f"{longer}"
                        )
                        return
                    kwargs["ckpt_path"] = str(found.path)
                    say(
                        f"The run in {folder} goes on after step {found.progress.steps}, in epoch "
                        f"{found.progress.epochs + 1}, from {found.path.name}."
                    )
                elif folder.is_dir() and any(folder.glob("*.csv")) and trainer.global_rank == 0:
                    say(f"{folder} holds no checkpoint; the run begins anew.")
            self.beginning.config = yaml.safe_dump(settings, sort_keys=False).encode()
            there = {path for path in (folder, folder / "tensorboard") if path.exists()}
            with Interrupt(trainer, self.beginning) as interrupt:
                try:
                    self.begin(trainer.fit, **kwargs)
                except SIGTERMException:
                    number = signal.SIGINT if interrupt.times else signal.SIGTERM
                    say(
                        f"Stopped by {number.name} after {trainer.global_step} steps; the same command goes on from there."
                    )
                    raise SystemExit(128 + number) from None
                except SystemExit:
                    if not interrupt.times:
                        raise
                    on = (
                        "the same command goes on from the last checkpoint"
                        if self.beginning.over
                        else "nothing was trained"
                    )
                    say(f"Stopped at once; {on}.")
                    raise SystemExit(128 + signal.SIGINT) from None
                finally:
                    if not self.beginning.over and trainer.global_rank == 0:
                        _leave_nothing(folder, there)
            if trainer.state.finished:
                self.report()

        def report(self) -> None:
            folder = self.folder
            accuracy = self.trainer.callback_metrics.get("validation/accuracy")
            if accuracy is not None:
                say(f"Validation accuracy of the student: {100 * float(accuracy):.2f} %.")
            elif not self.beginning.validated:
                say(
                    f"No validation took place (trainer.check_val_every_n_epoch is {self.trainer.check_val_every_n_epoch}); "
                    "frskd-fast validate with the same options gives the accuracy of the student."
                )
            say(f"Records and checkpoints: {folder} (steps.csv, epochs.csv, last.ckpt).")
            say(f"The student alone: frskd-fast export --checkpoint {folder / 'last.ckpt'} --out student.safetensors")

        def begin(self, work: Callable[..., Any], **kwargs: Any) -> None:
            """Call one of the trainer's methods; a mistake found before the first batch is a sentence."""
            try:
                work(**kwargs)
            except mistakes as error:
                if self.beginning.over:
                    raise
                raise Refusal(sentence_of(error)) from error

        def validate(self, **kwargs: Any) -> None:
            self.begin(self.trainer.validate, **self.with_checkpoint(kwargs))

        def test(self, **kwargs: Any) -> None:
            self.begin(self.trainer.test, **self.with_checkpoint(kwargs))

        def predict(self, **kwargs: Any) -> None:
            self.begin(self.trainer.predict, **{**self.with_checkpoint(kwargs), "return_predictions": False})

        def with_checkpoint(self, kwargs: dict[str, Any]) -> dict[str, Any]:
            """Without --ckpt_path: the run's own last checkpoint."""
            if kwargs.get("ckpt_path") is not None:
                return kwargs
            try:
                found = find_checkpoint(self.folder)
            except RuntimeError as error:
                raise Refusal(str(error)) from error
            if found is None:
                if self.trainer.fast_dev_run:  # type: ignore[attr-defined]
                    return kwargs
                raise Refusal(f"{self.folder} holds no checkpoint; train first, or give --ckpt_path a file.")
            for sentence in found.passed_over:
                say(sentence)
            say(f"Weights: {found.path}, after {found.progress.epochs} epochs.")
            return {**kwargs, "ckpt_path": str(found.path)}

    return FRSKDCommandLine


class Interrupt:
    """Within it the first SIGINT (Ctrl-C) stops a fit as SIGTERM does, and a second one at once.

    Args:
        trainer: whose fit it is.
        beginning: tells whether there is anything to save yet; before, the first SIGINT stops at once.
    """

    def __init__(self, trainer: Trainer, beginning: Beginning) -> None:
        self.trainer, self.beginning = trainer, beginning
        self.process = os.getpid()
        self.times = 0
        self.before: Any = None

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():  # no other may set a handler
            self.before = signal.signal(signal.SIGINT, self.told)
        return self

    def __exit__(self, *_: object) -> None:
        if self.before is not None:
            signal.signal(signal.SIGINT, self.before)

    def told(self, number: int, frame: Any) -> None:
        """The handler. Workers, forked from this process, have it too; the trainer's process ends them."""
        if os.getpid() != self.process:
            return
        self.times += 1
        if self.times > 1 or not self.beginning.over:
            raise KeyboardInterrupt
        # Lightning asks for it after each step, and tells it to the other processes.
        self.trainer._signal_connector.received_sigterm = True


def sentence_of(error: BaseException) -> str:
    """What an error says, without what wraps it; where code of others says it, with the file and the line."""
    while str(error).startswith(WRAPPED):
        inner = error.__cause__ or error.__context__
        if inner is None:
            break
        error = inner
    text = str(error).strip() or type(error).__name__
    frames = traceback.extract_tb(error.__traceback__)
    ours = Path(__file__).resolve().parents[1]
    if frames and not isinstance(error, ImportError | FileNotFoundError):
        file = Path(frames[-1].filename)
        if ours not in file.resolve().parents and "lightning" not in file.parts:
            text += f" ({type(error).__name__} in {file}, line {frames[-1].lineno})"
    return text


def _leave_nothing(folder: Path, there: set[Path]) -> None:
    """After a start that failed: remove the loggers' folder, and the run's, where they were not there before."""
    if (folder / CONFIG).exists():
        return  # of a run that has begun, perhaps in other processes
    if folder / "tensorboard" not in there:
        shutil.rmtree(folder / "tensorboard", ignore_errors=True)
    if folder not in there and folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def _classes_of(data: Any) -> int:
    return int(data.num_classes)


def _check_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Refuse to go on with a run whose model, data or seed were set differently."""
    before = _settings_of(folder)
    if before is None:
        return
    differences = []
    for part in ("seed_everything", "model", "data"):
        differences += _differences(part, before.get(part), settings.get(part))
    differences = [(name, old, new) for name, old, new in differences if name.rsplit(".", 1)[-1] not in HARMLESS_DATA]
    if differences:
        listed = "; ".join(f"{name} was {old!r} and is {new!r}" for name, old, new in differences[:4])
        raise Refusal(
            f"{folder} holds a run with other settings: {listed}. Give --run_dir another folder, or --fresh to begin anew."
        )


def _check_length(folder: Path, settings: dict[str, Any]) -> None:
    """Refuse to go on with a cosine that was laid out over another number of epochs."""
    before, now = ((part or {}).get("trainer", {}).get("max_epochs") for part in (_settings_of(folder), settings))
    if settings["model"]["schedule"] == "cosine" and before not in (None, now):
        raise Refusal(
            f"The learning rate of the run in {folder} falls by a cosine over {before} epochs, but trainer.max_epochs is "
            f"{now}, and the steps so far would have been others. Give {before} again, or --run_dir another folder, or "
            "--fresh to begin anew; runs with model.schedule multistep or constant can be prolonged."
        )


def _settings_of(folder: Path) -> dict[str, Any] | None:
    """The settings with which the run was last started."""
    import yaml

    file = folder / CONFIG
    return (yaml.safe_load(file.read_text(encoding="utf-8")) or {}) if file.is_file() else None


def _differences(name: str, before: Any, now: Any) -> list[tuple[str, Any, Any]]:
    if isinstance(before, dict) and isinstance(now, dict):
        found = []
        for key in dict.fromkeys([*before, *now]):
            found += _differences(f"{name}.{key}", before.get(key), now.get(key))
        return found
    return [] if before == now else [(name, before, now)]


def set_aside(folder: Path) -> Path | None:
    """Rename a folder that is there to FOLDER.old-1, -2, ..., the first that is free; None where there is none."""
    if not folder.is_dir():
        return None
    number = 1
    while (target := folder.with_name(f"{folder.name}.old-{number}")).exists():
        number += 1
    folder.rename(target)
    return target
