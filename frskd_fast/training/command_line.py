"""Lightning's command line with a folder for each run, resuming, and loggers."""

from __future__ import annotations

import errno
import operator
import os
import signal
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelSummary
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, LRSchedulerTypeTuple
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch.optim import Optimizer

from frskd_fast.models.checkpoints import brief
from frskd_fast.models.teachers import needs_trust
from frskd_fast.tasks import Task

from .beginning import Beginning, Interrupt
from .checkpoints import AtomicCheckpointIO, Found, RunCheckpoint, check_given, find_checkpoint
from .class_paths import PARTS
from .data import ImageData
from .errors import Refusal, sentence_of
from .finite import FiniteGuard, OnNan
from .guard import RunGuard
from .lock import RunLock
from .loggers import loggers
from .module import DistillationModule
from .panels import Panels
from .progress import ProgressBar
from .records import Masks, Predictions, Records
from .run_folder import check_same_run, is_over, leave_nothing, length_matters, set_aside
from .teacher_cache import TeacherCache

if TYPE_CHECKING:
    from jsonargparse import Namespace

# What constructors and readers raise of wrong settings.
MISTAKES = (ValueError, TypeError, ImportError, FileNotFoundError, MisconfigurationException)
# What restoring raises of a checkpoint of other settings. Errors of memory, devices and processes are classes below these.
UNFIT = (RuntimeError, KeyError, IndexError, AttributeError, ValueError, TypeError)
LARGEST_SEED = 2**32 - 1  # of NumPy's generator
# What a disk says on which nothing can be written.
UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)
# The parts that the module builds, by their classes.
CLASSES: dict[str, Any] = {"task": Task, "optimizer": Optimizer, "lr_scheduler": LRSchedulerTypeTuple}


@rank_zero_only
def say(text: str) -> None:
    """Print, in one of the processes."""
    print(text, flush=True)


class CommandLine(LightningCLI):
    """One stage of Lightning's command line; afterwards there are `.trainer`, `.model` and `.datamodule`.

    Args:
        name: of the run's folder, where the settings name none.
        arguments: the stage, "fit", "validate", "test" or "predict", and its options.
        before: called once the arguments are known to be right, with this object, before anything is built.

    Raises:
        Refusal: as a sentence, when the run's folder and the settings do not fit together.
    """

    def __init__(
        self, name: str, arguments: Sequence[str], before: Callable[[CommandLine], None] | None = None
    ) -> None:
        self.run_name, self.before = name, before
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
        """Add the parts that the module builds, and the options of a run."""
        for name, given in PARTS.items():
            settings: dict[str, Any] = {"required": name != "lr_scheduler", "instantiate": False, "fail_untyped": False}
            parser.add_subclass_arguments(CLASSES[name], name, skip={given}, **settings)
            parser.link_arguments(name, f"model.{name}", compute_fn=_plain)
        folder = "Folder of the run: checkpoints, records, panels. null is runs/RECIPE."
        fresh = "Begin anew; what the run's folder holds is moved to a folder beside it."
        events = "Write TensorBoard events; null does so where tensorboard can be imported."
        kept = "Folder in which a frozen teacher's outputs are kept, so that it runs in the first epoch alone."
        maps = "Keep the teacher's feature maps there, too, which are large."
        half = "Keep its outputs in half precision."
        parser.add_argument("--run_dir", type=str | None, default=None, help=folder)
        parser.add_argument("--fresh", type=bool, default=False, help=fresh, nargs="?", const=True)
        parser.add_argument("--tensorboard", type=bool | None, default=None, help=events)
        guard = (
            "Stop where a term of the loss, or all gradients of a module, are exactly zero in the first three steps."
        )
        parser.add_argument("--guard", type=bool, default=True, help=guard)
        nan = (
            "Where the loss or weights are not finite: stop the run and keep its last checkpoint, skip steps whose gradients "
            "are not finite (which waits for the device in each step), or continue."
        )
        parser.add_argument("--on_nan", type=OnNan, default="stop", help=nan)
        parser.add_argument("--teacher_cache", type=str | None, default=None, help=kept)
        parser.add_argument("--teacher_cache_features", type=bool, default=False, help=maps)
        parser.add_argument("--teacher_cache_half", type=bool, default=False, help=half)
        parser.add_argument("--wandb", type=str | None, default=None, help="Weights & Biases: name of the project.")
        parser.add_lightning_class_args(RunCheckpoint, "checkpoint")
        parser.add_lightning_class_args(ProgressBar, "progress")
        parser.add_lightning_class_args(Panels, "panels")
        parser.link_arguments(
            "data", "model.num_classes", compute_fn=operator.attrgetter("num_classes"), apply_on="instantiate"
        )
        parser.link_arguments("seed_everything", "data.init_args.seed", compute_fn=int)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse; Lightning's own warns that sys.argv is not what it parses."""
        self.config = parser.parse_args(args)
        seed = self.config[self.stage]["seed_everything"]
        if isinstance(seed, bool):
            raise Refusal(
                f"--seed_everything is {seed}, but a whole number was wanted: images and augmentation follow from it, "
                "and a run that goes on needs the same again."
            )
        if not 0 <= seed <= LARGEST_SEED:
            raise Refusal(f"--seed_everything is {seed}, but a whole number from 0 to {LARGEST_SEED} was wanted.")

    def before_instantiate_classes(self) -> None:
        """Make way for what has to come first; the seed is set again after it."""
        for path in (self.folder, *self.folder.parents):
            if path.exists() and not path.is_dir():
                raise Refusal(
                    f"--run_dir is {self.folder}, but {path} is a file; give a folder, which need not exist yet."
                )
        if self.before is not None:
            self.before(self)
            self._set_seed()

    @property
    def only_tried(self) -> bool:
        """Whether a few batches are all that is wanted."""
        return bool(self._get(self.config, "trainer").get("fast_dev_run"))

    def instantiate_classes(self) -> None:
        """What a constructor says of its arguments is for the user; a traceback would hide it."""
        try:
            super().instantiate_classes()
        except MISTAKES as error:
            raise Refusal(sentence_of(error)) from error

    def _parse_ckpt_path(self) -> None:
        """Settings come from the recipe, not from the checkpoint."""

    @property
    def folder(self) -> Path:
        """Of the run."""
        return Path(self._get(self.config, "run_dir") or Path("runs") / self.run_name)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """The trainer with this library's callbacks, loggers and checkpoint files, on the processes that torchrun started."""
        settings: Namespace = self._get(self.config_init, "trainer")
        kwargs["default_root_dir"] = str(self.folder)
        plugins = settings.get("plugins") or []
        kwargs["plugins"] = [AtomicCheckpointIO(), *(plugins if isinstance(plugins, list) else [plugins])]
        if settings.get("logger") in (None, True):
            quiet = self.subcommand != "fit" or settings.get("fast_dev_run")
            asked = (self._get(self.config, name) for name in ("tensorboard", "wandb"))
            kwargs["logger"] = [] if quiet else loggers(self.folder, *asked)
        if settings.get("enable_progress_bar") is False:
            # Lightning refuses a bar beside this switch.
            self._parser(self.subcommand).callback_keys.remove("progress")
        callbacks = settings.get("callbacks") or []
        callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
        self.beginning = Beginning()
        maps = self.model.task.predicts == "maps"
        writer = Masks(self.model.hparams["num_classes"]) if maps else Predictions()
        own: list[Any] = [self.beginning, Records(), writer]
        if settings.get("enable_model_summary") is not False and not settings.get("fast_dev_run"):
            own.append(ModelSummary(max_depth=2))  # the networks within the task
        if self.subcommand == "fit":
            folder, features, half = (
                self._get(self.config, f"teacher_cache{name}") for name in ("", "_features", "_half")
            )
            if folder is not None:
                own.append(TeacherCache(folder, features=features, half=half))
            own.append(FiniteGuard(self._get(self.config, "on_nan")))
            if self._get(self.config, "guard"):
                own.append(RunGuard())
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

    def settings(self) -> dict[str, Any]:
        """All settings of the run, as values of YAML."""
        parser = self._parser(self.subcommand)
        text = parser.dump(self.config[str(self.subcommand)], skip_unset=False, format="yaml")
        settings: dict[str, Any] = yaml.safe_load(text)
        return settings

    def fit(self, **kwargs: Any) -> None:
        """Train, from the run's last checkpoint where there is one."""
        if self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            self.begin(self.trainer.fit, **kwargs)
            return
        lock = self.locked()
        try:
            self.fit_alone(**kwargs)
        finally:
            if lock is not None:
                lock.release()

    def locked(self) -> RunLock | None:
        """The lock of the run's folder, which one of several processes holds for them all."""
        if self.trainer.global_rank != 0:
            return None
        lock = RunLock(self.folder)
        if lock.taken_over is not None:
            say(f"{lock.taken_over}, which trained in {self.folder} last, did not come to its end.")
        return lock

    def fit_alone(self, **kwargs: Any) -> None:
        """Train in a folder in which nobody else trains."""
        settings = self.settings()
        if self._get(self.config, "fresh"):
            moved = set_aside(self.folder) if self.trainer.global_rank == 0 else None
            if moved is not None:
                say(f"What was in {self.folder} is now in {moved}.")
        elif kwargs.get("ckpt_path") is not None:
            check_given(kwargs["ckpt_path"], training=True)
        else:
            found = self.found()
            if found is not None:
                check_same_run(self.folder, settings)
                if self.is_finished(found, settings):
                    self.draw_missing(**{**kwargs, "ckpt_path": str(found.path)})
                    return
                kwargs["ckpt_path"] = str(found.path)
                say(
                    f"The run in {self.folder} goes on after step {found.progress.steps}, in epoch "
                    f"{found.progress.epochs + 1}, from {found.path.name}."
                )
            elif self.folder.is_dir() and any(self.folder.glob("*.csv")):
                say(f"{self.folder} holds no checkpoint; the run begins anew.")
        self.beginning.config = yaml.safe_dump(settings, sort_keys=False).encode()
        self.train(**kwargs)
        lost = self.lost()
        if lost is not None:
            raise Refusal(f"The training ended after {self.trainer.global_step} steps. {lost}")
        if self.trainer.state.finished:
            self.report()

    def lost(self) -> str | None:
        """Why what was trained last is not on the disk, and what is; None where it is there."""
        failures = (
            callback.failure for callback in self.trainer.checkpoint_callbacks if isinstance(callback, RunCheckpoint)
        )
        failure = next((failure for failure in failures if failure is not None), None)
        if failure is None or self.trainer.global_rank != 0:
            return None
        found = find_checkpoint(self.folder)
        there = "no checkpoint" if found is None else f"{found.path.name} of step {found.progress.steps}"
        then = "begins anew" if found is None else "goes on from there"
        return (
            f"Its last checkpoint could not be written ({brief(failure)}), and what was trained since is lost: {self.folder} "
            f"holds {there}. Make room on the disk; the same command {then}."
        )

    def found(self) -> Found | None:
        """The run's last checkpoint that is whole; says which were passed over."""
        try:
            found = find_checkpoint(self.folder)
        except RuntimeError as error:
            raise Refusal(str(error)) from error
        for sentence in found.passed_over if found is not None else ():
            say(sentence)
        return found

    def is_finished(self, found: Found, settings: dict[str, Any]) -> bool:
        """Whether nothing is left to train; says so."""
        done = found.progress
        if not is_over(done, self.trainer.max_epochs, self.trainer.max_steps):
            return False
        longer = "--trainer.max_epochs with a larger number goes on, --fresh begins anew."
        if done.stopped:
            longer = "Early stopping ended it; --fresh or another --run_dir begins anew."
        elif length_matters(settings):
            longer = (
                "The schedule of its learning rate depends on its length; --fresh or another --run_dir begins anew."
            )
        say(f"The run in {self.folder} is finished: {done.epochs} epochs, {done.steps} steps. {longer}")
        return True

    def draw_missing(self, **kwargs: Any) -> None:
        """Draw the panels of a finished run that was ended before they were drawn; they show images of the validation set.

        The run stays finished when that fails: its data may be elsewhere by now.
        """
        for panels in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(panels, Panels) and panels.missing(self.trainer):
                say("It was ended before its panels were drawn; they are drawn now.")
                try:
                    self.begin(self.trainer.validate, **kwargs, verbose=False)
                    panels.on_fit_end(self.trainer, self.model)
                except Exception as error:
                    say(f"Its panels cannot be drawn ({brief(error)}); the next start tries again.")

    def train(self, **kwargs: Any) -> None:
        """Fit until the end, or until a signal, which is said and becomes the exit status."""
        folder, trainer = self.folder, self.trainer
        there = {path for path in (folder, folder / "tensorboard") if path.exists()}
        with Interrupt(trainer, self.beginning) as interrupt:
            try:
                self.begin(trainer.fit, **kwargs)
            except SIGTERMException:
                number = interrupt.number or signal.SIGTERM
                then = self.lost() or "The same command goes on from there."
                say(f"Stopped by {number.name} after {trainer.global_step} steps. {then}")
                raise SystemExit(128 + number) from None
            except SystemExit:
                if interrupt.number is None:
                    raise
                again = "the same command goes on from the last checkpoint"
                say(f"Stopped at once; {again if self.beginning.over else 'nothing was trained'}.")
                raise SystemExit(128 + interrupt.number) from None
            except OSError as error:
                if error.errno not in UNWRITABLE:
                    raise
                full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
                advice = (
                    "Make room on the disk; the same command tries again." if full else "Give --run_dir another folder."
                )
                raise Refusal(
                    f"{error.filename or folder} could not be written ({error.strerror}). {advice}"
                ) from error
            finally:
                if not self.beginning.over and trainer.global_rank == 0:
                    leave_nothing(folder, there)

    def report(self) -> None:
        """Say what came out, and where it is."""
        folder = self.folder
        score, title = self.model.evaluation.score, self.model.evaluation.title
        value = self.trainer.callback_metrics.get(f"validation/{score}")
        if value is not None:
            say(f"Validation {title} of the student: {100 * float(value):.2f} %.")
        elif not self.beginning.validated:
            say(
                f"No validation took place (trainer.check_val_every_n_epoch is {self.trainer.check_val_every_n_epoch}); "
                f"frskd-fast validate with the same options gives the {title} of the student."
            )
        say(f"Records and checkpoints: {folder} (steps.csv, epochs.csv, last.ckpt).")
        trust = " --trust" if self.model.has_own_student or needs_trust(self.model.hparams.backbone) else ""
        say(
            f"The student alone: frskd-fast export --checkpoint {folder / 'last.ckpt'} --out student.safetensors{trust}"
        )

    def begin(self, work: Callable[..., Any], **kwargs: Any) -> None:
        """Call one of the trainer's methods; a mistake found before the first batch is a sentence."""
        try:
            work(**kwargs)
        except Exception as error:
            if self.beginning.over:
                raise
            if _is_unfit(error):
                raise Refusal(
                    f"The checkpoint {kwargs['ckpt_path']} does not fit the settings of this run ({brief(error)}). Give those "
                    "that it was trained with; --model.weights takes the weights alone."
                ) from error
            if not isinstance(error, MISTAKES):
                raise
            raise Refusal(sentence_of(error)) from error

    def validate(self, **kwargs: Any) -> None:
        """Measure the run's student on the validation images."""
        self.begin(self.trainer.validate, **self.with_checkpoint(kwargs))

    def test(self, **kwargs: Any) -> None:
        """Measure the run's student on the test images."""
        self.begin(self.trainer.test, **self.with_checkpoint(kwargs))

    def predict(self, **kwargs: Any) -> None:
        """Write down the class of each test image."""
        self.begin(self.trainer.predict, **{**self.with_checkpoint(kwargs), "return_predictions": False})

    def with_checkpoint(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Without --ckpt_path: the run's own last checkpoint."""
        if kwargs.get("ckpt_path") is not None:
            check_given(kwargs["ckpt_path"], training=False)
            return kwargs
        found = self.found()
        if found is None:
            if self.trainer.fast_dev_run:  # type: ignore[attr-defined]
                return kwargs
            raise Refusal(f"{self.folder} holds no checkpoint; train first, or give --ckpt_path a file.")
        say(f"Weights: {found.path}, after {found.progress.epochs} epochs.")
        return {**kwargs, "ckpt_path": str(found.path)}


def _is_unfit(error: Exception) -> bool:
    """Whether an error says that a checkpoint does not fit: one of restoring, and not that memory ran out meanwhile."""
    frames = traceback.extract_tb(error.__traceback__)
    restoring = any(frame.name.startswith("restore") and "checkpoint_connector" in frame.filename for frame in frames)
    return restoring and type(error) in UNFIT and "allocate memory" not in str(error)


def _plain(settings: Any) -> Any:
    return settings.as_dict() if hasattr(settings, "as_dict") else settings
